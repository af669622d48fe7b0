"""Plain text: the documents of a .txt file, streamed, and a folder of .txt files that are a document each."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from configs.datasets import Problem
from tasks.dataset_reading import MAX_ROW_BYTES, FileLayout, ParsedRow, shown, too_long, wrong_encoding

FILE_COLUMN = "file"
"""The further column of a document that names the file it is, relative to the folder."""


def read_documents(path: Path, layout: FileLayout) -> Iterator[ParsedRow | Problem]:
    """The documents of a .txt file: what stands between blank lines, each with the line that it starts at.

    A document that is not UTF-8 or has more than MAX_ROW_BYTES is a Problem; the next one is read all the same.
    """
    with path.open("rb") as file:
        file.seek(layout.start)
        for row, (line, offset, raw, size) in enumerate(_paragraphs(file), start=1):
            yield _document(raw, size, offset, line, row)


def _paragraphs(file: BinaryIO) -> Iterator[tuple[int, int, bytes, int]]:
    """Line, offset, bytes and number of bytes of what stands between blank lines; the bytes of a too long one are cut.

    Read in pieces, so that a line without an end does not fill the memory.
    """
    line, offset, found = 1, file.tell(), b""
    first, start, size, blank, at_line_start = 1, offset, 0, True, True
    while piece := file.readline(64 * 1024):
        ends = piece.endswith(b"\n")
        if at_line_start and ends and not piece.strip():
            if size:
                yield first, start, found, size
            found, size, blank = b"", 0, True
        else:
            if blank:
                first, start, blank = line, offset, False
            found += piece if size <= MAX_ROW_BYTES else b""
            size += len(piece)
        offset += len(piece)
        line += ends
        at_line_start = ends
    if size and found.strip():
        yield first, start, found, size


def _document(raw: bytes, size: int, offset: int, line: int | None, row: int) -> ParsedRow | Problem:
    if size > MAX_ROW_BYTES:
        return too_long(line or 1, row, f"{size:,} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].count(b"\n")
        return wrong_encoding(raw[error.start], offset + error.start, (line or 1) + before, row)
    text = text.replace("\r\n", "\n").strip("\n")
    return ParsedRow({"text": text}, line, row, line or row)


def text_files(folder: Path) -> Iterator[Path]:
    """The .txt files in a folder and the folders below it, hidden ones and links left out."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
        if path.suffix.lower() == ".txt" and path.is_file() and not path.is_symlink() and not hidden:
            yield path


def read_files(folder: Path) -> Iterator[ParsedRow | Problem]:
    """Each .txt file of a folder as one document, with its name in the column `file`."""
    for row, path in enumerate(text_files(folder), start=1):
        name = shown(str(path.relative_to(folder)))
        with path.open("rb") as file:
            raw = file.read(MAX_ROW_BYTES + 1)
        start = len(BOM_UTF8) if raw.startswith(BOM_UTF8) else 0
        found = _document(raw[start:], path.stat().st_size, start, None, row)
        if isinstance(found, Problem):
            yield found.model_copy(update={"line": None, "field": name, "message": f"{name}: {found.message}"})
        else:
            yield ParsedRow({**found.value, FILE_COLUMN: name}, None, row, row)
