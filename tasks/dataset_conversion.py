"""What a row means: it becomes what a version stores, or a Problem that says why not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from configs.datasets import KIND_TITLES, Columns, Kind, Problem, RequestedShape, Shape
from tasks import dataset_conversations as conversations
from tasks import dataset_preferences as preferences
from tasks import dataset_tool_rows as tool_rows
from tasks import dataset_vision as vision
from tasks.dataset_fields import RowRefusedError, Turn, encoded, filled, listing, nearest, number
from tasks.dataset_images import ImageFolder
from tasks.dataset_reading import ParsedRow, describe, excerpt
from tasks.dataset_rows import Body
from tasks.dataset_shapes import UNREAD_MEDIA, RowLayout, candidates_of, choose_layout, image_column
from tasks.dataset_sources import Source, read_source
from tasks.dataset_tools import TOOL_COLUMNS, describes_tools

MAX_EXTRA_CHARACTERS = 256

Object = dict[str, object]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is stored: `body` is of its kind, see `configs.datasets`.

    `content` is what makes it the same as another: its body alone, without line and extra columns.
    """

    kind: Kind
    body: Body
    line: int | None
    row: int
    place: int
    extra: Object
    dropped: tuple[str, ...]
    columns: tuple[str, ...]
    stored: bytes
    content: bytes


def read_rows(
    source: Source, images: ImageFolder, columns: Columns | None = None, shape: RequestedShape = "auto"
) -> Iterator[Row | Problem]:
    """The rows of a source in order: each a Row, or the Problem in its place.

    Streamed: memory does not grow with the file. Raises UserError where the file as a whole cannot be used.
    """
    yield from convert_rows(source, choose_layout(source, columns, shape), images)


def convert_rows(source: Source, layout: RowLayout | None, images: ImageFolder) -> Iterator[Row | Problem]:
    """`read_rows` for a layout that `choose_layout` returned for this source; None: no row of it is an object."""
    for item in read_source(source):
        if isinstance(item, Problem):
            yield item
        elif layout is not None:
            yield convert_row(item, layout, images)


def convert_row(parsed: ParsedRow, layout: RowLayout, images: ImageFolder) -> Row | Problem:
    """Turn one object into what is stored, or say what is wrong with it."""
    try:
        return _convert(parsed, layout, images)
    except RowRefusedError as refusal:
        return refusal.problem.model_copy(update={"line": parsed.line, "row": parsed.row})


def _convert(parsed: ParsedRow, layout: RowLayout, images: ImageFolder) -> Row:
    row = parsed.value
    _require_columns(row, layout)
    made = _Made(row, layout.names, layout.shape, images, [])
    body = _MAKERS[layout.shape](made)
    extra = {name: value for name, value in row.items() if name not in {*layout.names, *made.also_used(layout)}}
    kept = {name: value for name, value in extra.items() if _is_small_scalar(value)}
    dropped = [*made.dropped, *(name for name in extra if name not in kept)]
    stored, content = _encode(body, parsed, kept, layout)
    return Row(
        layout.kind, body, parsed.line, parsed.row, parsed.place, kept, tuple(dropped), tuple(row), stored, content
    )


class _Made(NamedTuple):
    """What a maker makes the body of a row of; it adds the keys that it does not read to `dropped`."""

    row: Object
    names: tuple[str, ...]
    shape: Shape
    images: ImageFolder
    dropped: list[str]

    def also_used(self, layout: RowLayout) -> set[str]:
        """The columns beside `names` that the shape reads where they are there."""
        if layout.shape in ("preference", "ranking"):
            column = layout.names[0] if layout.shape == "ranking" else preferences.prompt_column(self.row)
            tools = TOOL_COLUMNS if layout.shape == "preference" and describes_tools(self.row) else ()
            alpaca = ("input", "history") if column == "instruction" else ()
            return {"system", *([column] if column else []), *alpaca, *tools}
        return _ALSO_USED.get(layout.shape, set())


_ALSO_USED: dict[Shape, set[str]] = {
    "alpaca": {"input", "system", "history"},
    "messages": {"system"},
    "sharegpt": {"system"},
    "tool_messages": {"system", *TOOL_COLUMNS},
    "tool_sharegpt": {"system", *TOOL_COLUMNS},
    "tool_xlam": {"system", *TOOL_COLUMNS},
    "tool_glaive": set(TOOL_COLUMNS),
    "qianfan": {"system"},
    "pangu": {"system"},
    "qianfan_preference": {"system"},
    "qianfan_ranking": {"system"},
    "pangu_ranking": {"system"},
    "image_question": {"system"},
    "image_messages": {"system"},
}


def _chat(turns: list[Turn]) -> Body:
    conversations.require_answered(turns)
    return {"messages": conversations.messages_of(turns)}


def _listed_conversation(made: _Made) -> Body:
    turns = conversations.system_turns(made.row)
    column = made.names[0]
    return _chat([*turns, *conversations.conversation(made.row[column], column, made.shape, made.dropped)])


def _texts(made: _Made) -> Body:
    names = ("anchor", "positive", "negative")
    found = zip(names, made.names, strict=False)
    return {name: filled(_only(made.row[column]), column, column) for name, column in found}


def _only(value: object) -> object:
    """The text of a list of one, as some write positives and negatives."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _scored_texts(made: _Made) -> Body:
    one, other, score = made.names
    return {
        "sentence1": filled(made.row[one], one, one),
        "sentence2": filled(made.row[other], other, other),
        "score": number(made.row[score], score),
    }


_MAKERS: dict[Shape, Callable[[_Made], dict[str, Any]]] = {
    "prompt_completion": lambda made: _chat(conversations.pair_turns(made.row, *made.names)),
    "alpaca": lambda made: _chat(conversations.alpaca_turns(made.row)),
    "messages": _listed_conversation,
    "sharegpt": _listed_conversation,
    "qianfan": lambda made: _chat(conversations.qianfan_turns(made.row, made.dropped)),
    "pangu": lambda made: _chat(conversations.pangu_turns(made.row, made.dropped)),
    "tool_messages": lambda made: conversations.tool_body(made.row, made.names[0], made.shape, made.dropped),
    "tool_sharegpt": lambda made: conversations.tool_body(made.row, made.names[0], made.shape, made.dropped),
    "tool_xlam": lambda made: tool_rows.xlam_body(made.row, made.dropped),
    "tool_glaive": lambda made: tool_rows.glaive_body(made.row, made.dropped),
    "preference": lambda made: preferences.preference_body(made.row, made.dropped),
    "qianfan_preference": lambda made: preferences.qianfan_preference_body(made.row),
    "ranking": lambda made: preferences.ranking_body(made.row, made.names, made.dropped),
    "qianfan_ranking": lambda made: preferences.qianfan_ranking_body(made.row),
    "pangu_ranking": lambda made: preferences.pangu_ranking_body(made.row),
    "pair": _texts,
    "triplet": _texts,
    "scored_pair": _scored_texts,
    "image_question": lambda made: vision.image_question_body(made.row, made.names, made.images),
    "image_messages": lambda made: vision.image_messages_body(made.row, made.names, made.images, made.dropped),
    "image_deepextension": lambda made: vision.deepextension_body(made.row, made.images),
    "image_caption": lambda made: vision.caption_body(made.row, made.names, made.images),
    "text": lambda made: {"text": filled(made.row[made.names[0]], made.names[0], "text")},
}


# Rows that do not fit the file


def _require_columns(row: Object, layout: RowLayout) -> None:
    if not layout.named:
        # Whoever named the columns has said what the others are not.
        _refuse_other_kinds(row, layout)
    missing = [name for name in layout.names if name not in row]
    if not missing:
        return
    others = [] if layout.named else candidates_of(row)
    if others:
        raise RowRefusedError(
            "other_shape",
            f"the row has the shape {others[0].shape} ({', '.join(others[0].names)}), "
            f"the file's first rows {layout.shape} ({', '.join(layout.names)})",
            field=missing[0],
            found=f"the columns {listing(list(row))}",
            expected=f"the columns {', '.join(layout.names)}",
            mend="put rows of different shapes into files of their own",
        )
    there = list(row)
    raise RowRefusedError(
        "missing_column",
        f"the row has no column {missing[0]!r}{nearest(missing[0], there)}; its columns: {listing(there)}",
        field=missing[0],
        found=f"the columns {listing(there)}",
        expected=f"the columns {', '.join(layout.names)}",
        mend="add the column to the row, or name the right one",
    )


_WITHOUT_IMAGES: tuple[Kind, ...] = ("chat", "chat_tools", "preference", "ranking", "text")


def _refuse_other_kinds(row: Object, layout: RowLayout) -> None:
    """Refuse a row whose answers or images would be left out in silence, read as the file's first rows are."""
    if layout.kind in ("chat", "chat_tools", "vision") and {"chosen", "rejected"} <= row.keys():
        raise RowRefusedError(
            "preference_pairs",
            f"the row is a preference pair, the file's first rows are {KIND_TITLES[layout.kind]}",
            field="chosen, rejected",
            found="a chosen and a rejected answer",
            expected="rows with one answer each",
            mend="put rows of different shapes into files of their own",
        )
    if layout.kind != "chat_tools" and layout.shape != "preference" and describes_tools(row):
        _refuse_tools(row, layout)
    media = next((name for name in UNREAD_MEDIA if row.get(name)), None)
    if media is None and layout.kind not in ("vision", "caption"):
        media = image_column(row) if layout.kind in _WITHOUT_IMAGES else None
    if media is not None:
        raise RowRefusedError(
            "vision_language",
            f"the row is vision-language data (it has {media}), the file's first rows are {KIND_TITLES[layout.kind]}",
            field=media,
            found=describe(row[media]),
            expected=f"rows of {KIND_TITLES[layout.kind]}",
            mend=f"put it into a file of its own, or remove the column {media}",
        )


def _refuse_tools(row: Object, layout: RowLayout) -> None:
    column = next(name for name in TOOL_COLUMNS if row.get(name))
    by_shape = {"messages": "tool_messages", "sharegpt": "tool_sharegpt"}.get(layout.shape)
    raise RowRefusedError(
        "tools",
        f"the row describes tools, which rows of the shape {layout.shape} have no place for",
        field=column,
        found=describe(row[column]),
        expected=f"rows of {KIND_TITLES[layout.kind]} without tools",
        mend=f"read all rows as {by_shape} by --shape" if by_shape else "write the row as messages with tools",
    )


# What is stored


def _is_small_scalar(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_EXTRA_CHARACTERS
    if isinstance(value, float):
        return math.isfinite(value)  # 1e999 is JSON and reads as infinity, which is not
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None


def _encode(body: Body, parsed: ParsedRow, extra: Object, layout: RowLayout) -> tuple[bytes, bytes]:
    """The row as stored, and its body alone, both UTF-8 JSON."""
    try:
        "".join(parsed.value).encode()
        content = encoded(body)
        beside = b',"extra":%b' % encoded(extra) if extra else b""
        return b'%b,"line":%d%b}\n' % (content[:-1], parsed.place, beside), content
    except UnicodeEncodeError as error:
        found = excerpt(error.object[error.start : error.end])
        raise RowRefusedError(
            "broken_text",
            f"the row holds half of a surrogate pair ({found}), which is no character",
            field=layout.names[0],
            found=found,
            expected="whole characters",
            mend="write the character itself, or both halves of its pair",
        ) from None
