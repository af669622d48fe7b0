"""A dataset file, byte by byte: its format, its encoding and its JSON, streamed in constant memory.

Tables (CSV, Excel, Parquet) are read by `dataset_tables`. Nothing here knows what a row means; `dataset_shapes` does.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from configs.datasets import FileFormat, Problem
from configs.errors import UserError

MAX_ROW_BYTES = 8 * 1024 * 1024
CHUNK_BYTES = 64 * 1024
_TO_JSONL = "store it as JSON Lines (one JSON object a line)"
_TABLES = (".csv", ".tsv", ".xlsx", ".parquet")
_OTHER_FORMATS = {
    ".arrow": ("Arrow", "store it as Parquet"),
    ".xls": ("the old Excel format", "save it as .xlsx"),
    ".ods": ("OpenDocument", "save it as .xlsx or .csv"),
    ".gz": ("a compressed file", "unpack it: gunzip FILE"),
    ".bz2": ("a compressed file", "unpack it: bunzip2 FILE"),
    ".xz": ("a compressed file", "unpack it: unxz FILE"),
    ".zst": ("a compressed file", "unpack it: unzstd FILE"),
    ".7z": ("a 7z archive", "pack it as .zip or .tar.gz"),
    ".rar": ("a rar archive", "pack it as .zip or .tar.gz"),
}
DOCUMENTS_BY_BLANK_LINES = (
    "plain text: blank lines separate the documents; to read a whole file as one document, name a folder of .txt files"
)
_JSON_START = re.compile(rb'\{\s*(["}]|$)|\[\s*([\["{\]]|$)')
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Format of a file, the byte at which its rows start, and what is worth telling about it.

    `lists`: each line of a JSON Lines file is a list of turns, which is read as the object `{"turns": list}`.
    `delimiter` and `header` are those of CSV.
    """

    format: FileFormat
    start: int
    notes: tuple[str, ...]
    lists: bool = False
    delimiter: str = ","
    header: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """One object of the file. `line` is where it starts; None in Parquet, which has none. Both count from 1.

    `place` is what tells it apart: its line in JSON Lines, its row in an array, which may be all on one line.
    """

    value: dict[str, object]
    line: int | None
    row: int
    place: int


def inspect_file(path: Path) -> FileLayout:
    """Find out the format from the content, without reading more than the start.

    Raises UserError for what is no readable file of a known format, telling how to convert it.
    """
    try:
        _refuse_other_formats(path)
        if path.suffix.lower() in _TABLES:
            from tasks.dataset_tables import inspect_table

            return inspect_table(path)
        with path.open("rb") as file:
            return _inspect(path, file)
    except OSError as error:
        raise UserError(
            f"the dataset cannot be read: {error.strerror or error}", file=path, mend="check its permissions"
        ) from error


def read_objects(path: Path, layout: FileLayout) -> Iterator[ParsedRow | Problem]:
    """The objects of the file in order, with a Problem in the place of each that is none."""
    if layout.format == "txt":
        from tasks.dataset_texts import read_documents

        yield from read_documents(path, layout)
        return
    if layout.format not in ("json", "jsonl"):
        from tasks.dataset_tables import read_table

        yield from read_table(path, layout)
        return
    with path.open("rb") as file:
        file.seek(layout.start)
        yield from _read_jsonl(file, layout.lists) if layout.format == "jsonl" else _read_array(file)


def parse_cell(value: object) -> object:
    """A list or object that a cell of a table holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return _decoder.decode(value.strip())
    return value


def describe(value: object) -> str:
    """A JSON value as words for a message; never longer than a line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}" if abs(value) < 1e15 else "a huge number"
    if isinstance(value, str):
        return f"the text {excerpt(value)}" if value else "an empty text"
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"


def excerpt(text: str, limit: int = 60) -> str:
    """The start of a text, quoted, with everything unprintable escaped."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}…"


def shown(name: str) -> str:
    """A column name for a message: unprintable characters escaped, not quoted."""
    return repr(name[:60])[1:-1]


def _refuse_other_formats(path: Path) -> None:
    if not path.exists():
        raise UserError("there is no such dataset file", file=path, mend="check the path")
    if path.is_dir():
        raise UserError("this is a folder, not a dataset file", file=path, mend="name one file in it")
    if not path.is_file():
        raise UserError("this is a device or pipe, not a dataset file", file=path, mend="store it in a file")
    other = _OTHER_FORMATS.get(path.suffix.lower())
    if other is not None:
        name, mend = other
        raise UserError(
            f"{name} is not read", file=path, expected="JSON Lines, JSON, CSV, Excel (.xlsx) or Parquet", mend=mend
        )


def _inspect(path: Path, file: BinaryIO) -> FileLayout:
    notes = []
    head = file.read(4)
    if not head:
        raise UserError("the dataset file is empty", file=path, expected="at least one row")
    refuse_wide_encodings(path, head)
    start = 0
    if head.startswith(codecs.BOM_UTF8):
        start = len(codecs.BOM_UTF8)
        notes.append("starts with a UTF-8 byte-order mark, which was skipped")
    file.seek(start)
    first = _first_bytes(file)
    if not first:
        raise UserError("the dataset file holds only blank lines", file=path, expected="at least one row")
    suffix = path.suffix.lower()
    if suffix == ".txt" and not _is_json(file, start):
        return FileLayout("txt", start, (*notes, DOCUMENTS_BY_BLANK_LINES))
    if first.startswith(b"[") and _lists_by_line(file, start):
        return FileLayout("jsonl", start, (*notes, "each line is a list of turns, read as one row"), lists=True)
    if first.startswith(b"["):
        if suffix in (".jsonl", ".ndjson"):
            notes.append(f"named {suffix} but holds one JSON array, read as such")
        return FileLayout("json", start, tuple(notes))
    if not first.startswith(b"{") and suffix not in (".jsonl", ".ndjson"):
        raise UserError(
            f"the content is not JSON: it starts with {describe(first.decode(errors='replace')[:1])}",
            file=path,
            expected="JSON Lines (each line an object) or a JSON array of objects; tables and plain text (.txt) are "
            "known by their suffix",
            mend=_TO_JSONL,
        )
    return FileLayout("jsonl", start, tuple(notes))


def refuse_wide_encodings(path: Path, head: bytes) -> None:
    """Raise UserError for UTF-16 and UTF-32, which the first four bytes tell."""
    # The UTF-32 mark begins with the UTF-16 one, so it is looked for first.
    encoding = None
    if head.startswith(_UTF32_MARKS) or head.count(0) == 3:
        encoding = "UTF-32"
    elif head.startswith(_UTF16_MARKS) or head.count(0) == 2:
        encoding = "UTF-16"
    if encoding:
        raise UserError(
            f"the file is encoded in {encoding}",
            file=path,
            expected="UTF-8",
            mend=f"convert it: iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}",
        )


def _first_bytes(file: BinaryIO) -> bytes:
    """The bytes of the first character that is no white space."""
    while chunk := file.read(CHUNK_BYTES):
        if text := chunk.lstrip():
            return text[:4]
    return b""


def _is_json(file: BinaryIO, start: int) -> bool:
    """Whether the first line begins as JSON does: prose may begin with a bracket too, as in `[Chapter 1]`."""
    file.seek(start)
    first = next((line for line in iter(lambda: file.readline(CHUNK_BYTES), b"") if line.strip()), b"")
    return _JSON_START.match(first.strip()) is not None


def _lists_by_line(file: BinaryIO, start: int) -> bool:
    """A whole list on the first line and another one after it: lists by line, which is no JSON array."""
    file.seek(start)
    lines = (line for line in iter(lambda: file.readline(MAX_ROW_BYTES), b"") if line.strip())
    try:
        first = json.loads(next(lines, b""))
    except (ValueError, RecursionError):
        return False
    return isinstance(first, list) and next(lines, b"").lstrip().startswith(b"[")


def _read_jsonl(file: BinaryIO, lists: bool) -> Iterator[ParsedRow | Problem]:
    line = row = 0
    offset = file.tell()
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        size = len(raw)
        if not raw.strip():
            yield Problem(kind="blank_line", level="warning", line=line, message="the line is blank and was skipped")
        elif size > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            row += 1
            size += _skip_line(file)
            yield too_long(line, row, f"{size:,} bytes")
        else:
            row += 1
            yield _parse_line(raw, line, row, offset, lists)
        offset += size


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of the line, a chunk at a time, and return how many bytes that was."""
    skipped = 0
    while chunk := file.readline(CHUNK_BYTES):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def too_long(line: int, row: int, size: str, *, fatal: bool = False) -> Problem:
    """The Problem of a row of more than MAX_ROW_BYTES."""
    return Problem(
        kind="row_too_long",
        level="fatal" if fatal else "refused",
        line=line,
        row=row,
        found=size,
        expected=f"at most {MAX_ROW_BYTES:,} bytes a row",
        message=f"the row is too long: {size}",
        mend="split the text into several rows",
    )


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return row


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


# `json` takes NaN and a key given twice without a word; both would change the data in silence.
_decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _parse_line(raw: bytes, line: int, row: int, offset: int, lists: bool) -> ParsedRow | Problem:
    try:
        value = _decoder.decode(raw.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return wrong_encoding(raw[error.start], offset + error.start, line, row)
    except _DuplicateKeyError as error:
        return _duplicate_key(error.key, line, row)
    except json.JSONDecodeError as error:
        near = excerpt(error.doc[max(0, error.pos - 10) : error.pos + 30])
        return _invalid_json(f"{error.msg} at column {error.pos + 1}, near {near}", line, row)
    except RecursionError:
        return _invalid_json("it is nested too deeply", line, row)
    except ValueError as error:  # NaN, or a number of thousands of digits
        return _invalid_json(str(error), line, row)
    if lists and isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return ParsedRow({"turns": value}, line, row, line)
    if lists or not isinstance(value, dict):
        return _not_an_object(value, line, row, lists)
    return ParsedRow(value, line, row, line)


def _invalid_json(detail: str, line: int, row: int, *, fatal: bool = False) -> Problem:
    mend = "each line must hold one whole JSON object; objects over several lines: jq -c . FILE > NEW.jsonl"
    return Problem(
        kind="invalid_json",
        level="fatal" if fatal else "refused",
        line=line,
        row=row,
        found=detail,
        expected="a JSON object",
        message=f"invalid JSON: {detail}",
        mend="mend the JSON there; what follows cannot be read before that" if fatal else mend,
    )


def wrong_encoding(byte: int, offset: int, line: int, row: int, *, fatal: bool = False) -> Problem:
    """The Problem of a byte that is not UTF-8; `offset` counts from the start of the file."""
    found = f"byte 0x{byte:02x} at offset {offset}"
    return Problem(
        kind="wrong_encoding",
        level="fatal" if fatal else "refused",
        line=line,
        row=row,
        found=found,
        expected="UTF-8",
        message=f"the text is not UTF-8: {found} of the file",
        mend="convert it from the encoding it has: iconv -f GB18030 -t UTF-8 FILE > NEW (or CP1252, …)",
    )


def _duplicate_key(key: str, line: int, row: int) -> Problem:
    return Problem(
        kind="duplicate_key",
        line=line,
        row=row,
        field=shown(key),
        found=f"{excerpt(key)} twice",
        expected="each key once in an object",
        message=f"the key {excerpt(key)} is given twice, so one of its values would be lost",
        mend="rename or remove one of them",
    )


def _not_an_object(value: object, line: int, row: int, lists: bool = False) -> Problem:
    found = describe(value)
    return Problem(
        kind="not_an_object",
        line=line,
        row=row,
        found=found,
        expected="a list of objects, as the other lines" if lists else "a JSON object",
        message=f"the row is {found}, not {'a list of objects' if lists else 'an object'}",
        mend='write each row as an object: {"prompt": "…", "completion": "…"}',
    )


class _ElementBuilder:
    """Puts the elements of the outer array together from parser events."""

    def __init__(self) -> None:
        self._open: list[dict[str, object] | list[object]] = []
        self._keys: list[str] = []
        self.duplicate: str | None = None
        self.element: object = None

    @property
    def inside(self) -> bool:
        """An element has started and not ended."""
        return len(self._open) > 1

    def take(self, event: str, value: object) -> bool:
        """Take one event; True when `element` (and `duplicate`, a key given twice in it) is complete."""
        if event == "map_key":
            if value in self._open[-1]:
                self.duplicate = str(value)
            self._keys[-1] = str(value)
            return False
        if event in ("start_map", "start_array"):
            if len(self._open) == 1:
                self.duplicate = None
            self._open.append({} if event == "start_map" else [])
            self._keys.append("")
            return False
        if event in ("end_map", "end_array"):
            value = self._open.pop()
            self._keys.pop()
        return self._place(value)

    def _place(self, value: object) -> bool:
        if len(self._open) == 1:
            self.element = value
        elif self._open:
            parent = self._open[-1]
            if isinstance(parent, dict):
                parent[self._keys[-1]] = value
            else:
                parent.append(value)
        return len(self._open) == 1


def _read_array(file: BinaryIO) -> Iterator[ParsedRow | Problem]:
    reader = _ArrayReader(file.tell())
    # Fed line by line, so that the line of every row is known exactly; a long line comes in pieces.
    try:
        while not reader.ended:
            yield from reader.feed(file.readline(CHUNK_BYTES))
    finally:
        reader.close()


class _ArrayReader:
    """Turns the bytes of a JSON array into its rows as they come in."""

    def __init__(self, offset: int) -> None:
        import ijson

        # The C backends of ijson turn half a surrogate pair into "?" without a word; this one does not.
        from ijson.backends import python as parser

        self._errors = (ijson.JSONError, ValueError)  # ValueError: a number of thousands of digits
        self._events = ijson.sendable_list()
        self._parser = parser.basic_parse_coro(self._events, use_float=True)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._builder = _ElementBuilder()
        self._line = self._row = self._row_line = 1
        self._row_bytes = 0
        self._offset = offset
        self._characters = self._line_start = 0  # in characters, as the parser counts its positions
        self.ended = False

    def feed(self, piece: bytes) -> Iterator[ParsedRow | Problem]:
        """Take the next bytes, none of which are past the end of a line; empty bytes end the file."""
        problem = self._check_encoding(piece)
        failure = None if problem else self._parse(piece)
        yield from self._complete_rows()
        self._row_bytes += len(piece)
        if failure is not None:
            problem = _invalid_json(failure, self._line, self._row, fatal=True)
        elif problem is None and self._builder.inside and self._row_bytes > MAX_ROW_BYTES:
            size = f"more than {MAX_ROW_BYTES:,} bytes"
            problem = too_long(self._row_line, self._row, size, fatal=True)
        if problem is not None:
            yield problem
        self.ended = problem is not None or not piece
        self._offset += len(piece)
        if piece.endswith(b"\n"):
            self._line += 1
            self._line_start = self._characters

    def close(self) -> None:
        """Stop parsing; that the array is incomplete then is either told already or nobody's concern."""
        with contextlib.suppress(*self._errors):
            self._parser.close()

    def _check_encoding(self, piece: bytes) -> Problem | None:
        held = len(self._decoder.getstate()[0])  # bytes of a character that the last piece cut in two
        try:
            self._characters += len(self._decoder.decode(piece, final=not piece))
        except UnicodeDecodeError as error:
            offset = self._offset - held + error.start
            return wrong_encoding(error.object[error.start], offset, self._line, self._row, fatal=True)
        return None

    def _parse(self, piece: bytes) -> str | None:
        try:
            self._parser.send(piece)
        except StopIteration:  # the parser has seen the end of the file
            return None
        except self._errors as error:
            return _array_failure(str(error), self._line_start)
        return None

    def _complete_rows(self) -> Iterator[ParsedRow | Problem]:
        for event, value in self._events:
            was_inside = self._builder.inside
            if not was_inside:
                self._row_line, self._row_bytes = self._line, 0
            if self._builder.take(event, value):
                yield _element(self._builder, self._row_line, self._row)
                self._row += 1
        self._events.clear()


def _element(builder: _ElementBuilder, line: int, row: int) -> ParsedRow | Problem:
    if builder.duplicate is not None:
        problem = _duplicate_key(builder.duplicate, line, row)
        builder.duplicate = None
        return problem
    if isinstance(builder.element, dict):
        return ParsedRow(builder.element, line, row, row)
    return _not_an_object(builder.element, line, row)


def _array_failure(message: str, line_start: int) -> str:
    at = re.search(r" at (\d+)$", message)
    if at is None:
        return message
    return f"{message[: at.start()]} at column {int(at[1]) - line_start + 1}"
