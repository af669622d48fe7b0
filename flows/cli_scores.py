"""`tuneline score` and `tuneline evaluate`: answers against references, of files and of models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from configs.errors import UserError
from configs.scoring import DEFAULT_CONFIDENCE, RULE_METRICS, SCORE_TITLES, ScoringOptions
from flows.cli_inference import MethodOption, Thinking
from flows.printing import (
    MAIN_FIGURES,
    print_block,
    print_differences,
    print_json,
    print_mean_scores,
    print_table,
    print_warning,
)

if TYPE_CHECKING:
    from configs.datasets import DatasetVersion
    from configs.judging import Judge
    from tasks.candidates import Candidate
    from tasks.inference import Generation
    from tasks.side_by_side import SideBySide

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
By = Annotated[
    list[str], typer.Option("--by", metavar="COLUMN", help="Score the rows with each value apart as well; repeatable.")
]
StopWords = Annotated[
    str | None, typer.Option(help="Words to leave out: zh, en, zh,en, or a file with one a line. By default none.")
]
Confidence = Annotated[float, typer.Option(help="Level of the intervals.", min=0.5, max=0.9999)]


def score(
    file: Annotated[Path, typer.Argument(help="JSON Lines, JSON, CSV, Excel or Parquet with answers and references.")],
    prediction_column: Annotated[str, typer.Option(help="Column of the answers.")] = "prediction",
    reference_column: Annotated[str, typer.Option(help="Column of the references.")] = "reference",
    by: By = [],  # noqa: B006 - typer reads the default, nobody changes it
    stop_words: StopWords = None,
    against: Annotated[
        Path | None, typer.Option(help="Answers of another model to the same rows: is it better or worse?")
    ] = None,
    confidence: Confidence = DEFAULT_CONFIDENCE,
    json_: Json = False,
) -> None:
    """Score answers against references. Accuracy, F1, ROUGE-1/2/L, BLEU-4, edit distance, JSON; in percent."""
    from tasks.scored_files import compare_files, read_scored_file, score_file

    options = ScoringOptions(stop_words=stop_words, by=tuple(by), confidence=confidence)
    columns = {"prediction": prediction_column, "reference": reference_column}
    scores = score_file(file, options, **columns)
    differences = []
    if against is not None:
        pair = [read_scored_file(each, **columns) for each in (file, against)]
        differences = compare_files(pair[0], pair[1], options)
    if json_:
        compared = [{**each.model_dump(), "verdict": each.verdict} for each in differences]
        print_json({**scores.model_dump(), **({"against": compared} if against is not None else {})})
        return
    figures = scores.model_dump(exclude_none=True)
    print_mean_scores(scores, figures, file.name)
    if against is not None:
        print()
        print_differences(differences, (file.name, against.name))


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Up to five: models, LINE@ALIAS, trains, endpoints (endpoint:NAME if a train has the name).",
        ),
    ],
    dataset: Annotated[str, typer.Option(help="A file, or the name of a dataset.")],
    prompt_column: Annotated[str | None, typer.Option(help="Column of the prompt.")] = None,
    completion_column: Annotated[str | None, typer.Option(help="Column of the expected answer.")] = None,
    samples: Annotated[int, typer.Option(help="How many rows; -1 for all.", min=-1)] = -1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    batch_size: Annotated[
        str, typer.Option(metavar="auto|ROWS", help="Rows answered at a time; auto: by the free memory.")
    ] = "auto",
    by: By = [],  # noqa: B006 - typer reads the default, nobody changes it
    stop_words: StopWords = None,
    confidence: Confidence = DEFAULT_CONFIDENCE,
    method: MethodOption = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Ask the models as well how likely they find the references.")
    ] = False,
    judge: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A judge, as configs/judges/commands.yaml describes one.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Figure by which the rows that changed most are found, such as rouge_l.")
    ] = "f1",
    preview: Annotated[
        bool, typer.Option("--preview", help="Show five rows first; a terminal is asked whether to go on.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Where the report of several goes.")
    ] = None,
    thinking: Thinking = "auto",
    json_: Json = False,
) -> None:
    """Score the answers of a model, or of several side by side. They answer a dataset; recorded in MLflow."""
    from configs.judging import read_judge

    if metric not in RULE_METRICS:
        raise UserError("there is no such metric", field="--metric", value=metric, expected=", ".join(RULE_METRICS))
    asked = read_judge(judge) if judge is not None else None
    rows_at_a_time = _rows_at_a_time(batch_size)
    from flows import cli_trains

    if any("@" in name for name in models):
        cli_trains.embedded()
    from configs.datasets import Columns, Wanted
    from tasks.candidates import find_candidates
    from tasks.datasets import resolve_dataset
    from tasks.inference import Generation
    from tasks.measuring import TEXT_KINDS

    candidates = find_candidates(models, method)
    columns = Columns(prompt=prompt_column, completion=completion_column)
    kinds = [candidate.kinds for candidate in candidates]
    common = tuple(kind for kind in kinds[0] if all(kind in others for others in kinds))
    wanted = Wanted(f"the evaluation of {', '.join(candidate.name for candidate in candidates)}", common)
    version = resolve_dataset(dataset, columns, wanted=wanted)
    cli_trains.embedded()
    if version.kind not in TEXT_KINDS:
        _measure(candidates, version, samples, json_)
        return
    generation = Generation(max_new_tokens=max_new_tokens, batch_size=rows_at_a_time, thinking=thinking)
    options = ScoringOptions(stop_words=stop_words, by=tuple(by), confidence=confidence)
    if preview and not _previewed(candidates, version, generation, options, metric, asked, json_):
        return
    if len(candidates) == 1 and asked is None and output is None:
        _evaluate_one(candidates[0], version, generation, samples, options, json_, perplexity=perplexity)
        return
    from tasks.side_by_side import evaluate_side_by_side

    found, folder = evaluate_side_by_side(
        candidates,
        version,
        generation,
        samples,
        options,
        metric,
        asked,
        cli_trains.terminal_line,
        perplexity=perplexity,
        folder=output,
    )
    _show_side_by_side(found, folder, json_)
    if any(outcome.error for outcome in found.outcomes):
        raise typer.Exit(1)


def _evaluate_one(
    candidate: Candidate,
    version: DatasetVersion,
    generation: Generation,
    samples: int,
    options: ScoringOptions,
    json_: bool,
    *,
    perplexity: bool,
) -> None:
    from flows import cli_trains

    with cli_trains.terminal_line("evaluating") as follow:
        outcome = candidate.evaluate_and_record(
            version, generation, samples, options, follow, {}, perplexity=perplexity
        )
    if perplexity and outcome.perplexity is None:
        print_warning(f"{candidate.name} does not tell how likely references are")
    if json_:
        told = {"model": outcome.model, "dataset": outcome.dataset, "perplexity": outcome.perplexity}
        speed = {"speed": outcome.speed.model_dump() if outcome.speed is not None else None}
        scores = outcome.scores.model_dump()
        print_json({**told, **speed, "hit_limit": outcome.hit_limit, **scores, "failed": outcome.failed})
        return
    print_mean_scores(outcome.scores, outcome.figures, outcome.model)
    if outcome.perplexity is not None:
        print(f"perplexity of the references: {outcome.perplexity:.3f}")
    if outcome.thoughts:
        print(f"{outcome.thoughts} answers begin with a thought, which is not scored")
    if outcome.failed:
        print_warning(f"{len(outcome.failed)} rows got no answer: {next(iter(outcome.failed.values()))}")
    print(f"rows of {outcome.dataset}")
    if outcome.speed is not None:
        print(outcome.speed.in_words())


def _rows_at_a_time(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise UserError("not a batch size", field="--batch-size", value=text, expected="auto, or a whole number ≥ 1")
    return int(text)


def _previewed(
    candidates: Sequence[Candidate],
    version: DatasetVersion,
    generation: Generation,
    options: ScoringOptions,
    metric: str,
    judge: Judge | None,
    json_: bool,
) -> bool:
    """Show what the candidates answer to the first rows; whether the whole is wanted."""
    from flows import cli_trains
    from tasks.side_by_side import preview

    found = preview(candidates, version, generation, options, metric, judge, cli_trains.terminal_line)
    if json_:
        print_json(found.model_dump(mode="json"))
        return False
    for outcome in found.outcomes:
        if outcome.error:
            print_warning(f"{outcome.name}: {outcome.error}")
    for number in range(1, 1 + max(evaluation.rows for _, evaluation in found.answered)):
        _show_row(found, number)
    if sys.stdin.isatty():
        return typer.confirm(f"Go on with all {version.rows} rows?")
    print(f"a preview, nothing was recorded; without --preview all {version.rows} rows are answered")
    return False


def _show_row(found: SideBySide, number: int) -> None:
    answers = []
    row = None
    for outcome in found.outcomes:
        if outcome.evaluation is None:
            continue
        told = next((each for each in outcome.evaluation.predictions if each["row"] == number), None)
        row = told or row
        said = next((each for each in outcome.judgements if each.row == number), None)
        word = "" if said is None else f" (judge: {said.winner or said.score})"
        mark = "✓" if told is not None and told["exact"] else "✗"
        answers.append(f"{mark} {outcome.name}: {told['prediction'] if told is not None else '(no answer)'}{word}")
    if row is not None:
        print_block(f"{number}. {row['prompt']}", f"expected: {row['reference']}", *answers)


def _show_side_by_side(found: SideBySide, folder: Path, json_: bool) -> None:
    if json_:
        print_json({**found.model_dump(mode="json", exclude=_NOT_PRINTED), "folder": str(folder)})
        return
    from tasks.side_by_side import REPORT_FILE, ROWS_FILE, best

    names = [name for name, _ in found.answered]
    rows = [
        (
            title,
            *(f"{value:.2f}" if (value := each.figures.get(key)) is not None else None for _, each in found.answered),
        )
        for key, title in SCORE_TITLES.items()
        if any(key in each.figures for _, each in found.answered)
    ]
    print_table(("Score in percent", *names), rows, "nothing was scored")
    for outcome in found.outcomes:
        if outcome.error:
            print_warning(f"{outcome.name} failed: {outcome.error}")
        elif outcome.evaluation is not None and outcome.evaluation.failed:
            reason = next(iter(outcome.evaluation.failed.values()))
            print_warning(f"{outcome.name} answered {outcome.evaluation.rows} rows, the others failed: {reason}")
    for name, differences in found.differences.items():
        print()
        shown = [each for each in differences if each.metric in MAIN_FIGURES]
        print_differences(shown, (names[0], name))
    _show_judge(found)
    print(f"\nbest by {SCORE_TITLES[found.metric]}: {best(found)}")
    print(f"report: {folder / REPORT_FILE}\nrows:   {folder / ROWS_FILE}")


# What is said of each row stands in the files.
_NOT_PRINTED: Any = {"outcomes": {"__all__": {"evaluation": {"predictions", "row_scores"}, "judgements": True}}}


def _show_judge(found: SideBySide) -> None:
    if found.judge is None:
        return
    rows = []
    for outcome in found.outcomes:
        if outcome.judged is not None:
            figures = outcome.judged.model_dump(mode="json", exclude={"maximum", "distribution"}, exclude_none=True)
            rows += [(outcome.name, name.replace("_", " "), value) for name, value in figures.items()]
    print()
    print_table(("Judged", "", ""), rows, "nothing was judged", title=f"By {found.judge.model}")


def _measure(candidates: Sequence[Candidate], version: DatasetVersion, samples: int, json_: bool) -> None:
    """Print the figures of models that give no text answers to such rows."""
    from configs.scoring import figure_title
    from flows import cli_trains
    from tasks.measuring import measure_and_record

    outcomes = []
    for candidate in candidates:
        if candidate.model is None:
            raise UserError("an endpoint is asked for texts only", field="MODEL", value=candidate.name)
        with cli_trains.terminal_line(f"evaluating {candidate.name}") as follow:
            outcomes.append(measure_and_record(candidate.model, version, samples, follow))
    if json_:
        told = [outcome.model_dump() for outcome in outcomes]
        print_json(told if len(told) > 1 else told[0])
        return
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.figures))
    rows = [(figure_title(name), *(outcome.figures.get(name) for outcome in outcomes)) for name in names]
    print_table(("Figure", *(outcome.model for outcome in outcomes)), rows, "nothing was measured")
    print(f"{outcomes[0].rows} rows of {version.reference}")
