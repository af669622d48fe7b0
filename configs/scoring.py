"""What scoring answers against references gives: the rule metrics, and what they were computed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

SCORE_TITLES = {
    "accuracy": "Exact accuracy",
    "contains": "Contains the reference",
    "f1": "F1",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "rouge_1_recall": "ROUGE-1 recall",
    "rouge_2_recall": "ROUGE-2 recall",
    "rouge_l_recall": "ROUGE-L recall",
    "bleu_4": "BLEU-4",
    "edit_distance": "Edit distance (less is better)",
    "json_valid": "JSON: valid",
    "json_exact": "JSON: equal",
    "json_fields": "JSON: fields right",
    "tool_call_valid": "Tool call: valid",
    "tool_name_accuracy": "Tool call: right name",
    "tool_arguments_accuracy": "Tool call: right arguments",
    "tool_false_call": "Tool call: unwanted (less is better)",
    "hit_limit": "Cut at the limit",
}
"""The figures one compares, in percent, and what they are called in tables."""


def are_scores_of_answers(figures: Mapping[str, float]) -> bool:
    """Whether these are the scores of answers against references; else they are figures of a method's own."""
    return bool(figures) and all(name in SCORE_TITLES or name == "perplexity" for name in figures)


def figure_title(name: str) -> str:
    """What a figure of a method's own is called in tables."""
    return f"{name} (%)" if name in SCORE_TITLES else name


LOWER_IS_BETTER = frozenset(
    {"edit_distance", "hit_limit", "perplexity", "bits_per_character", "bits_per_byte", "tool_false_call"}
)
"""Of all other figures more is better."""

STOP_WORD_LISTS = ("zh", "en")
"""The stop-word lists that ship, by language."""

DEFAULT_CONFIDENCE = 0.95

Percent = Annotated[float, Field(ge=0.0, le=100.0)]


def _percent(description: str) -> float:
    """A metric's field: percent, 0 to 100."""
    value: float = Field(ge=0.0, le=100.0, description=f"{description} (%)")
    return value


class Interval(NamedTuple):
    """Both ends of a confidence interval, in the unit of the figure."""

    low: float
    high: float


class Metrics(BaseModel):
    """The rule metrics of one row, or their mean over rows. Percent, not rounded.

    On an answer identical to its reference each is 100, except where the answer is too short to hold the
    n-grams: ROUGE-2 is 0 on one token, and BLEU-4 is 35.36, 59.46 and 84.09 on one, two and three tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: float = _percent("Answers equal to the reference, surrounding whitespace aside")
    contains: float = _percent("Answers that hold every token of the reference, as often as it does")
    f1: float = _percent("Harmonic mean of precision and recall over tokens, repeated ones counted")
    rouge_1: float = _percent("ROUGE-1 F-measure: distinct tokens in common")
    rouge_2: float = _percent("ROUGE-2 F-measure: distinct pairs of neighbouring tokens in common")
    rouge_l: float = _percent("ROUGE-L F-measure: longest common subsequence of tokens")
    rouge_1_recall: float = _percent("ROUGE-1 recall")
    rouge_2_recall: float = _percent("ROUGE-2 recall")
    rouge_l_recall: float = _percent("ROUGE-L recall")
    bleu_4: float = _percent("Sentence BLEU over 1- to 4-grams, equal weights, brevity penalty, smoothing 3")


class TextChecks(BaseModel):
    """What is measured on the texts as they are, stop words and all. Percent, not rounded.

    The JSON figures are there where the reference is a JSON object or list.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    edit_distance: float = _percent("Characters to insert, delete or replace, of the longer text; less is better")
    json_valid: Percent | None = Field(default=None, description="The whole answer is a JSON object or list (%)")
    json_exact: Percent | None = Field(default=None, description="The same JSON value; order and layout aside (%)")
    json_fields: Percent | None = Field(default=None, description="Fields of the reference with the same value (%)")


class ToolChecks(BaseModel):
    """What is measured on the tool calls of an answer. Percent, not rounded.

    The first three are there where the reference calls tools, the last where a row with tools wants none called.
    Several calls are compared without regard to their order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool_call_valid: Percent | None = Field(
        default=None, description="Calls that can be read, of tools of the row, with arguments that fit its schema (%)"
    )
    tool_name_accuracy: Percent | None = Field(default=None, description="The tools that the reference calls (%)")
    tool_arguments_accuracy: Percent | None = Field(
        default=None, description="The same calls, with arguments of the same JSON value (%)"
    )
    tool_false_call: Percent | None = Field(default=None, description="A call where the reference makes none (%)")


class RowScores(ToolChecks, TextChecks, Metrics):
    """The metrics of one row."""

    row: int = Field(ge=1, description="Number of the row, from 1.")
    empty_prediction: bool = Field(description="The answer had no token; every metric is 0.")
    calls_tool: bool | None = Field(default=None, description="Whether the answer calls a tool; None: no tools.")


class Scores(ToolChecks, TextChecks, Metrics):
    """The mean of each metric over all rows, empty answers included, and what it was computed with."""

    rows: int = Field(ge=1, description="Rows scored; the mean is over all of them.")
    empty_predictions: int = Field(ge=0, description="Rows whose answer was empty; they count as 0.")
    json_rows: int = Field(default=0, ge=0, description="Rows whose reference is JSON; the JSON figures are of them.")
    tool_rows: int = Field(default=0, ge=0, description="Rows with tools; the figures of tool calls are of them.")
    calls_expected: int = Field(default=0, ge=0, description="Rows whose reference calls a tool.")
    calls_made: int = Field(default=0, ge=0, description="Rows with tools whose answer calls one, readable or not.")
    stop_words: int = Field(ge=0, description="Size of the stop-word list; 0 means none was used.")
    tokeniser: str = Field(description="What cut the text into tokens.")
    libraries: dict[str, str] = Field(description="Version of each library the metrics come from.")
    confidence: float = Field(default=DEFAULT_CONFIDENCE, gt=0, lt=1, description="Level of the intervals.")
    intervals: dict[str, Interval] = Field(
        default_factory=dict, description="Bootstrap interval of each mean, by metric; none for a single row."
    )
    slices: dict[str, dict[str, Scores]] = Field(
        default_factory=dict, description="The same for the rows with each value of a column: by column, by value."
    )


RULE_METRICS = (*Metrics.model_fields, *TextChecks.model_fields, *ToolChecks.model_fields)
"""The names of the figures that every row has, in the order of tables."""


class ScoringOptions(BaseModel):
    """How answers are scored, besides the answers themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stop_words: str | None = Field(
        default=None, min_length=1, description="zh, en, both as zh,en, or a file with one a line; None: none."
    )
    by: tuple[str, ...] = Field(default=(), description="Columns whose values are scored apart as well.")
    confidence: float = Field(default=DEFAULT_CONFIDENCE, gt=0, lt=1, description="Level of the intervals.")


class PairedDifference(BaseModel):
    """One metric of two models on the same rows. Percent and points; a difference is second - first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    rows: int
    first: float = Field(description="Mean of the first model.")
    second: float
    difference: float
    interval: Interval = Field(description="Of the difference, by a paired bootstrap over the rows.")
    confidence: float
    better: int = Field(description="Rows on which the second is better.")
    worse: int
    mcnemar_p: float | None = Field(
        default=None, description="Exact McNemar test; for metrics that are right or wrong on each row."
    )

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `not told apart`: the second against the first, by the interval."""
        low, high = self.interval
        if low <= 0 <= high:
            return "not told apart"
        return "better" if (low > 0) is (self.metric not in LOWER_IS_BETTER) else "worse"
