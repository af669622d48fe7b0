"""Files of answers with their references: read in any format that datasets have, scored, compared with another one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.datasets import Problem
from configs.errors import UserError
from configs.scoring import RULE_METRICS, PairedDifference, RowScores, Scores, ScoringOptions
from tasks.dataset_reading import ParsedRow, describe, inspect_file, read_objects, shown
from tasks.scoring import score_rows, summarise
from tasks.statistics import paired_difference
from tasks.stop_words import read_stop_words

PREDICTION, REFERENCE = "prediction", "reference"


@dataclass
class ScoredFile:
    """The answers of a file in order, with their references, the values of the columns to score by, their lines."""

    path: Path
    predictions: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)
    lines: list[int | None] = field(default_factory=list)

    def score(self, stop_words: Collection[str]) -> list[RowScores]:
        """The metrics of each row. Raises UserError for a reference of stop words alone, naming its line."""
        pairs = zip(self.predictions, self.references, strict=True)
        return score_rows(pairs, stop_words, source=self.path, lines=self.lines)


def read_scored_file(
    path: Path, prediction: str = PREDICTION, reference: str = REFERENCE, by: Sequence[str] = ()
) -> ScoredFile:
    """Read the columns of a file of JSON Lines, JSON, CSV, Excel or Parquet.

    Raises UserError, with file, line and field, for what cannot be read and for a row without a column that was named.
    """
    if not path.exists():
        raise UserError("the file cannot be read: it does not exist", file=path, mend="check the path")
    found = ScoredFile(path, values={column: [] for column in by})
    for row in read_objects(path, inspect_file(path)):
        if isinstance(row, Problem):
            if row.level == "warning":
                continue
            raise UserError(
                row.message, file=path, line=row.line, field=row.field, expected=row.expected, mend=row.mend
            )
        found.predictions.append(_text(path, row, prediction))
        found.references.append(_reference(path, row, reference))
        found.lines.append(row.line)
        for column in by:
            found.values[column].append(_slice_value(path, row, column))
    if not found.lines:
        raise UserError("the file holds no rows", file=path, expected="answers with their references")
    return found


def score_file(
    path: Path,
    options: ScoringOptions | None = None,
    *,
    prediction: str = PREDICTION,
    reference: str = REFERENCE,
) -> Scores:
    """Mean metrics of a file, overall and by slice. Raises UserError as `read_scored_file` does."""
    options = options or ScoringOptions()
    stop_words = read_stop_words(options.stop_words)
    found = read_scored_file(path, prediction, reference, options.by)
    return summarise(found.score(stop_words), stop_words, confidence=options.confidence, by=found.values)


def compare_files(
    first: ScoredFile, second: ScoredFile, options: ScoringOptions, metrics: Sequence[str] = RULE_METRICS
) -> list[PairedDifference]:
    """Two models on the same rows, by each metric that every row has.

    Raises UserError if the files do not hold the same references in the same order, or fewer than two.
    """
    _require_same_rows(first, second)
    stop_words = read_stop_words(options.stop_words)
    rows = [each.score(stop_words) for each in (first, second)]
    return compare_row_scores(rows[0], rows[1], options.confidence, metrics)


def compare_row_scores(
    first: Sequence[RowScores],
    second: Sequence[RowScores],
    confidence: float,
    metrics: Sequence[str] = RULE_METRICS,
) -> list[PairedDifference]:
    """Two models by each metric, on the rows that both have; the JSON figures over those whose reference is JSON."""
    others = {row.row: row for row in second}
    both = [(row, others[row.row]) for row in first if row.row in others]
    found = []
    for metric in metrics:
        pairs = [(getattr(one, metric), getattr(other, metric)) for one, other in both]
        told = [(before, after) for before, after in pairs if before is not None and after is not None]
        if len(told) >= 2:
            before, after = zip(*told, strict=True)
            found.append(paired_difference(metric, before, after, confidence))
    return found


def _require_same_rows(first: ScoredFile, second: ScoredFile) -> None:
    for index, (one, other) in enumerate(zip(first.references, second.references, strict=False)):
        if one != other:
            raise UserError(
                f"the two files do not hold the same rows: the reference differs from that in {first.path}",
                file=second.path,
                line=second.lines[index],
                value=other,
                field=REFERENCE,
                expected=one if len(one) < 200 else f"{one[:200]}…",
                mend="put the rows of both in the same order",
            )
    if len(first.references) != len(second.references) or len(first.references) < 2:
        raise UserError(
            f"{len(first.references)} rows cannot be compared with {len(second.references)}",
            file=second.path,
            expected="the same rows in both, at least two",
        )


def _text(path: Path, row: ParsedRow, column: str) -> str:
    value = _cell(path, row, column)
    if not isinstance(value, str):
        raise UserError(
            f"{shown(column)} is {describe(value)}, not a text",
            file=path,
            line=row.line,
            field=column,
            value=value,
            expected="a text; an empty one counts and scores 0",
        )
    return value


def _reference(path: Path, row: ParsedRow, column: str) -> str:
    value = _text(path, row, column)
    if not value.strip():
        raise UserError(
            "there is no reference to compare the answer with",
            file=path,
            line=row.line,
            field=column,
            value=value,
            expected="the answer that was wanted",
        )
    return value


def _slice_value(path: Path, row: ParsedRow, column: str) -> str:
    value = _cell(path, row, column)
    if isinstance(value, (dict, list)):
        raise UserError(
            f"{shown(column)} is {describe(value)}, by which rows cannot be told apart",
            file=path,
            line=row.line,
            field=column,
            expected="a text, a number, true or false",
        )
    return slice_name(value)


def slice_name(value: object) -> str:
    """The name of the slice of the rows with this value."""
    if value is None or value == "":
        return "(empty)"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cell(path: Path, row: ParsedRow, column: str) -> object:
    if column not in row.value:
        raise UserError(
            "the row has no such column",
            file=path,
            line=row.line,
            field=column,
            expected=f"one of: {', '.join(shown(name) for name in list(row.value)[:20]) or '(the row is empty)'}",
            mend="name the columns with --prediction-column, --reference-column and --by",
        )
    return row.value[column]
