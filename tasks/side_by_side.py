"""Up to five candidates on the same rows: who answers what, who is better, and how sure that is."""

from __future__ import annotations

import csv
import io
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from configs.datasets import DatasetVersion
from configs.errors import UserError
from configs.judging import Judge, JudgedPairs, JudgedScores, Judgement
from configs.records import now
from configs.scoring import LOWER_IS_BETTER, RULE_METRICS, PairedDifference, ScoringOptions
from configs.settings import load_settings
from tasks import tracking
from tasks.candidates import Candidate
from tasks.evaluation import Evaluation, recording
from tasks.files import write_record, write_text
from tasks.inference import Generation
from tasks.judging import check_placeholders, judge_pairs, judge_scores
from tasks.scored_files import compare_row_scores
from tasks.side_by_side_report import as_page
from tasks.stages import StageFailed

PREVIEW_ROWS = 5
RECORD_FILE, REPORT_FILE, ROWS_FILE = "side_by_side.json", "report.html", "rows.csv"
EventHandler = Callable[[list[dict[str, Any]]], None]
Showing = Callable[[str], AbstractContextManager[EventHandler]]


class Outcome(BaseModel):
    """What one candidate came to: its scores, or why there are none."""

    name: str
    evaluation: Evaluation | None = None
    error: str | None = None
    judgements: list[Judgement] = Field(default_factory=list)
    judged: JudgedScores | JudgedPairs | None = Field(default=None, description="Pairs: against the first.")


class SideBySide(BaseModel):
    """Candidates on the same rows of one dataset version. Kept as `side_by_side.json`, with a report and a table."""

    id: str
    dataset: str
    created: datetime = Field(default_factory=now)
    metric: str = Field(description="What decides which rows have changed most.")
    options: ScoringOptions
    judge: Judge | None = None
    outcomes: list[Outcome] = Field(default_factory=list)
    differences: dict[str, list[PairedDifference]] = Field(
        default_factory=dict, description="Of each other candidate against the first that answered, by metric."
    )
    run_id: str | None = Field(default=None, description="MLflow run that holds the report; the scores have theirs.")

    @property
    def answered(self) -> list[tuple[str, Evaluation]]:
        """Those that answered, in order."""
        return [(each.name, each.evaluation) for each in self.outcomes if each.evaluation is not None]


def preview(
    candidates: Sequence[Candidate],
    version: DatasetVersion,
    generation: Generation,
    options: ScoringOptions,
    metric: str,
    judge: Judge | None,
    showing: Showing,
) -> SideBySide:
    """The first `PREVIEW_ROWS` rows, recorded nowhere. Raises UserError if nobody answers."""
    found = SideBySide(id="preview", dataset=version.reference, metric=metric, options=options, judge=judge)
    for candidate in candidates:
        with _outcome(found, candidate.name) as outcome, showing(candidate.name) as follow:
            outcome.evaluation = candidate.evaluate(version, generation, PREVIEW_ROWS, options, follow)
    return _concluded(found, showing)


def evaluate_side_by_side(
    candidates: Sequence[Candidate],
    version: DatasetVersion,
    generation: Generation,
    samples: int,
    options: ScoringOptions,
    metric: str,
    judge: Judge | None,
    showing: Showing,
    *,
    perplexity: bool = False,
    folder: Path | None = None,
) -> tuple[SideBySide, Path]:
    """Let the candidates answer one after the other, compare them, and keep it; returns that and its folder.

    What fails is told beside what did not, and what is there is kept after each candidate. Recorded in MLflow: a run
    with the report, below it one for each candidate. Raises UserError if nobody answers.
    """
    created = now()
    found = SideBySide(
        id=f"{version.name}_{created:%Y%m%d}_{secrets.token_hex(2)}",
        dataset=version.reference,
        created=created,
        metric=metric,
        options=options,
        judge=judge,
    )
    folder = folder or load_settings().evaluations / found.id
    names = ", ".join(candidate.name for candidate in candidates)
    parameters = {"candidates": names, "metric": metric, "judge": judge.model if judge else "none"}
    with recording(names, version, {"tuneline.side_by_side": found.id}, parameters) as run_id:
        found.run_id = run_id
        tags = {"tuneline.side_by_side": found.id, "mlflow.parentRunId": run_id}
        for candidate in candidates:
            with _outcome(found, candidate.name) as outcome, showing(candidate.name) as follow:
                outcome.evaluation = candidate.evaluate_and_record(
                    version, generation, samples, options, follow, tags, perplexity=perplexity
                )
            write_record(folder / RECORD_FILE, found)
        found = _concluded(found, showing)
        files = write_files(found, folder)
        tracking.log_files(run_id, files, "side_by_side")
    return found, folder


@contextmanager
def _outcome(found: SideBySide, name: str) -> Iterator[Outcome]:
    """What a candidate comes to; a mistake or a stage that failed is its outcome, anything else ends it all."""
    outcome = Outcome(name=name)
    found.outcomes.append(outcome)
    try:
        yield outcome
    except (UserError, StageFailed) as error:
        outcome.error = str(error)


def _concluded(found: SideBySide, showing: Showing) -> SideBySide:
    """With the judge's word and the differences. Raises UserError if there is no answer."""
    if not found.answered:
        failures = "; ".join(f"{each.name}: {each.error}" for each in found.outcomes)
        raise UserError(f"none of them answered: {failures}")
    (first_name, first), *others = found.answered
    if found.judge is not None:
        check_placeholders(found.judge, first)
        for outcome in found.outcomes:
            if outcome.evaluation is not None and not (found.judge.compares and outcome.name == first_name):
                with showing(f"{outcome.name}, judged") as follow:
                    _let_judge(found.judge, first, outcome, follow)
    for name, evaluation in others:
        found.differences[name] = compare_row_scores(first.row_scores, evaluation.row_scores, found.options.confidence)
    return found


def _let_judge(judge: Judge, first: Evaluation, outcome: Outcome, on_events: EventHandler) -> None:
    evaluation = outcome.evaluation
    if evaluation is None:
        raise ValueError(f"{outcome.name} has no answers to judge")
    if judge.compares:
        outcome.judgements, outcome.judged = judge_pairs(judge, first, evaluation, on_events)
    else:
        outcome.judgements, outcome.judged = judge_scores(judge, evaluation, on_events)


def most_changed(found: SideBySide, count: int) -> list[int]:
    """The rows (from 1) on which the others differ most from the first by the metric, the most changed first."""
    (_, first), *others = found.answered
    scores = {row.row: getattr(row, found.metric) for row in first.row_scores}
    changes: dict[int, float] = {}
    for _, evaluation in others:
        for row in evaluation.row_scores:
            before, after = scores.get(row.row), getattr(row, found.metric)
            if before is not None and after is not None:
                changes[row.row] = max(changes.get(row.row, 0.0), abs(after - before))
    ranked = sorted(changes, key=lambda row: (-changes[row], row))
    return [row for row in ranked if changes[row] > 0][:count]


def best(found: SideBySide) -> str:
    """The candidate with the best mean by the metric; the first of several."""
    figures = [(name, evaluation.figures.get(found.metric)) for name, evaluation in found.answered]
    known = [(name, value) for name, value in figures if value is not None]
    if not known:
        return found.answered[0][0]
    chosen = min if found.metric in LOWER_IS_BETTER else max
    return chosen(known, key=lambda each: each[1])[0]


def write_files(found: SideBySide, folder: Path) -> list[Path]:
    """Write the record, the report and the table of all rows to the folder; returns the three files."""
    write_record(folder / RECORD_FILE, found)
    write_text(folder / REPORT_FILE, as_page(found))
    # The mark tells Excel that it is UTF-8; all readers here skip it.
    write_text(folder / ROWS_FILE, "\ufeff" + as_csv(found))
    return [folder / name for name in (RECORD_FILE, REPORT_FILE, ROWS_FILE)]


def as_csv(found: SideBySide) -> str:
    """Every row that somebody answered, with the answers, their figures and the judge's word, as CSV."""
    rows: dict[int, dict[str, Any]] = {}
    for outcome in found.outcomes:
        if outcome.evaluation is None:
            continue
        said = {each.row: each for each in outcome.judgements}
        for prediction, scores in zip(outcome.evaluation.predictions, outcome.evaluation.row_scores, strict=True):
            number = prediction["row"]
            row = rows.setdefault(number, {"row": number, "prompt": prediction["prompt"]})
            row |= {"reference": prediction["reference"], **prediction.get("extra", {})}
            own = {"answer": prediction["prediction"], "cut": prediction["hit_limit"]}
            own |= {name: value for name in RULE_METRICS if (value := getattr(scores, name)) is not None}
            if number in said:
                own |= {"judge": said[number].winner if found.judge and found.judge.compares else said[number].score}
            row |= {f"{outcome.name}: {name}": value for name, value in own.items()}
        for number, reason in outcome.evaluation.failed.items():
            rows.setdefault(number, {"row": number})[f"{outcome.name}: failed"] = reason
    columns = dict.fromkeys(name for number in sorted(rows) for name in rows[number])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows[number] for number in sorted(rows))
    return text.getvalue()
