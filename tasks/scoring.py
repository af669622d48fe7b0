"""Scores answers against references: accuracy, F1, ROUGE-1/2/L and BLEU-4 in one pass.

All metrics are over the same tokens: jieba's, with its default dictionary, punctuation and whitespace kept.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import UserError
from configs.scoring import Metrics, PredictionRow, RowScores, Scores

LIBRARIES = ("jieba", "nltk", "rouge-chinese")
NO_STOP_WORDS: frozenset[str] = frozenset()


def score(pairs: Iterable[tuple[str, str]], stop_words: Collection[str] = NO_STOP_WORDS) -> Scores:
    """Mean metrics, in percent, over `(prediction, reference)` pairs; an empty prediction counts as 0.

    Tokens found in `stop_words` are left out of both sides before anything is computed, accuracy included.
    Raises UserError if there is no pair, or if a reference is empty or consists of stop words alone.
    """
    return summarise(score_rows(pairs, stop_words), stop_words)


def score_rows(
    pairs: Iterable[tuple[str, str]],
    stop_words: Collection[str] = NO_STOP_WORDS,
    *,
    source: Path | None = None,
) -> list[RowScores]:
    """The metrics of each `(prediction, reference)` pair, in order; `source` is the file errors are to name.

    Raises UserError for an empty reference (see `score`).
    """
    ignored = frozenset(stop_words)
    return [
        _score_row(row, prediction, reference, ignored, source)
        for row, (prediction, reference) in enumerate(pairs, start=1)
    ]


def summarise(rows: Sequence[RowScores], stop_words: Collection[str] = NO_STOP_WORDS) -> Scores:
    """The mean of each metric over `rows`. Raises UserError if there are none."""
    if not rows:
        raise UserError("there is nothing to score", expected="at least one prediction with its reference")
    # fsum rounds once, at the end, so that the mean does not depend on the order of the rows.
    means = {name: math.fsum(getattr(row, name) for row in rows) / len(rows) for name in Metrics.model_fields}
    libraries = {name: version(name) for name in LIBRARIES}
    return Scores(
        **means,
        rows=len(rows),
        empty_predictions=sum(row.empty_prediction for row in rows),
        stop_words=len(set(stop_words)),
        tokeniser=f"jieba {libraries['jieba']}, default dictionary, punctuation and whitespace kept",
        libraries=libraries,
    )


def score_file(path: Path, stop_words: Path | Collection[str] = NO_STOP_WORDS) -> Scores:
    """Mean metrics of a UTF-8 JSON Lines file of `{"prediction": …, "reference": …}` rows.

    `stop_words` is a list, or a file with one a line. Raises UserError naming file, line and field.
    """
    ignored = read_stop_words(stop_words) if isinstance(stop_words, Path) else stop_words
    rows = score_rows(read_pairs(path), ignored, source=path)
    if not rows:
        raise UserError("the file holds no rows", file=path, expected="one JSON object a line")
    return summarise(rows, ignored)


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The `(prediction, reference)` pairs of a JSON Lines file, one line in memory at a time.

    Raises UserError for anything that is not one JSON object a line with these two texts.
    """
    for line, text in _read_lines(path):
        if not text.strip():
            raise UserError("the line is blank", file=path, line=line, mend="remove the line")
        row = _parse_row(text, path, line)
        yield row.prediction, row.reference


def read_stop_words(path: Path) -> frozenset[str]:
    """The stop words of a UTF-8 text file, one a line; blank lines and surrounding whitespace are ignored.

    They are compared with whole tokens, case and all. Raises UserError if the file cannot be read or is bare.
    """
    words = frozenset(text.strip() for _, text in _read_lines(path)) - {""}
    if not words:
        raise UserError("the file holds no stop words", file=path, expected="one stop word a line")
    return words


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as lines:
            for line, data in enumerate(lines, start=1):
                yield line, _decode(data, path, line)
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}", file=path) from error


def _decode(data: bytes, path: Path, line: int) -> str:
    if line == 1 and data.startswith(b"\xef\xbb\xbf"):
        mend = "save it as UTF-8 without BOM"
        raise UserError("the file starts with a byte-order mark", file=path, line=line, mend=mend)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start + 1} of the line is not UTF-8",
            file=path,
            line=line,
            value=data[error.start],
            mend="save the file as UTF-8",
        ) from error


def _parse_row(text: str, path: Path, line: int) -> PredictionRow:
    try:
        value = json.loads(text, object_pairs_hook=_object_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is not valid JSON: {error}", file=path, line=line) from error
    try:
        return PredictionRow.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"the row is not a prediction with its reference: {first['msg'].lower()}",
            file=path,
            line=line,
            field=".".join(str(part) for part in first["loc"]) or None,
            value=first["input"] if first["type"] != "missing" else None,
            expected='{"prediction": "text", "reference": "text, not empty"}',
        ) from error


def _object_without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, count in Counter(name for name, _ in items).items() if count > 1]
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} stands twice in one object")
    return dict(items)


def _score_row(row: int, prediction: str, reference: str, stop_words: frozenset[str], source: Path | None) -> RowScores:
    wanted = _cut(reference, stop_words)
    if not "".join(wanted).strip():
        raise UserError(
            f"the reference of row {row} is empty" + (" once stop words are left out" * bool(stop_words)),
            file=source,
            line=row if source else None,
            field="reference",
            value=reference,
            expected="the answer that was wanted",
        )
    given = _cut(prediction, stop_words)
    # Blank answers stop here: rouge_chinese raises on them, and their whitespace would earn a share of F1.
    if not "".join(given).strip():
        return RowScores(row=row, empty_prediction=True, **dict.fromkeys(Metrics.model_fields, 0.0))
    return RowScores(row=row, empty_prediction=False, **_compare(given, wanted))


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
    return [token for token in _tokeniser().cut(text) if token not in stop_words]


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
