"""Makes the training rows: tokenised once, limited in length, counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from methods.contract import Refused
from methods.toolkit.chat import (
    Message,
    Rendered,
    RenderError,
    RewrittenError,
    Tools,
    answers_of,
    has_thought,
    render_conversation,
    render_prompt,
)


@dataclass
class Limits:
    """Length limits in tokens; None means no limit of its own."""

    sequence: int
    prompt: int | None
    answer: int | None
    over_length: str


@dataclass(frozen=True)
class Turns:
    """Which answers of a conversation are trained.

    `train_on`: all of them, or the last. `rewritten`: where the template rewrites earlier turns, so that no single row
    holds every answer behind its own prompt, a row for each answer (all), or one for the last.
    """

    train_on: Literal["all", "last"] = "all"
    rewritten: Literal["all", "last"] = "all"

    @classmethod
    def of_job(cls, parameters: dict[str, Any]) -> Turns:
        """What the job's parameters say; a method without them trains on all answers."""
        return cls(parameters.get("train_on", "all"), parameters.get("turns", "all"))


@dataclass
class RowReport:
    """What became of the rows, in numbers, for the preflight and the record.

    A conversation that the template rewrites becomes several rows: `split` counts such conversations, `added` the rows
    that came to those read. `answers_untrained` counts answers that are only read (weight 0, or not the last),
    `thoughts_left_out` the conversations whose thoughts are not trained.
    """

    read: int = 0
    split: int = 0
    added: int = 0
    answers_untrained: int = 0
    thoughts_left_out: int = 0
    kept: int = 0
    dropped_over_length: int = 0
    truncated: int = 0
    without_supervised_token: int = 0
    not_renderable: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    tokens_cut: int = 0
    longest: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def supervised_share(self) -> float:
        """Share of the kept tokens that the loss is taken on (0..1)."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    @property
    def lost(self) -> int:
        """How many were left out."""
        return self.read + self.added - self.kept

    def in_words(self) -> str:
        """The counts in one line of the log."""
        parts = [
            f"{self.kept} of {self.read + self.added} rows",
            f"{self.tokens} tokens, {self.supervised_share:.1%} of them trained",
            f"longest row {self.longest}",
        ]
        if self.split:
            parts.append(f"{self.split} conversations became a row for each answer (the template rewrites turns)")
        if self.answers_untrained:
            parts.append(f"{self.answers_untrained} answers read only")
        if self.thoughts_left_out:
            parts.append(f"thoughts of {self.thoughts_left_out} rows left out")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """All counts and the supervised share."""
        return {**asdict(self), "supervised_share": self.supervised_share}


def read_rows(path: Path, limit: int) -> Iterator[dict[str, Any]]:
    """Yield the stored rows of a dataset; at most `limit`, -1 for all."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file):
            if number == limit:
                return
            yield json.loads(line)


class Conversation(NamedTuple):
    """A stored conversation: its line in the source file, its messages, and the tools that it may call."""

    line: int
    messages: list[Message]
    tools: Tools = None


def read_conversations(path: Path, limit: int) -> Iterator[Conversation]:
    """Yield the conversations of a stored dataset; of at most `limit` rows, -1 for all."""
    return (Conversation(row["line"], row["messages"], row.get("tools")) for row in read_rows(path, limit))


def read_messages(path: Path, limit: int) -> Iterator[tuple[int, list[Message]]]:
    """Yield (line in the source file, messages) of a stored dataset; at most `limit` rows, -1 for all."""
    return ((row["line"], row["messages"]) for row in read_rows(path, limit))


def tokenise(
    tokenizer: Any, path: Path, limits: Limits, max_samples: int, turns: Turns | None = None
) -> tuple[Any, RowReport]:
    """Tokenise a stored dataset.

    Returns a `datasets.Dataset` with columns `input_ids`, `labels` and `length`, and what was kept and cut.
    Raises Refused as `tokenise_rows`.
    """
    from datasets import Dataset

    rows, report = tokenise_rows(tokenizer, path, limits, max_samples, turns)
    return Dataset.from_list(rows), report


def tokenise_rows(
    tokenizer: Any, path: Path, limits: Limits, max_samples: int, turns: Turns | None = None
) -> tuple[list[dict[str, Any]], RowReport]:
    """The same as plain rows, for engines that have no `datasets`.

    Raises Refused if a row is over a limit and `over_length` is `error`, or if no row is left to train on.
    """
    report = RowReport()
    rows: list[dict[str, Any]] = []
    for row in read_rows(path, max_samples):
        for talk in talks(tokenizer, row, turns or Turns(), report):
            rendered = admit(talk.render, row["line"], limits, report, shorten=partial(_truncate, talk, limits))
            if rendered is not None:
                kept = {"input_ids": rendered.input_ids, "labels": rendered.labels}
                rows.append({**kept, "length": len(rendered.input_ids)})
    require_training_tokens(report, limits)
    return rows, report


@dataclass(frozen=True)
class Talk:
    """A conversation that becomes one row: its answers from `start` on are trained."""

    tokenizer: Any
    messages: list[Message]
    start: int
    tools: Tools
    rendered: Rendered | None = None

    def render(self) -> Rendered:
        """The row. Raises RenderError."""
        return self.rendered or render_conversation(self.tokenizer, self.messages, self.start, self.tools)


def talks(tokenizer: Any, row: dict[str, Any], turns: Turns, report: RowReport) -> list[Talk]:
    """The rows that a stored conversation becomes; counts what of it is not trained."""
    messages, tools = row["messages"], row.get("tools")
    answers = answers_of(messages)
    start = answers[-1] if answers and turns.train_on == "last" else 0
    whole = Talk(tokenizer, messages, start, tools)
    trained = answers_of(messages, start)
    report.answers_untrained += sum(message["role"] == "assistant" for message in messages) - len(trained)
    if getattr(tokenizer, "thinking", "auto") == "off":
        report.thoughts_left_out += any(has_thought(messages[position]) for position in trained)
    if len(trained) < 2:
        return [whole]
    try:
        return [replace(whole, rendered=whole.render())]
    except RewrittenError:
        kept = trained if turns.rewritten == "all" else trained[-1:]
        report.split += 1
        report.added += len(kept) - 1
        report.read -= len(kept) - 1  # `admit` counts each of them as read
        report.answers_untrained += len(trained) - len(kept)
        return [Talk(tokenizer, messages[: position + 1], position, tools) for position in kept]
    except RenderError:
        return [whole]  # `admit` counts it, with its line


def admit(
    render: Callable[[], Rendered],
    line: int,
    limits: Limits,
    report: RowReport,
    *,
    shorten: Callable[[Rendered], Rendered] | None = None,
) -> Rendered | None:
    """Render a row and keep it, shortened where it is too long and may be; None for one that is left out, counted.

    Without `shorten` a row that is too long is left out instead. Raises Refused for one if `over_length` is `error`.
    """
    report.read += 1
    rendered = _within_limits(render, line, limits, report, shorten)
    if rendered is None:
        return None
    if rendered.supervised == 0:
        report.without_supervised_token += 1
        note(report, f"line {line} left out: no token of an answer is left to train on")
        return None
    report.kept += 1
    report.tokens += len(rendered.input_ids)
    report.supervised_tokens += rendered.supervised
    report.longest = max(report.longest, len(rendered.input_ids))
    return rendered


def _within_limits(
    render: Callable[[], Rendered],
    line: int,
    limits: Limits,
    report: RowReport,
    shorten: Callable[[Rendered], Rendered] | None,
) -> Rendered | None:
    try:
        rendered = render()
    except RenderError as error:
        report.not_renderable += 1
        note(report, f"line {line}: {error}")
        return None
    excess = excess_of(rendered, limits)
    if excess:
        if limits.over_length == "error":
            raise Refused(f"line {line}: {excess}. Raise the limit, or set over_length to drop or truncate.")
        if limits.over_length == "drop" or shorten is None:
            report.dropped_over_length += 1
            note(report, f"line {line} dropped: {excess}")
            return None
        full = len(rendered.input_ids)
        rendered = shorten(rendered)
        if left := excess_of(rendered, limits):
            report.dropped_over_length += 1
            note(report, f"line {line} dropped: {left} even without its question")
            return None
        report.truncated += 1
        report.tokens_cut += full - len(rendered.input_ids)
        note(report, f"line {line} cut: {excess}")
    return rendered


def excess_of(rendered: Rendered, limits: Limits) -> str | None:
    """Which limit the conversation is over, in words; None if it fits."""
    total, prompt = len(rendered.input_ids), rendered.prompt_length
    if total > limits.sequence:
        return f"{total} tokens, max_seq_length is {limits.sequence}"
    if limits.prompt is not None and prompt > limits.prompt:
        return f"{prompt} tokens before the last answer, max_input_length is {limits.prompt}"
    if limits.answer is not None and total - prompt > limits.answer:
        return f"{total - prompt} tokens in the last answer, max_content_length is {limits.answer}"
    return None


def _truncate(talk: Talk, limits: Limits, rendered: Rendered) -> Rendered:
    """Cut the last user message, then the last answer, until the row fits.

    The text of the message is cut and rendered anew, so that the template's own tokens stay whole; a cut answer
    loses its end token too, or the model would learn to stop in mid-sentence.
    """
    answer_length = len(rendered.input_ids) - rendered.prompt_length
    answer_room = min(answer_length, limits.answer or answer_length, limits.sequence)
    prompt_room = min(limits.prompt or limits.sequence, limits.sequence - min(answer_room, limits.sequence // 2))
    if rendered.prompt_length > prompt_room:
        messages = shorten_question(talk.tokenizer, talk.messages, prompt_room, talk.tools)
        rendered = replace(talk, messages=messages, rendered=None).render()
    end = min(limits.sequence, rendered.prompt_length + answer_room)
    return Rendered(rendered.input_ids[:end], rendered.labels[:end], min(rendered.prompt_length, end))


def shorten_question(tokenizer: Any, messages: list[Message], room: int, tools: Tools = None) -> list[Message]:
    """Cut the last user message until the prompt (all but the last message) has `room` tokens at most, if it can."""
    position = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if position is None:
        return messages
    ids = tokenizer(messages[position]["content"], add_special_tokens=False)["input_ids"]
    keep = len(ids)
    while keep > 0:
        shorter = {"role": "user", "content": tokenizer.decode(ids[:keep], skip_special_tokens=False)}
        candidate = [*messages[:position], shorter, *messages[position + 1 :]]
        excess = len(render_prompt(tokenizer, candidate[:-1], tools)) - room
        if excess <= 0:
            return candidate
        keep -= max(1, excess)
    return [*messages[:position], {"role": "user", "content": ""}, *messages[position + 1 :]]


def note(report: RowReport, text: str, most: int = 10) -> None:
    """Keep what became of a row, of the first rows only."""
    if len(report.notes) < most:
        report.notes.append(text)


def way_out(report: RowReport, limits: Limits) -> str:
    """What helps where no row is left: a longer limit if rows are over one, else other rows or another template."""
    if report.dropped_over_length or report.without_supervised_token:
        return f"Raise max_seq_length (now {limits.sequence}) or look at the dataset report."
    return "Look at the dataset report (`tuneline datasets check FILE --model MODEL`), or take another base model."


def require_training_tokens(report: RowReport, limits: Limits) -> None:
    """Raise Refused with the reasons if no token is left to train on."""
    if report.supervised_tokens:
        return
    reasons = "; ".join(report.notes[:3]) or "the dataset has no rows"
    raise Refused(
        f"nothing to train on: of {report.read} rows {report.dropped_over_length} are over a length limit, "
        f"{report.without_supervised_token} have no answer token left, {report.not_renderable} cannot be rendered "
        f"({reasons}). {way_out(report, limits)}"
    )
