"""Scores answers against references: accuracy, F1, ROUGE-1/2/L, BLEU-4, edit distance and JSON in one pass.

The rule metrics are over the same tokens: jieba's, with its default dictionary, punctuation and whitespace kept.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.scoring import (
    DEFAULT_CONFIDENCE,
    RULE_METRICS,
    Interval,
    Metrics,
    RowScores,
    Scores,
    ScoringOptions,
    TextChecks,
)
from configs.train import TrainConfig
from tasks.statistics import mean_intervals
from tasks.text_checks import check_texts

LIBRARIES = ("jieba", "nltk", "rouge-chinese")
NO_STOP_WORDS: frozenset[str] = frozenset()
MOST_SLICES = 200
_OF_SOME_ROWS = (
    ("json_valid", "json_exact", "json_fields"),
    ("tool_call_valid", "tool_name_accuracy", "tool_arguments_accuracy"),
    ("tool_false_call",),
)
"""Figures that only some rows have, those that the same rows have together."""


def scoring_options(config: TrainConfig) -> ScoringOptions:
    """How the answers of a train's models are scored."""
    by = [column.strip() for column in (config.evaluation_by or "").split(",")]
    return ScoringOptions(stop_words=config.stop_words, by=tuple(filter(None, by)))


def score(pairs: Iterable[tuple[str, str]], stop_words: Collection[str] = NO_STOP_WORDS) -> Scores:
    """Mean metrics, in percent, over `(prediction, reference)` pairs; an empty prediction counts as 0.

    Tokens found in `stop_words` are left out of both sides before anything is computed from tokens, accuracy
    included. Raises UserError if there is no pair, or if a reference is empty or consists of stop words alone.
    """
    return summarise(score_rows(pairs, stop_words), stop_words)


def score_rows(
    pairs: Iterable[tuple[str, str]],
    stop_words: Collection[str] = NO_STOP_WORDS,
    *,
    source: Path | None = None,
    lines: Sequence[int | None] | None = None,
) -> list[RowScores]:
    """The metrics of each `(prediction, reference)` pair, in order.

    `source` is the file that errors are to name, `lines` the lines of the pairs in it. Raises UserError for an empty
    reference (see `score`).
    """
    ignored = frozenset(stop_words)
    scored = []
    for row, (prediction, reference) in enumerate(pairs, start=1):
        try:
            scored.append(_score_row(row, prediction, reference, ignored))
        except _BlankReferenceError:
            raise UserError(
                f"the reference of row {row} is empty" + (" once stop words are left out" * bool(ignored)),
                file=source,
                line=lines[row - 1] if lines is not None else None,
                field="reference",
                value=reference,
                expected="the answer that was wanted",
            ) from None
    return scored


def summarise(
    rows: Sequence[RowScores],
    stop_words: Collection[str] = NO_STOP_WORDS,
    *,
    confidence: float = DEFAULT_CONFIDENCE,
    by: Mapping[str, Sequence[str]] | None = None,
) -> Scores:
    """The mean of each metric over `rows`, with its interval; the same for the rows with each value of the columns.

    `by` holds the values of each column, one a row. Raises UserError if there are no rows, or if a column has more
    than `MOST_SLICES` different values.
    """
    overall = _mean_scores(rows, stop_words, confidence)
    slices = {
        column: {value: _mean_scores(part, stop_words, confidence) for value, part in _parts(rows, column, values)}
        for column, values in (by or {}).items()
    }
    return overall.model_copy(update={"slices": slices})


def computed_with(scores: Scores) -> str:
    """The tokeniser, the libraries with their versions, and the stop words, in one sentence."""
    libraries = ", ".join(f"{name} {version}" for name, version in scores.libraries.items())
    words = f"{scores.stop_words} stop words left out" if scores.stop_words else "no stop words left out"
    return f"tokens by {scores.tokeniser}; {libraries}; {words}"


def _parts(rows: Sequence[RowScores], column: str, values: Sequence[str]) -> list[tuple[str, list[RowScores]]]:
    """The rows with each value of a column; the value that most rows have first."""
    parts: dict[str, list[RowScores]] = {}
    for row, value in zip(rows, values, strict=True):
        parts.setdefault(value, []).append(row)
    if len(parts) > MOST_SLICES:
        raise UserError(
            f"the column has {len(parts)} different values in {len(rows)} rows",
            field="by",
            value=column,
            expected=f"a column of at most {MOST_SLICES} different values, such as a language or a task",
        )
    return sorted(parts.items(), key=lambda item: -len(item[1]))


def _mean_scores(rows: Sequence[RowScores], stop_words: Collection[str], confidence: float) -> Scores:
    if not rows:
        raise UserError("there is nothing to score", expected="at least one prediction with its reference")
    of_some = {name for names in _OF_SOME_ROWS for name in names}
    means, intervals = _means(rows, [name for name in RULE_METRICS if name not in of_some], confidence)
    for names in _OF_SOME_ROWS:
        if having := [row for row in rows if getattr(row, names[0]) is not None]:
            some_means, some_intervals = _means(having, names, confidence)
            means, intervals = means | some_means, intervals | some_intervals
    libraries = {name: version(name) for name in LIBRARIES}
    return Scores.model_validate(
        {
            **means,
            "rows": len(rows),
            "empty_predictions": sum(row.empty_prediction for row in rows),
            "json_rows": sum(row.json_valid is not None for row in rows),
            "tool_rows": sum(row.calls_tool is not None for row in rows),
            "calls_expected": sum(row.tool_call_valid is not None for row in rows),
            "calls_made": sum(bool(row.calls_tool) for row in rows),
            "stop_words": len(set(stop_words)),
            "tokeniser": f"jieba {libraries['jieba']}, default dictionary, punctuation and whitespace kept",
            "libraries": libraries,
            "confidence": confidence,
            "intervals": intervals,
        }
    )


def _means(
    rows: Sequence[RowScores], names: Sequence[str], confidence: float
) -> tuple[dict[str, float], dict[str, Interval]]:
    columns = {name: [float(getattr(row, name)) for row in rows] for name in names}
    # fsum rounds once, at the end, so that the mean does not depend on the order of the rows.
    means = {name: math.fsum(values) / len(rows) for name, values in columns.items()}
    return means, mean_intervals(columns, confidence)


class _BlankReferenceError(Exception):
    """There is nothing to compare an answer with."""


def _score_row(row: int, prediction: str, reference: str, stop_words: frozenset[str]) -> RowScores:
    wanted = _cut(reference, stop_words)
    if not "".join(wanted).strip():
        raise _BlankReferenceError
    given = _cut(prediction, stop_words)
    checks = TextChecks.model_validate(check_texts(prediction, reference)).model_dump()
    # Blank answers stop here: rouge_chinese raises on them, and their whitespace would earn a share of F1.
    if not "".join(given).strip():
        nothing = dict.fromkeys(Metrics.model_fields, 0.0)
        return RowScores.model_validate({"row": row, "empty_prediction": True, **nothing, **checks})
    return RowScores.model_validate({"row": row, "empty_prediction": False, **_compare(given, wanted), **checks})


def _compare(given: list[str], wanted: list[str]) -> dict[str, float]:
    """Every metric, in percent, of two non-blank lists of tokens."""
    rouge = _rouge(given, wanted)
    shares = {
        "accuracy": float("".join(given).strip() == "".join(wanted).strip()),
        "contains": float(_visible(wanted) <= _visible(given)),
        "f1": _token_f1(given, wanted),
        **{name: _f_measure(precision, recall) for name, (precision, recall) in rouge.items()},
        **{f"{name}_recall": recall for name, (_, recall) in rouge.items()},
        "bleu_4": _bleu_4(given, wanted),
    }
    return {name: 100.0 * share for name, share in shares.items()}


def _visible(tokens: list[str]) -> Counter[str]:
    return Counter(token for token in tokens if token.strip())


def _token_f1(given: list[str], wanted: list[str]) -> float:
    shared = (Counter(given) & Counter(wanted)).total()
    return _f_measure(shared / len(given), shared / len(wanted))


def _f_measure(precision: float, recall: float) -> float:
    # rouge_chinese adds 1e-8 below the line, which leaves identical texts just short of 1; hence our own.
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _rouge(given: list[str], wanted: list[str]) -> dict[str, tuple[float, float]]:
    """`(precision, recall)`, 0 to 1, of ROUGE-1, ROUGE-2 and ROUGE-L."""
    rouge = _rouge_chinese()
    given_text, wanted_text = " ".join(given), " ".join(wanted)
    [found] = rouge.get_scores(given_text, wanted_text)
    given_words, wanted_words = _rouge_words(given_text), _rouge_words(wanted_text)
    common = longest_common_subsequence(given_words, wanted_words)
    return {
        "rouge_1": (found["rouge-1"]["p"], found["rouge-1"]["r"]),
        "rouge_2": (found["rouge-2"]["p"], found["rouge-2"]["r"]),
        "rouge_l": (common / len(given_words), common / len(wanted_words)),
    }


def _rouge_words(text: str) -> list[str]:
    """The words rouge_chinese counts in blank-joined tokens: it breaks them at sentence ends and new lines.

    An empty line between two paragraphs becomes one empty word. It counts, here as there: the platform whose
    figures these metrics reproduce counts it too.
    """
    sentences = [sentence for sentence in _rouge_chinese().cut_sent(text) if sentence]
    return [word for sentence in sentences for word in " ".join(sentence.split()).split(" ")]


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two lists of words.

    One integer of `len(first)` bits is the state, a word of `second` one update of it. rouge_chinese fills a
    dictionary of len(first) × len(second) entries instead: gigabytes for two answers of some thousand words.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(first)) - 1
    # A zero bit at place i says: taking first[i] in makes the common subsequence one longer.
    state = every
    for word in second:
        matched = state & places.get(word, 0)
        state = ((state + matched) | (state - matched)) & every
    return len(first) - state.bit_count()


def _bleu_4(given: list[str], wanted: list[str]) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    # Without smoothing nltk gives about 1e-231, with a warning, when a single order has no match.
    return float(sentence_bleu([wanted], given, smoothing_function=SmoothingFunction().method3))


def _cut(text: str, stop_words: frozenset[str]) -> list[str]:
    tokens = list(_tokeniser().cut(text))
    if not stop_words:
        return tokens
    kept: list[str] = []
    left_out = False
    for token in tokens:
        if token in stop_words:
            left_out = True
            continue
        # Of the blanks on both sides of a word that is left out one is left: `on the light` is `on light` then.
        if not (left_out and token.isspace() and (not kept or kept[-1].isspace())):
            kept.append(token)
        left_out = False
    return kept


@cache
def _tokeniser() -> Any:
    with warnings.catch_warnings():
        # Compiling jieba warns of its string escapes, and of pkg_resources where that is installed.
        warnings.simplefilter("ignore")
        import jieba

    # Loaded by hand (half a second): left to itself jieba logs to standard error and caches the dictionary in
    # the shared temporary folder, as a marshal file that it then trusts whoever wrote it. A tokeniser of our
    # own also stays as it is when somebody adds words to jieba's.
    tokeniser = jieba.Tokenizer()
    tokeniser.FREQ, tokeniser.total = tokeniser.gen_pfdict(tokeniser.get_dict_file())
    tokeniser.initialized = True
    return tokeniser


@cache
def _rouge_chinese() -> Any:
    with warnings.catch_warnings():
        # As with jieba: string escapes.
        warnings.simplefilter("ignore")
        from rouge_chinese import Rouge

    return Rouge(metrics=["rouge-1", "rouge-2"])
