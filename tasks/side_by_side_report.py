"""The page of candidates side by side: figures with their intervals, differences, the judge, the rows that changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from configs.judging import JudgedPairs, JudgedScores, Judgement
from configs.scoring import SCORE_TITLES, PairedDifference
from tasks import pages
from tasks.scoring import computed_with
from tasks.statistics import FEW_ROWS

if TYPE_CHECKING:
    from tasks.side_by_side import Outcome, SideBySide

SHOWN_ROWS = 20


def as_page(found: SideBySide) -> str:
    """The whole page as HTML that needs nothing beside it."""
    parts = [f"# {pages.text(found.dataset)}", _overview(found), "## Scores", scores_table(found), _computed(found)]
    if found.differences:
        first = found.answered[0][0]
        parts.append(f"## Against {pages.text(first)}")
        parts += [f"### {pages.text(name)}\n\n{differences_table(each)}" for name, each in found.differences.items()]
        parts.append(_caveat(found))
    if found.judge is not None:
        parts += ["## Judge", judge_tables(found)]
    for column in found.options.by:
        parts += [f"## By {pages.text(column)}", slices_table(found, column)]
    parts += [_changed(found)]
    return pages.as_html("\n\n".join(part for part in parts if part) + "\n", f"{found.dataset}, side by side")


def _overview(found: SideBySide) -> str:
    rows = [(pages.cell(outcome.name), _outcome(outcome)) for outcome in found.outcomes]
    return pages.table(("Candidate", "Outcome"), rows)


def _outcome(outcome: Outcome) -> str:
    evaluation = outcome.evaluation
    if evaluation is None:
        return f"failed: {pages.cell((outcome.error or '').partition(chr(10))[0])}"
    failed = f", {len(evaluation.failed)} rows failed" if evaluation.failed else ""
    return f"{evaluation.rows} rows answered{failed}"


def scores_table(found: SideBySide) -> str:
    """Each figure of each candidate, with its interval."""
    rows = []
    for key, title in {**SCORE_TITLES, "perplexity": "Perplexity (less is better)"}.items():
        cells = []
        for _, evaluation in found.answered:
            value, interval = evaluation.figures.get(key), evaluation.scores.intervals.get(key)
            told = f" ({interval.low:.2f} to {interval.high:.2f})" if interval else ""
            cells.append("" if value is None else f"{value:.2f}{told}")
        if any(cells):
            rows.append((title, *cells))
    level = f"{100 * found.options.confidence:g} %"
    columns = (f"Percent ({level} interval)", *(pages.cell(name) for name, _ in found.answered))
    return pages.table(columns, rows)


def differences_table(differences: Sequence[PairedDifference]) -> str:
    """One model against another, metric by metric."""
    level = f"{100 * differences[0].confidence:g} % interval" if differences else "Interval"
    rows = [
        (
            SCORE_TITLES[each.metric],
            f"{each.difference:+.2f}",
            f"{each.interval.low:+.2f} to {each.interval.high:+.2f}",
            f"{each.better} / {each.worse}",
            "" if each.mcnemar_p is None else f"{each.mcnemar_p:.3g}",
            each.verdict,
        )
        for each in differences
    ]
    return pages.table(("Metric", "Difference", level, "Better / worse rows", "McNemar p", "It is"), rows)


def _computed(found: SideBySide) -> str:
    return pages.text(computed_with(found.answered[0][1].scores))


def _caveat(found: SideBySide) -> str:
    rows = min(evaluation.rows for _, evaluation in found.answered)
    several = " Each pair is compared by itself: of many comparisons some differ by chance." * (
        len(found.differences) > 1
    )
    few = f" {rows} rows are few for an interval." * (rows < FEW_ROWS)
    return (
        f"Intervals of {100 * found.options.confidence:g} % by a paired bootstrap over the rows that both answered; "
        f"McNemar's exact test where a row is right or wrong.{several}{few}"
    )


def judge_tables(found: SideBySide) -> str:
    """What the judge said, and what could not be read."""
    judge = found.judge
    if judge is None:
        return ""
    scored = [(each.name, each.judged) for each in found.outcomes if isinstance(each.judged, JudgedScores)]
    paired = [(each.name, each.judged) for each in found.outcomes if isinstance(each.judged, JudgedPairs)]
    about = f"{pages.text(judge.model)} at {pages.text(judge.address)}, temperature 0"
    parts = [about]
    if scored:
        columns = (
            "Candidate",
            f"Mean of 0 to {judge.maximum}",
            "Interval",
            "Median",
            "Deviation",
            "Rows",
            "Unparsable",
        )
        parts.append(pages.table((*columns, "Failed", "Distribution"), [_score_row(*each) for each in scored]))
    if paired:
        columns = ("Candidate", "Better", "Worse", "Equal", "of these by order alone", "Sign test p", "Unparsable")
        parts.append(pages.table((*columns, "Failed"), [_pair_row(*each) for each in paired]))
    return "\n\n".join([*parts, "The prompt:", _quoted(judge.prompt)])


def _quoted(text: str) -> str:
    return "\n".join(f"> {pages.text(line)}<br>" for line in text.strip().splitlines())


def _score_row(name: str, judged: JudgedScores) -> tuple[str, ...]:
    interval = f"{judged.interval.low:.2f} to {judged.interval.high:.2f}" if judged.interval else ""
    figures = ("" if value is None else f"{value:.2f}" for value in (judged.median, judged.deviation))
    distribution = ", ".join(f"{score}: {count}" for score, count in judged.distribution.items())
    mean = "" if judged.mean is None else f"{judged.mean:.2f}"
    counts = (str(count) for count in (judged.rows, judged.unparsable, judged.failed))
    return (pages.cell(name), mean, interval, *figures, *counts, distribution)


def _pair_row(name: str, judged: JudgedPairs) -> tuple[str, ...]:
    counts = (judged.wins, judged.losses, judged.ties, judged.by_order)
    p = "" if judged.p is None else f"{judged.p:.3g}"
    return (pages.cell(name), *map(str, counts), p, str(judged.unparsable), str(judged.failed))


def _word(said: Judgement | None) -> str:
    if said is None:
        return ""
    word = said.winner or said.score
    return "not judged" if word is None else f"judge: {word}"


def slices_table(found: SideBySide, column: str) -> str:
    """The metric of each candidate by the values of a column."""
    parts = {name: evaluation.scores.slices.get(column, {}) for name, evaluation in found.answered}
    values = list(dict.fromkeys(value for each in parts.values() for value in each))
    rows = []
    for value in values:
        told = [part.get(value) for part in parts.values()]
        cells = ["" if each is None else f"{getattr(each, found.metric):.2f} ({each.rows})" for each in told]
        rows.append((pages.cell(value), *cells))
    heading = f"{pages.cell(column)}: {SCORE_TITLES[found.metric]} (rows)"
    return pages.table((heading, *(pages.cell(name) for name in parts)), rows)


def _changed(found: SideBySide) -> str:
    from tasks.side_by_side import most_changed

    shown = most_changed(found, SHOWN_ROWS) if len(found.answered) > 1 else []
    if not shown:
        return ""
    title = SCORE_TITLES[found.metric]
    heading = f"## Rows that changed most\n\nBy {title}, the {len(shown)} most changed; all rows are in the table."
    return f"{heading}\n\n{rows_table(found, shown)}"


def rows_table(found: SideBySide, numbers: Iterable[int]) -> str:
    """Rows with what was wanted and what each candidate answered, with its figure and the judge's word."""
    answers = [
        {row["row"]: (row, scores) for row, scores in zip(each.predictions, each.row_scores, strict=True)}
        for _, each in found.answered
    ]
    said = [
        {each.row: each for each in outcome.judgements} for outcome in found.outcomes if outcome.evaluation is not None
    ]
    rows = []
    for number in numbers:
        known = next(each[number][0] for each in answers if number in each)
        cells = []
        for each, judged in zip(answers, said, strict=True):
            if number not in each:
                cells.append("(no answer)")
                continue
            row, scores = each[number]
            figure = getattr(scores, found.metric)
            told = ["" if figure is None else f"{figure:.0f} %", _word(judged.get(number))]
            cells.append(f"{pages.cell(row['prediction'])}<br>**{', '.join(filter(None, told))}**")
        rows.append((str(number), pages.cell(known["prompt"]), pages.cell(known["reference"]), *cells))
    return pages.table(("Row", "Prompt", "Expected", *(pages.cell(name) for name, _ in found.answered)), rows)
