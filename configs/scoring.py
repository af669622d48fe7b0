"""What scoring answers against references gives: the rule metrics, and what they were computed with."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

SCORE_TITLES = {
    "accuracy": "Exact accuracy",
    "f1": "F1",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bleu_4": "BLEU-4",
    "hit_limit": "Cut at the limit",
}
"""The figures one compares, in percent, and what they are called in tables."""


def _percent(description: str) -> float:
    """A metric's field: percent, 0 to 100."""
    value: float = Field(ge=0.0, le=100.0, description=f"{description} (%)")
    return value


class PredictionRow(BaseModel):
    """One line of a file to score. Other keys (a prompt, an id) may stand beside these two."""

    model_config = ConfigDict(strict=True, extra="ignore")

    prediction: str = Field(description="The model's answer; an empty one counts and scores 0.")
    reference: str = Field(min_length=1, description="The answer that was wanted.")


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


class RowScores(Metrics):
    """The metrics of one row."""

    row: int = Field(ge=1, description="Number of the row, from 1; in a file, its line.")
    empty_prediction: bool = Field(description="The answer had no token; every metric is 0.")


class Scores(Metrics):
    """The mean of each metric over all rows, empty answers included, and what it was computed with."""

    rows: int = Field(ge=1, description="Rows scored; the mean is over all of them.")
    empty_predictions: int = Field(ge=0, description="Rows whose answer was empty; they count as 0.")
    stop_words: int = Field(ge=0, description="Size of the stop-word list; 0 means none was used.")
    tokeniser: str = Field(description="What cut the text into tokens.")
    libraries: dict[str, str] = Field(description="Version of each library the metrics come from.")
