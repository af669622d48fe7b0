"""Pairs of answers, one better than the other, made ready for a trainer, with a count of what was kept and cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from methods.contract import Refused
from methods.toolkit.chat import (
    IGNORED,
    Message,
    Rendered,
    RenderError,
    Tools,
    has_thought,
    render_conversation,
    render_prompt,
)
from methods.toolkit.tokenizing import (
    Conversation,
    Limits,
    RowReport,
    excess_of,
    note,
    read_rows,
    shorten_question,
    way_out,
)

Ranking = Literal["best", "all"]
"""Which pairs a ranked row gives: the best answer with each worse one, or each answer with each worse one."""


@dataclass(frozen=True)
class Pair:
    """What follows a prompt in a better and in a worse way; `gap` is how far their scores differ, None without."""

    line: int
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    gap: float | None = None
    tools: Tools = None

    @property
    def thinking(self) -> bool:
        """Whether an answer of the pair holds a thought: both follow one prompt, so it decides for both."""
        said = (*self.chosen, *self.rejected)
        return any(has_thought(message) for message in said if message["role"] == "assistant")


@dataclass
class PairReport(RowReport):
    """What became of the pairs; `read` counts rows, the other counts are of the pairs made of them."""

    pairs: int = 0
    joined: int = 0
    without_difference: int = 0

    @property
    def lost(self) -> int:
        return self.pairs - self.kept

    def in_words(self) -> str:
        return (
            f"{self.kept} of {self.pairs} pairs of {self.read} rows, {self.tokens} tokens, "
            f"{self.supervised_share:.1%} of them in answers, {self.joined} as a later turn, longest row {self.longest}"
        )


def read_pairs(path: Path, limit: int, ranking: Ranking = "best") -> Iterator[Pair]:
    """Yield the pairs of stored rows, preferences or rankings; of at most `limit` rows, -1 for all."""
    for row in read_rows(path, limit):
        yield from _pairs(row, ranking)


def read_conversations(path: Path, limit: int) -> Iterator[Conversation]:
    """Yield the conversations with their best answers of at most `limit` rows, -1 for all."""
    for row in read_rows(path, limit):
        best = _pairs(row, "best")[0]
        yield Conversation(best.line, [*best.prompt, *best.chosen], best.tools)


def pair_tokeniser(
    ranking: Ranking = "best", joined_share: float = 0.0, seed: int = 0
) -> Callable[[Any, Path, Limits, int], tuple[Any, PairReport]]:
    """What `chat_rows.prepare_rows` makes datasets of pairs with.

    Their columns: `prompt_ids`, `chosen_ids` and `rejected_ids` (what follows the prompt), `chosen_trained` and
    `rejected_trained` (1 for a token of an answer, 0 for one of a later question), `length` (of the longer one, with
    its prompt), `gap` (0 without scores) and `row`. `joined_share` of the pairs are made a later turn of another row.
    """

    def tokenise(tokenizer: Any, path: Path, limits: Limits, max_samples: int) -> tuple[Any, PairReport]:
        from datasets import Dataset

        groups = [_pairs(row, ranking) for row in read_rows(path, max_samples)]
        report = PairReport(read=len(groups), pairs=sum(map(len, groups)))
        random = Random(seed)  # noqa: S311 - not a secret
        rows: list[dict[str, Any]] = []
        for number, pair in ((number, pair) for number, group in enumerate(groups) for pair in group):
            longer = _after(_other(groups, number, random), pair) if random.random() < joined_share else pair
            if longer is not pair and _fits(tokenizer, longer, limits):
                pair, report.joined = longer, report.joined + 1
            sides = _render(tokenizer, pair, limits, report)
            if sides is None:
                continue
            report.kept += 1
            report.tokens += sum(len(side.input_ids) for side in sides)
            report.supervised_tokens += sum(side.supervised for side in sides)
            report.longest = max(report.longest, *(len(side.input_ids) for side in sides))
            rows.append({**_columns(*sides), "gap": pair.gap or 0.0, "row": number})
        _require_pairs(report, limits)
        return Dataset.from_list(rows), report

    return tokenise


def _other(groups: list[list[Pair]], number: int, random: Random) -> Pair | None:
    """The first pair of another row than this one; None if there is no other."""
    if len(groups) == 1:
        return None
    drawn = random.randrange(len(groups) - 1)
    return groups[drawn + (drawn >= number)][0]


def _after(first: Pair | None, second: Pair) -> Pair:
    """The second pair with the question and better answer of the first one, if any, as turns before its own."""
    if first is None:
        return second
    rules = [message for message in second.prompt if message["role"] == "system"]
    turns = [message for message in first.prompt if message["role"] != "system"]
    own = [message for message in second.prompt if message["role"] != "system"]
    return replace(second, prompt=[*rules, *turns, *first.chosen, *own])


def _fits(tokenizer: Any, pair: Pair, limits: Limits) -> bool:
    try:
        return _excess(_sides(tokenizer, pair, pair.prompt), limits) is None
    except RenderError:
        return False


def _pairs(row: dict[str, Any], ranking: Ranking) -> list[Pair]:
    if "chosen" in row:
        return [Pair(row["line"], row["prompt"], row["chosen"], row["rejected"], tools=row.get("tools"))]
    ranked = sorted(zip(row["scores"], row["answers"], strict=True), key=lambda each: -each[0])
    betters = ranked[:1] if ranking == "best" else ranked
    return [
        Pair(row["line"], row["prompt"], _said(better), _said(worse), gap=score - lower)
        for score, better in betters
        for lower, worse in ranked
        if lower < score
    ]


def _said(answer: str) -> list[Message]:
    return [{"role": "assistant", "content": answer}]


def _render(tokenizer: Any, pair: Pair, limits: Limits, report: PairReport) -> tuple[Rendered, Rendered] | None:
    try:
        sides = _sides(tokenizer, pair, pair.prompt)
    except RenderError as error:
        report.not_renderable += 1
        note(report, f"line {pair.line}: {error}")
        return None
    excess = _excess(sides, limits)
    if excess:
        if limits.over_length == "error":
            raise Refused(f"line {pair.line}: {excess}. Raise the limit, or set over_length to drop or truncate.")
        if limits.over_length == "drop":
            report.dropped_over_length += 1
            note(report, f"line {pair.line} dropped: {excess}")
            return None
        full = sum(len(side.input_ids) for side in sides)
        sides = _truncate(tokenizer, pair, sides, limits)
        if left := _excess(sides, limits):
            report.dropped_over_length += 1
            note(report, f"line {pair.line} dropped: {left} even without its question")
            return None
        report.truncated += 1
        report.tokens_cut += full - sum(len(side.input_ids) for side in sides)
        note(report, f"line {pair.line} cut: {excess}")
    if not all(side.supervised for side in sides):
        report.without_supervised_token += 1
        note(report, f"line {pair.line} left out: no token of an answer is left to train on")
        return None
    if sides[0].input_ids == sides[1].input_ids:
        report.without_difference += 1
        note(report, f"line {pair.line} left out: both answers are the same in tokens")
        return None
    return sides


def _sides(tokenizer: Any, pair: Pair, prompt: list[Message]) -> tuple[Rendered, Rendered]:
    """Both conversations as tokens; everything after the first header of an answer counts as answer."""
    setting = getattr(tokenizer, "thinking", "auto")
    thinking = pair.thinking if setting == "auto" else setting == "on"
    before = len(render_prompt(tokenizer, prompt, pair.tools, thinking))
    chosen, rejected = (
        render_conversation(tokenizer, [*prompt, *side], len(prompt), pair.tools, thinking)
        for side in (pair.chosen, pair.rejected)
    )
    return (
        Rendered(chosen.input_ids, chosen.labels, before),
        Rendered(rejected.input_ids, rejected.labels, before),
    )


def _excess(sides: tuple[Rendered, Rendered], limits: Limits) -> str | None:
    return excess_of(sides[0], limits) or excess_of(sides[1], limits)


def _truncate(
    tokenizer: Any, pair: Pair, sides: tuple[Rendered, Rendered], limits: Limits
) -> tuple[Rendered, Rendered]:
    """Cut the last question, the same for both sides, then each answer, until both fit."""
    prompt_length = sides[0].prompt_length
    answer_length = max(len(side.input_ids) - prompt_length for side in sides)
    answer_room = min(answer_length, limits.answer or answer_length, limits.sequence)
    prompt_room = min(limits.prompt or limits.sequence, limits.sequence - min(answer_room, limits.sequence // 2))
    if prompt_length > prompt_room:
        prompt = shorten_question(tokenizer, [*pair.prompt, pair.chosen[0]], prompt_room, pair.tools)[:-1]
        sides = _sides(tokenizer, pair, prompt)
    end = min(limits.sequence, sides[0].prompt_length + answer_room)
    chosen, rejected = (
        Rendered(side.input_ids[:end], side.labels[:end], min(side.prompt_length, end)) for side in sides
    )
    return chosen, rejected


def _columns(chosen: Rendered, rejected: Rendered) -> dict[str, Any]:
    """A pair as one row; the prompt ends where an answer begins, or where the two sides begin to differ."""
    shared = min(_first_trained(chosen), _first_trained(rejected))
    same = next(
        (i for i in range(shared) if chosen.input_ids[i] != rejected.input_ids[i]),
        shared,
    )
    return {
        "prompt_ids": chosen.input_ids[:same],
        "chosen_ids": chosen.input_ids[same:],
        "rejected_ids": rejected.input_ids[same:],
        "chosen_trained": [int(label != IGNORED) for label in chosen.labels[same:]],
        "rejected_trained": [int(label != IGNORED) for label in rejected.labels[same:]],
        "length": max(len(chosen.input_ids), len(rejected.input_ids)),
    }


def _first_trained(side: Rendered) -> int:
    return next(i for i, label in enumerate(side.labels) if label != IGNORED)


def _require_pairs(report: PairReport, limits: Limits) -> None:
    if report.kept:
        return
    reasons = "; ".join(report.notes[:3]) or "the dataset has no rows"
    raise Refused(
        f"nothing to train on: of {report.pairs} pairs {report.dropped_over_length} are over a length limit, "
        f"{report.without_supervised_token} have no answer token left, {report.without_difference} no difference left, "
        f"{report.not_renderable} cannot be rendered ({reasons}). {way_out(report, limits)}"
    )
