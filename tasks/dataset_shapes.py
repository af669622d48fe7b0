"""How the rows of a file are laid out: told, or recognised from the first of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from configs.datasets import KIND_OF_SHAPE, TEXT_COLUMNS, Columns, Kind, RequestedShape, Shape
from configs.errors import UserError
from tasks.dataset_fields import listing, nearest
from tasks.dataset_preferences import PROMPT_COLUMNS, RANKED_COLUMNS
from tasks.dataset_reading import ParsedRow, describe, parse_cell
from tasks.dataset_sources import Source, read_source
from tasks.dataset_tools import has_tools

SAMPLED_ROWS = 20
PLAIN_PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "response"),
    ("query", "response"),
)
IMAGE_COLUMNS = ("images", "image")
UNREAD_MEDIA = ("video", "videos", "audio", "audios")
_CAPTIONS = ("caption", "text")
_CAPTIONED = (*IMAGE_COLUMNS, "file_name", "image_path")
_ANCHORS = ("anchor", "query", "sentence")
_POSITIVES = ("positive", "pos")
_NEGATIVES = ("negative", "neg")
_SENTENCES = (("sentence1", "sentence2"), ("text1", "text2"))
_SCORES = ("score", "scores")
_LIKENESS = ("score", "similarity", "label")
_OF_OTHER_SHAPES = {
    *(name for pair in PLAIN_PAIRS for name in pair),
    *(name for pair in _SENTENCES for name in pair),
    *_ANCHORS,
    *_POSITIVES,
    *PROMPT_COLUMNS,
    *RANKED_COLUMNS,
    *("messages", "conversations", "role", "from", "output", "chosen", "rejected", "context", "target", "targets"),
    *("label", "labels", "标签"),
}
"""With one of these beside it, a text is more likely part of something else than a document."""
_LISTED = "turns"  # what the reader calls a line that is a list
_OWN_COLUMNS = Columns()
_ALPACA = Columns(prompt="instruction", completion="output")
_ACCEPTED = (
    "prompt/completion (or question/answer, instruction/response, query/response), messages, "
    "Alpaca (instruction, output), ShareGPT (conversations), Qianfan (prompt, response), Pangu (context, target), "
    "tool calls (messages or conversations with tools, xLAM's query/answers/tools, Glaive's system/chat), "
    "chosen/rejected, a prompt with answers and scores, anchor/positive with or without negative, "
    "sentence1/sentence2/score, an image with messages, with question and answer, or with a caption, "
    "or documents in a column text (or content)"
)

Object = dict[str, object]


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How the rows of a file are read.

    `names` are the columns each row must have, in the order in which the shape reads them. `columns` are those of
    prompt and completion, None for shapes that have columns of their own.
    `named`: the user named the columns, they were not recognised.
    """

    shape: Shape
    names: tuple[str, ...]
    columns: Columns = _OWN_COLUMNS
    named: bool = False

    @property
    def kind(self) -> Kind:
        """What its rows are stored as."""
        return KIND_OF_SHAPE[self.shape]


def choose_layout(source: Source, columns: Columns | None, shape: RequestedShape) -> RowLayout | None:
    """How to read the rows of a source: as told, else recognised from its first objects.

    Returns None if no row is an object. Raises UserError for video and audio, a shape that is not known or not
    clear, and columns given for a shape that has its own.
    """
    columns = columns or Columns()
    named = columns.prompt is not None or columns.completion is not None
    if shape == "text" and columns.completion and not columns.prompt:
        return RowLayout("text", (columns.completion,), columns, named=True)
    if named and shape not in ("auto", "prompt_completion", "image_question"):
        raise UserError(
            f"columns are named, but rows of the shape {shape} have columns of their own",
            file=source.name,
            mend="leave out the columns, or the shape",
        )
    whole = columns != _ALPACA or shape == "prompt_completion"
    if columns.prompt and columns.completion and whole and shape != "image_question":
        return _pair_layout(columns.prompt, columns.completion, named=True)
    rows = (item for item in read_source(source) if isinstance(item, ParsedRow))
    sample = list(itertools.islice(rows, SAMPLED_ROWS))
    if not sample:
        return None
    if not named:
        _refuse_unread_media(source, sample[0])
    layouts = [_candidates(item.value, columns, shape) for item in sample]
    for item, candidates in zip(sample, layouts, strict=True):
        if len(candidates) > 1:
            raise _ambiguous(source, item, candidates)
        if candidates:
            return _richest(candidates[0], layouts)
    document = None if named else _document(sample, shape)
    if document is not None:
        return document
    if shape != "auto" and shape in _FIXED:
        return RowLayout(shape, _fixed_names(shape, sample[0].value))
    raise _unrecognised(source, sample[0], columns, shape)


def candidates_of(row: Object) -> list[RowLayout]:
    """The layouts that a row by itself fits."""
    return _candidates(row, _OWN_COLUMNS, "auto")


def image_column(row: Object) -> str | None:
    """The column of the images of a row that has some."""
    return next((name for name in IMAGE_COLUMNS if row.get(name)), None)


def _candidates(row: Object, columns: Columns, shape: RequestedShape) -> list[RowLayout]:
    if columns.prompt or columns.completion:
        if shape == "image_question":
            return [found for pair in _half_named(row, columns) for found in _image_question(row, pair.columns)]
        return _half_named(row, columns)
    for finders in _FINDERS:
        found = [layout for finder in finders for layout in finder(row)]
        if shape != "auto":
            found = [layout for layout in found if layout.shape == shape]
        if found:
            return found
    return []


def _document(sample: Sequence[ParsedRow], shape: RequestedShape) -> RowLayout | None:
    """The layout of rows that are documents; None if they are not. Looked for last: a text beside others is extra."""
    if shape not in ("auto", "text"):
        return None
    for item in sample:
        column = _first(item.value, TEXT_COLUMNS)
        if column is not None and (shape == "text" or not _OF_OTHER_SHAPES & item.value.keys()):
            return RowLayout("text", (column,))
    return None


def _richest(chosen: RowLayout, layouts: Sequence[list[RowLayout]]) -> RowLayout:
    """Plain messages, unless at least every second row of the sample has images, or any row has tools.

    A row without tools is the same conversation among rows with tools, but not the other way round.
    """
    found = [candidates[0] for candidates in layouts if candidates]
    with_images = [layout for layout in found if layout.shape == "image_messages"]
    if chosen.shape in _WITH_TOOLS and 2 * len(with_images) >= len(layouts):
        return with_images[0]
    with_tools = [layout for layout in found if layout.shape == _WITH_TOOLS.get(chosen.shape)]
    return with_tools[0] if with_tools else chosen


_WITH_TOOLS: dict[Shape, Shape] = {"messages": "tool_messages", "sharegpt": "tool_sharegpt"}


# Finders: the layouts of one family that a row fits. The first family with one decides: a row that has chosen and
# rejected answers, or an image, is no plain conversation, whatever else it has.


def _listed_turns(row: Object) -> list[RowLayout]:
    if _LISTED not in row:
        return []
    last = set(_names_of(row))
    return [RowLayout(shape, (_LISTED,)) for shape, keys in _TURNS.items() if last >= keys][:1]


_TURNS: dict[Shape, set[str]] = {
    "qianfan_preference": {"chosen", "rejected"},
    "qianfan_ranking": {"prompt", "response", "score"},
    "qianfan": {"prompt", "response"},
    "pangu_ranking": {"context", "targets"},
    "pangu": {"context", "target"},
}


def _preferences(row: Object) -> list[RowLayout]:
    if not {"chosen", "rejected"} <= row.keys():
        return []
    if "user" in row and not any(name in row for name in PROMPT_COLUMNS):
        return [RowLayout("qianfan_preference", ("user", "chosen", "rejected"))]
    return [RowLayout("preference", ("chosen", "rejected"))]


def _rankings(row: Object) -> list[RowLayout]:
    found = []
    prompt, answers, scores = (_first(row, names) for names in (PROMPT_COLUMNS, RANKED_COLUMNS, _SCORES))
    if prompt and answers and scores:
        found.append(RowLayout("ranking", (prompt, answers, scores)))
    if {"prompt", "response", "score"} <= row.keys() and isinstance(parse_cell(row["score"]), list):
        found.append(RowLayout("qianfan_ranking", ("prompt", "response", "score")))
    if {"context", "targets"} <= row.keys():
        found.append(RowLayout("pangu_ranking", ("context", "targets")))
    return found


def _images(row: Object) -> list[RowLayout]:
    captioned, caption = (_first(row, names) for names in (_CAPTIONED, _CAPTIONS))
    image = image_column(row)
    if image is None:
        return [RowLayout("image_caption", (captioned, caption))] if captioned and caption else []
    if {"images", "qa"} <= row.keys():
        return [RowLayout("image_deepextension", ("images", "qa"))]
    conversation = _first(row, ("messages", "conversations"))
    if conversation:
        return [RowLayout("image_messages", (image, conversation))]
    pairs = [Columns(prompt=one, completion=other) for one, other in PLAIN_PAIRS if {one, other} <= row.keys()]
    found = [layout for columns in pairs for layout in _image_question(row, columns)]
    return found or ([RowLayout("image_caption", (image, caption))] if caption else [])


def _image_question(row: Object, columns: Columns) -> list[RowLayout]:
    image = image_column(row)
    if image is None or columns.prompt is None or columns.completion is None:
        return []
    return [RowLayout("image_question", (image, columns.prompt, columns.completion), columns)]


def _pairs_of_texts(row: Object) -> list[RowLayout]:
    found = []
    anchor, positive, negative = (_first(row, names) for names in (_ANCHORS, _POSITIVES, _NEGATIVES))
    if anchor and positive:
        found.append(
            RowLayout("triplet", (anchor, positive, negative)) if negative else RowLayout("pair", (anchor, positive))
        )
    likeness = _first(row, _LIKENESS)
    for one, other in _SENTENCES:
        if {one, other} <= row.keys() and likeness:
            found.append(RowLayout("scored_pair", (one, other, likeness)))
    return found


def _conversations(row: Object) -> list[RowLayout]:
    found = [_pair_layout(one, other) for one, other in PLAIN_PAIRS if {one, other} <= row.keys()]
    if row.keys() >= {"instruction", "output"}:
        found.append(RowLayout("alpaca", _FIXED["alpaca"]))
    if "messages" in row:
        shape: Shape = "tool_messages" if has_tools(row, "messages") else "messages"
        found.append(RowLayout(shape, ("messages",)))
    if "conversations" in row:
        shape = "tool_sharegpt" if has_tools(row, "conversations") else "sharegpt"
        found.append(RowLayout(shape, ("conversations",)))
    found += [RowLayout(shape, _FIXED[shape]) for shape in _TOOL_ROWS if row.keys() >= set(_FIXED[shape])]
    if row.keys() >= {"prompt", "response"}:
        found.append(RowLayout("qianfan", ("prompt", "response")))
    if row.keys() >= {"context", "target"}:
        found.append(RowLayout("pangu", ("context", "target")))
    return found


_FINDERS: tuple[tuple[Callable[[Object], list[RowLayout]], ...], ...] = (
    (_listed_turns,),
    (_preferences, _rankings),
    (_images,),
    (_pairs_of_texts, _conversations),
)

_TOOL_ROWS: tuple[Shape, ...] = ("tool_xlam", "tool_glaive")

# Shapes whose columns have one name each; told to read one, it is read even if the first rows do not fit.
_FIXED: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "qianfan": ("prompt", "response"),
    "pangu": ("context", "target"),
    "tool_messages": ("messages",),
    "tool_sharegpt": ("conversations",),
    "tool_xlam": ("query", "answers", "tools"),
    "tool_glaive": ("system", "chat"),
    "preference": ("chosen", "rejected"),
    "qianfan_preference": ("user", "chosen", "rejected"),
    "qianfan_ranking": ("prompt", "response", "score"),
    "pangu_ranking": ("context", "targets"),
    "image_deepextension": ("images", "qa"),
}


def _fixed_names(shape: Shape, row: Object) -> tuple[str, ...]:
    return (_LISTED,) if _LISTED in row and shape in _TURNS else _FIXED[shape]


def _first(row: Object, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _pair_layout(prompt: str, completion: str, *, named: bool = False) -> RowLayout:
    columns = Columns(prompt=prompt, completion=completion)
    return RowLayout("prompt_completion", (prompt, completion), columns, named)


def _half_named(row: Object, columns: Columns) -> list[RowLayout]:
    """Layouts for columns of which one, or Alpaca's two, are named; the other goes by its usual names."""
    if columns == _ALPACA:
        if not {"instruction", "output"} <= row.keys():
            return []
        # As prompt and completion, the `input` of an Alpaca row would not reach the model.
        whole = "input" in row
        return [RowLayout("alpaca", _FIXED["alpaca"]) if whole else _pair_layout("instruction", "output", named=True)]
    prompts = [columns.prompt] if columns.prompt else [prompt for prompt, _ in PLAIN_PAIRS]
    answers = [columns.completion] if columns.completion else [answer for _, answer in PLAIN_PAIRS]
    return [
        _pair_layout(prompt, answer, named=True)
        for prompt in prompts
        for answer in dict.fromkeys(answers)
        if prompt in row and answer in row and prompt != answer
    ]


def _refuse_unread_media(source: Source, item: ParsedRow) -> None:
    media = next((name for name in UNREAD_MEDIA if item.value.get(name)), None)
    if media is not None:
        raise UserError(
            f"this is data with {media}; of media, images alone are read",
            file=source.name,
            line=item.line,
            field=media,
            expected="rows of text, or of text and images",
            mend=f"remove the column {media}",
        )


def _ambiguous(source: Source, item: ParsedRow, candidates: list[RowLayout]) -> UserError:
    shapes = ", ".join(f"{layout.shape} ({'/'.join(layout.names)})" for layout in candidates)
    return UserError(
        f"the rows can be read in more than one way: {shapes}",
        file=source.name,
        line=item.line,
        field=", ".join(dict.fromkeys(name for layout in candidates for name in layout.names)),
        expected="one clear shape",
        mend="name the prompt and the completion column, or the shape",
    )


def _names_of(row: Object) -> list[str]:
    """The columns of a row; for a line that is a list of turns, the keys of its last one."""
    turns = row.get(_LISTED)
    last = turns[-1] if isinstance(turns, list) and turns and len(row) == 1 else None
    return list(last if isinstance(last, dict) else row)


def _unrecognised(source: Source, item: ParsedRow, columns: Columns, shape: RequestedShape) -> UserError:
    there = _names_of(item.value)
    wanted = [name for name in (columns.prompt, columns.completion) if name is not None]
    missing = [name for name in wanted if name not in item.value]
    problem = f"the shape of the rows is not recognised; their columns are: {listing(there)}"
    expected, mend = _ACCEPTED, "name the column of the prompt and the column of the completion"
    if missing:
        problem = f"there is no column {missing[0]!r}{nearest(missing[0], there)}; there are: {listing(there)}"
    elif wanted:
        problem = f"only the column {wanted[0]!r} is named, and the other is not clear among: {listing(there)}"
    elif shape == "auto" and _first(item.value, TEXT_COLUMNS):
        mend = f"{mend}, or set the shape to text if each row is a document"
    elif shape != "auto":
        problem = f"the first rows do not have the columns of the shape {shape}; theirs are: {listing(there)}"
        expected = f"rows of the shape {shape}"
        mend = "leave out the shape, or rename the columns"
    elif (image := image_column(item.value)) is not None:
        problem = f"the rows have {image} ({describe(item.value[image])}), but no text that is read: {listing(there)}"
    return UserError(
        problem,
        file=source.name,
        line=item.line,
        field=missing[0] if missing else listing(there, 5),
        expected=expected,
        mend=mend,
    )
