"""The page of trains side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from configs.records import TrainRecord
from configs.scoring import SCORE_TITLES
from tasks import pages
from tasks.comparing import Comparison, Sample, draw_trains
from tasks.side_by_side_report import differences_table

_DPI = 90


def as_page(found: Comparison, records: Sequence[TrainRecord], mlflow: str | None = None) -> str:
    """The whole page as HTML that needs nothing beside it; `mlflow` is the address of MLflow's page of the same."""
    return pages.as_html(as_markdown(found, records, mlflow), "Trains side by side")


def as_markdown(found: Comparison, records: Sequence[TrainRecord], mlflow: str | None = None) -> str:
    """The same page as Markdown, which Prefect draws."""
    parts = [
        f"# {' · '.join(pages.text(train) for train in found.trains)}",
        *(pages.text(line) for line in found.verdict.splitlines()),
        f"[The same in MLflow, with the curves]({mlflow})" if mlflow else "",
        "## Parameters that differ",
        _table(found, found.parameters.items()) or "No parameter differs.",
        "## Outcome",
        _table(found, found.figures.items()) or "There are no figures yet.",
        *_differences(found),
        "## Curves",
        _curves(records),
        "## Versions",
        _table(found, found.versions.items()),
        *_samples(found),
        _shared(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(found: Comparison, rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    told = [(pages.text(name), *(_cell(value) for value in column)) for name, column in rows]
    return pages.table(("", *(pages.cell(train) for train in found.trains)), told) if told else ""


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return pages.cell(f"{value:.6g}" if isinstance(value, float) else str(value))


def _differences(found: Comparison) -> list[str]:
    parts = []
    for train, differences in found.differences.items():
        parts += [f"## {pages.text(train)} against {pages.text(found.trains[0])}", differences_table(differences)]
    return parts


def _curves(records: Sequence[TrainRecord]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "curves.png"
        if not draw_trains(records, picture, dpi=_DPI):
            return "There is no curve yet."
        return pages.picture(picture, "Curves of the trains, one over the other")


def _samples(found: Comparison) -> list[str]:
    if not found.samples:
        return []
    rows = [
        (str(sample.row), pages.cell(sample.prompt), pages.cell(sample.reference), *_answers(sample))
        for sample in found.samples
    ]
    columns = ("Row", "Prompt", "Expected", *(pages.cell(train) for train in found.trains))
    title = SCORE_TITLES[found.metric]
    return [f"## Samples\n\nThe {len(rows)} rows on which {title} differs most.", pages.table(columns, rows)]


def _answers(sample: Sample) -> list[str]:
    return [
        "–" if answer is None else pages.cell(answer) + ("" if figure is None else f"<br>**{figure:.0f} %**")
        for answer, figure in zip(sample.answers, sample.figures, strict=True)
    ]


def _shared(found: Comparison) -> str:
    rows = [(pages.text(name), _cell(value)) for name, value in found.shared.items()]
    summary = f"<details><summary>{len(rows)} parameters that are the same</summary>"
    return "\n\n".join([summary, pages.table(("Parameter", "Value"), rows), "</details>"])
