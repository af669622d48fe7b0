"""What Tuneline knows of a dataset: how it is laid out, what a check of it found, and its stored versions."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict

from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

FileFormat = Literal["jsonl", "json", "csv", "xlsx", "parquet", "images", "txt", "txt_files"]
DIGEST_CHARACTERS = 12
IMAGES_FOLDER = "images"  # beside the rows that show them

# How a file lays its rows out.
Shape = Literal[
    "prompt_completion",
    "messages",
    "alpaca",
    "sharegpt",
    "qianfan",
    "pangu",
    "tool_messages",
    "tool_sharegpt",
    "tool_xlam",
    "tool_glaive",
    "preference",
    "qianfan_preference",
    "ranking",
    "qianfan_ranking",
    "pangu_ranking",
    "pair",
    "triplet",
    "scored_pair",
    "image_question",
    "image_messages",
    "image_deepextension",
    "image_caption",
    "text",
]
RequestedShape = Literal["auto", Shape]

# What stored rows hold, whatever the shape of the file they came from. A method says which it trains on.
Kind = Literal[
    "chat", "chat_tools", "preference", "ranking", "pair", "triplet", "scored_pair", "vision", "caption", "text"
]

KIND_OF_SHAPE: dict[Shape, Kind] = {
    "prompt_completion": "chat",
    "messages": "chat",
    "alpaca": "chat",
    "sharegpt": "chat",
    "qianfan": "chat",
    "pangu": "chat",
    "tool_messages": "chat_tools",
    "tool_sharegpt": "chat_tools",
    "tool_xlam": "chat_tools",
    "tool_glaive": "chat_tools",
    "preference": "preference",
    "qianfan_preference": "preference",
    "ranking": "ranking",
    "qianfan_ranking": "ranking",
    "pangu_ranking": "ranking",
    "pair": "pair",
    "triplet": "triplet",
    "scored_pair": "scored_pair",
    "image_question": "vision",
    "image_messages": "vision",
    "image_deepextension": "vision",
    "image_caption": "caption",
    "text": "text",
}

KIND_TITLES: dict[Kind, str] = {
    "chat": "conversations",
    "chat_tools": "conversations with tool calls",
    "preference": "preference pairs",
    "ranking": "ranked answers",
    "pair": "pairs of texts",
    "triplet": "triplets of texts",
    "scored_pair": "scored pairs of texts",
    "vision": "vision-language data",
    "caption": "captioned images",
    "text": "plain texts",
}

TEXT_COLUMNS = ("text", "content", "文本", "内容")
"""The columns that a document is looked for in, the first one there."""

# What a method of a type trains on unless its manifest says otherwise (`datasets`).
KINDS_OF_TYPE: dict[str, tuple[Kind, ...]] = {
    "chat": ("chat",),
    "embedding": ("pair", "triplet", "scored_pair"),
    "vision-language": ("vision",),
    "image-generation": ("caption",),
}


class Wanted(NamedTuple):
    """Who asks for a dataset, such as a method, and the kinds of rows that it can take."""

    by: str
    kinds: tuple[Kind, ...]


class Message(TypedDict):
    """One turn of a conversation of text.

    An answer may have its thought, and the weight 0 where it is only read, never trained.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning_content: NotRequired[str]
    weight: NotRequired[Literal[0]]


class StoredRow(TypedDict):
    """What a row of every kind has, besides the fields of its kind."""

    line: int  # of the file it came from; its row where one line holds several, or where a file has no lines
    extra: NotRequired[dict[str, str | int | float | bool | None]]


class ChatRow(StoredRow):
    """Kind `chat`: the last message is the answer."""

    messages: list[Message]


class ToolChatRow(StoredRow):
    """Kind `chat_tools`: messages as OpenAI's interface has them, with `tool_calls` and the role `tool`.

    The arguments of a call are an object, not JSON text; `tools` are function schemas, `{"type": "function", …}`.
    """

    messages: list[dict[str, object]]
    tools: NotRequired[list[dict[str, object]]]


class PreferenceRow(StoredRow):
    """Kind `preference`: `chosen` and `rejected` are the messages that follow `prompt`; they may call `tools`."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: NotRequired[list[dict[str, object]]]


class RankingRow(StoredRow):
    """Kind `ranking`: two or more answers, each with its score; higher is better."""

    prompt: list[Message]
    answers: list[str]
    scores: list[float]


class PairRow(StoredRow):
    """Kind `pair`: two texts that belong together."""

    anchor: str
    positive: str


class TripletRow(PairRow):
    """Kind `triplet`: `negative` does not belong to `anchor`."""

    negative: str


class ScoredPairRow(StoredRow):
    """Kind `scored_pair`: two texts and how alike they are."""

    sentence1: str
    sentence2: str
    score: float


class VisionMessage(TypedDict):
    """A turn; `content` is a list of `{"type": "text", "text": …}` and `{"type": "image"}`, each the next image."""

    role: Literal["system", "user", "assistant"]
    content: list[dict[str, str]]


class VisionRow(StoredRow):
    """Kind `vision`: `images` are paths from the folder of the rows, in the order that the messages show them."""

    messages: list[VisionMessage]
    images: list[str]


class CaptionRow(StoredRow):
    """Kind `caption`: an image, by its path from the folder of the rows, and the text that describes it."""

    image: str
    caption: str


class TextRow(StoredRow):
    """Kind `text`: a document as it is, without a question or an answer."""

    text: str


class Columns(BaseModel):
    """The columns that hold the prompt and the answer; None means: recognise it by its usual names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = Field(default=None, min_length=1, description="Column of what is asked.")
    completion: str | None = Field(default=None, min_length=1, description="Column of what is answered.")

    @model_validator(mode="after")
    def _differ(self) -> Columns:
        if self.prompt is not None and self.prompt == self.completion:
            raise ValueError(f"prompt and completion both name the column {self.prompt!r}")
        return self


class Problem(BaseModel):
    """One offender. `refused`: the row is left out. `fatal`: so is the unread rest of the file."""

    model_config = ConfigDict(frozen=True)

    kind: str = Field(description="What is wrong, as one word: problems are counted by it.")
    level: Literal["warning", "refused", "fatal"] = "refused"
    line: int | None = Field(default=None, description="Line of the file, from 1.")
    row: int | None = Field(default=None, description="Row of the file, from 1; blank lines are not rows.")
    field: str | None = Field(default=None, description="Column, or place in it: messages[2].role.")
    found: str | None = None
    expected: str | None = None
    message: str = Field(description="The whole problem in one sentence.")
    mend: str | None = None
    count: int = Field(default=1, description="How many of this kind the whole file holds.")


class LengthStatistics(BaseModel):
    """Distribution of a length over the kept rows. Percentiles are by nearest rank."""

    min: int
    mean: float
    p50: int
    p95: int
    max: int


class Bin(BaseModel):
    """A bar of a histogram: how many rows are at most this long, and longer than the bar before."""

    upto: int
    rows: int


class FieldStatistics(BaseModel):
    """Characters of one field over the kept rows."""

    characters: LengthStatistics
    histogram: list[Bin] = Field(description="By powers of two.")


class ExamplePart(BaseModel):
    """A text of an example row; long ones are cut, and then `characters` is more than the text has."""

    label: str
    text: str
    characters: int
    trained: bool = Field(description="What a method for this kind learns to say, or to prefer.")


class Example(BaseModel):
    """A kept row as it will be read by a training method."""

    line: int
    parts: list[ExamplePart]


class RenderedPart(BaseModel):
    """A piece of a rendered prompt; long ones are cut, and then `characters` is more than the text has."""

    text: str
    characters: int
    trained: bool


class Rendered(BaseModel):
    """What the model's template makes of a row, or of one of its answers."""

    line: int
    label: str = Field(description="Which of the row's answers or texts this is; empty where there is one.")
    tokens: int
    parts: list[RenderedPart]


class TokenReport(BaseModel):
    """What a base model's tokenizer and template make of the rows, as training will read them."""

    model: str
    rows: int = Field(description="Rows that were rendered: all, or a sample of a large dataset.")
    of_rows: int = Field(description="Kept rows of the dataset.")
    not_renderable: dict[str, int] = Field(description="Rows that the template refuses, by its reason.")
    tokens: LengthStatistics | None = Field(description="Tokens of a rendering; a row with two answers has two.")
    trained_tokens: LengthStatistics | None
    histogram: list[Bin] = Field(description="Tokens of a rendering, in bins of equal width.")
    examples: list[Rendered] = Field(description="The first rows.")


class Overlap(BaseModel):
    """What rows have in common with another dataset, such as that of the evaluation."""

    dataset: str
    rows: int = Field(description="Kept rows of this dataset that the other one has too.")
    prompts: int = Field(description="Kept rows whose prompt the other one has, whatever the answer.")
    lines: list[int] = Field(description="The first of them.")


class DatasetReport(BaseModel):
    """What reading a whole file found."""

    file: str
    format: FileFormat
    shape: Shape | None = Field(description="None when no row is an object.")
    columns: Columns = Field(description="Of prompt and completion, as named or recognised.")
    notes: list[str] = Field(description="About the file as a whole: byte-order mark, misleading extension.")
    size_bytes: int
    complete: bool = Field(description="False when reading had to stop before the end.")
    rows_read: int
    rows_kept: int
    refused: dict[str, int] = Field(description="Refused rows by kind of problem.")
    warnings: dict[str, int] = Field(description="What was skipped but is no row: blank lines.")
    problems: list[Problem] = Field(description="The first offenders of each kind.")
    columns_seen: dict[str, int] = Field(description="Rows that hold each column.")
    extra_kept: dict[str, int] = Field(description="Other columns stored under `extra`, with their rows.")
    extra_dropped: dict[str, int] = Field(description="Other columns too big or not scalar: not stored.")
    duplicate_rows: int = Field(description="Kept rows whose messages an earlier row already holds.")
    empty_answers: int
    prompt_characters: LengthStatistics | None = Field(description="All messages but the last; None: no rows.")
    answer_characters: LengthStatistics | None
    turns: LengthStatistics | None = Field(description="Assistant messages of a row.")
    kind: Kind | None = Field(default=None, description="What the rows are stored as; None when no row is an object.")
    fields: dict[str, FieldStatistics] = Field(default_factory=dict, description="Length of each field.")
    scripts: dict[str, int] = Field(default_factory=dict, description="Rows by the script that most of them is in.")
    examples: list[Example] = Field(default_factory=list, description="The first kept rows.")
    images: int = Field(default=0, description="Different images that the kept rows show.")
    overlap: Overlap | None = Field(default=None, description="Set when another dataset was named to compare with.")
    tokens: TokenReport | None = Field(default=None, description="Set when a base model was named.")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_refused(self) -> int:
        return sum(self.refused.values())

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Every row was read and kept, and there is at least one."""
        return self.complete and self.rows_kept > 0 and self.rows_refused == 0


class MixPart(BaseModel):
    """A dataset that another one was mixed of."""

    reference: str = Field(description="`name@digest` of the version.")
    weight: float
    rows: int = Field(description="Rows taken from it.")


class RowChange(BaseModel):
    """A row that differs between two versions; `before` or `after` is None for one that is new or gone."""

    before: int | None = Field(description="Line in the file of the first version.")
    after: int | None = Field(description="Line in the file of the second version.")
    text: str = Field(description="The start of the row.")


class DatasetChanges(BaseModel):
    """How two versions differ, by the content of their rows; order does not count."""

    before: str
    after: str
    same: int
    added: int
    removed: int
    changed: int = Field(description="Rows that keep their prompt and have another answer.")
    first: dict[str, list[RowChange]] = Field(description="The first rows added, removed and changed.")


class DatasetVersion(BaseModel):
    """One immutable stored version of a dataset."""

    name: str
    digest: str = Field(description="SHA-256 of the stored rows, in hex.")
    rows: int
    shape: Shape
    columns: Columns
    kind: Kind = Field(default="chat", description="What its rows hold; versions of before kinds are conversations.")
    source: str = Field(description="The file it was made from.")
    parents: list[MixPart] = Field(default_factory=list, description="What it was mixed of.")
    seed: int | None = Field(default=None, description="Of the mixing.")
    created: datetime
    path: Path = Field(description="The stored rows, one canonical row a line.")
    report: DatasetReport

    @property
    def images(self) -> Path:
        """The folder of the images that its rows show; it is there if they show any."""
        return self.path.parent / IMAGES_FOLDER

    @property
    def reference(self) -> str:
        """`name@digest12`, which names this version and no other."""
        return f"{self.name}@{self.digest[:DIGEST_CHARACTERS]}"
