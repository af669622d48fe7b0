"""`tuneline score` and `tuneline evaluate`: answers against references, of files and of models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.scoring import DEFAULT_CONFIDENCE
from flows.cli_inference import MethodOption, with_method
from flows.printing import print_differences, print_json, print_mean_scores, print_table, print_warning

if TYPE_CHECKING:
    from configs.datasets import DatasetVersion
    from configs.records import ModelRecord

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
    from configs.scoring import ScoringOptions
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
    model: Annotated[str, typer.Argument(help="A base, customized or complete model, LINE@ALIAS, or a train.")],
    dataset: Annotated[str, typer.Option(help="A file, or the name of a dataset.")],
    prompt_column: Annotated[str | None, typer.Option(help="Column of the prompt.")] = None,
    completion_column: Annotated[str | None, typer.Option(help="Column of the expected answer.")] = None,
    samples: Annotated[int, typer.Option(help="How many rows; -1 for all.", min=-1)] = -1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    by: By = [],  # noqa: B006 - typer reads the default, nobody changes it
    stop_words: StopWords = None,
    method: MethodOption = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Ask the model as well how likely it finds the references.")
    ] = False,
    json_: Json = False,
) -> None:
    """Score a model's answers to a dataset; recorded in MLflow."""
    from flows import cli_models, cli_trains

    found = with_method(cli_models.find(model), method)
    from configs.datasets import Columns, Wanted
    from configs.scoring import ScoringOptions
    from methods.registry import find_method
    from tasks.datasets import resolve_dataset
    from tasks.evaluation import evaluate_and_record
    from tasks.inference import Generation
    from tasks.measuring import TEXT_KINDS

    columns = Columns(prompt=prompt_column, completion=completion_column)
    wanted = Wanted(f"the evaluation of {found.name}", find_method(found.method).evaluated_kinds)
    version = resolve_dataset(dataset, columns, wanted=wanted)
    options = ScoringOptions(stop_words=stop_words, by=tuple(by))
    cli_trains.embedded()
    if version.kind not in TEXT_KINDS:
        _measure(found, version, samples, json_)
        return
    with cli_trains.terminal_line("evaluating") as follow:
        generation = Generation(max_new_tokens=max_new_tokens)
        outcome = evaluate_and_record(found, version, generation, samples, follow, options, perplexity=perplexity)
    if perplexity and outcome.perplexity is None:
        print_warning(f"the inference stage of the method {found.method} does not tell how likely references are")
    if json_:
        told = {"model": outcome.model, "dataset": outcome.dataset, "perplexity": outcome.perplexity}
        print_json({**told, "hit_limit": outcome.hit_limit, **outcome.scores.model_dump()})
        return
    print_mean_scores(outcome.scores, outcome.figures, outcome.model)
    if outcome.perplexity is not None:
        print(f"perplexity of the references: {outcome.perplexity:.3f}")
    print(f"rows of {outcome.dataset}")


def _measure(model: ModelRecord, version: DatasetVersion, samples: int, json_: bool) -> None:
    """Print the figures of a model that gives no text answers to such rows."""
    from configs.scoring import figure_title
    from flows import cli_trains
    from tasks.measuring import measure_and_record

    with cli_trains.terminal_line("evaluating") as follow:
        outcome = measure_and_record(model, version, samples, follow)
    if json_:
        print_json(outcome.model_dump())
        return
    rows = [(figure_title(name), value) for name, value in outcome.figures.items()]
    print_table(("Figure", outcome.model), rows, "nothing was measured")
    print(f"{outcome.rows} rows of {outcome.dataset}")
