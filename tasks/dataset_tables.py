"""Tables, streamed: CSV, Excel and Parquet. Each row becomes an object of its columns.

The cells of CSV and Excel are texts, as a reader sees them; those of Parquet have the types of the file.
"""

from __future__ import annotations

import csv
import itertools
import math
import zipfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, BinaryIO

from configs.datasets import TEXT_COLUMNS, Problem
from configs.errors import UserError
from tasks.dataset_reading import (
    MAX_ROW_BYTES,
    FileLayout,
    ParsedRow,
    describe,
    excerpt,
    refuse_wide_encodings,
    too_long,
    wrong_encoding,
)

MAX_SHARED_STRINGS = 200 * 1024 * 1024
MAX_EXCEL_ROWS = 1_048_576  # the format has no more; rows that a damaged file skips are read as blank ones
MAX_SHEET_BYTES = 4 * 1024 * 1024 * 1024
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_PARQUET_ROWS = 256
# What reading a zip archive of XML raises where it is none; SyntaxError: of the XML.
_DAMAGED = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, SyntaxError)
_EXCEL_ERRORS = ("#N/A", "#REF!", "#NAME?", "#VALUE!", "#DIV/0!", "#NUM!", "#NULL!")


def inspect_table(path: Path) -> FileLayout:
    """Find out the columns of a CSV, Excel or Parquet file. Raises UserError for one that is damaged or empty."""
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        raise UserError("the dataset file is empty", file=path, expected="at least one row")
    if suffix == ".xlsx":
        return _inspect_excel(path)
    return _inspect_parquet(path) if suffix == ".parquet" else _inspect_csv(path)


def read_table(path: Path, layout: FileLayout) -> Iterator[ParsedRow | Problem]:
    """The rows of a table in order, with a Problem in the place of each that cannot be read."""
    if layout.format == "csv":
        yield from _read_csv(path, layout)
    else:
        yield from _read_excel(path, layout) if layout.format == "xlsx" else _read_parquet(path)


# CSV


def _inspect_csv(path: Path) -> FileLayout:
    notes = []
    with path.open("rb") as file:
        head = file.read(4)
        refuse_wide_encodings(path, head)
        start = len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0
        if start:
            notes.append("starts with a UTF-8 byte-order mark, which was skipped")
        file.seek(start)
        first = file.readline(MAX_ROW_BYTES)
    delimiter = _delimiter(path, first)
    if path.suffix.lower() != (".tsv" if delimiter == "\t" else ".csv"):
        notes.append(f"the cells are separated by {_DELIMITERS[delimiter]}")
    layout = FileLayout("csv", start, (), delimiter=delimiter)
    with path.open("rb") as file:
        file.seek(start)
        try:
            header = next(_reader(_CsvLines(file, start), layout), [])
        except _StoppedError as stop:
            raise UserError(stop.problem.message, file=path, line=1, mend=stop.problem.mend) from None
        except csv.Error as error:
            raise UserError(f"the first line is no CSV: {error}", file=path, line=1) from None
    names = tuple(name.strip() for name in header)
    _check_header(path, names)
    return FileLayout("csv", start, tuple(notes), delimiter=delimiter, header=names)


def _delimiter(path: Path, first: bytes) -> str:
    """The separator that the first line has most of, outside of quotes; its parts are the names of the columns."""
    outside = b"".join(first.split(b'"')[::2])
    counts = {delimiter: outside.count(delimiter.encode()) for delimiter in _DELIMITERS}
    best = max(counts, key=lambda delimiter: counts[delimiter])
    if counts[best] == 0 and first.decode(errors="replace").strip().strip('"') not in TEXT_COLUMNS:
        raise UserError(
            "the first line has no separator, so there is only one column",
            file=path,
            line=1,
            expected="the names of the columns, separated by commas, semicolons or tabs",
            mend="write the names of the columns in the first line",
        )
    return best


def _check_header(path: Path, names: tuple[str, ...]) -> None:
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            raise UserError(
                f"the name of column {index + 1} is {'empty' if not name else f'given twice: {excerpt(name)}'}",
                file=path,
                line=1,
                field=f"column {index + 1}",
                expected="a name of its own for each column, in the first line",
                mend="name the columns in the first line",
            )


class _StoppedError(Exception):
    """Reading cannot go on past here."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.message)


class _CsvLines:
    """The lines of a file as text, for the csv module; `line` counts those given."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file, self._offset = file, offset
        self.line = 0
        self.row = 1

    def __iter__(self) -> Iterator[str]:
        while raw := self._file.readline(MAX_ROW_BYTES + 1):
            self.line += 1
            if len(raw) > MAX_ROW_BYTES:
                raise _StoppedError(too_long(self.line, self.row, f"more than {MAX_ROW_BYTES:,} bytes", fatal=True))
            try:
                yield raw.decode()
            except UnicodeDecodeError as error:
                offset = self._offset + error.start
                raise _StoppedError(wrong_encoding(raw[error.start], offset, self.line, self.row, fatal=True)) from None
            self._offset += len(raw)


def _reader(lines: Iterable[str], layout: FileLayout) -> Iterator[list[str]]:
    # Of the whole process; a quote that is never closed would otherwise take the rest of the file into memory.
    csv.field_size_limit(MAX_ROW_BYTES)
    return csv.reader(lines, delimiter=layout.delimiter, strict=True)


def _read_csv(path: Path, layout: FileLayout) -> Iterator[ParsedRow | Problem]:
    with path.open("rb") as file:
        file.seek(layout.start)
        lines = _CsvLines(file, layout.start)
        reader = _reader(lines, layout)
        next(reader)
        row = 0
        while True:
            line = lines.line + 1
            lines.row = row + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except _StoppedError as stop:
                yield stop.problem
                return
            except csv.Error as error:
                row += 1
                problem = _csv_problem(str(error), line, row)
                yield problem
                if problem.level == "fatal":
                    return
                continue
            if not any(cell.strip() for cell in cells):
                yield Problem(
                    kind="blank_line", level="warning", line=line, message="the line is blank and was skipped"
                )
                continue
            row += 1
            yield _csv_row(cells, layout.header, line, row)


def _csv_row(cells: list[str], header: tuple[str, ...], line: int, row: int) -> ParsedRow | Problem:
    if len(cells) == len(header):
        return ParsedRow(dict(zip(header, cells, strict=True)), line, row, line)
    return Problem(
        kind="wrong_number_of_cells",
        line=line,
        row=row,
        field=header[len(cells)] if len(cells) < len(header) else f"column {len(header) + 1}",
        found=f"{len(cells)} cells",
        expected=f"{len(header)} cells, as the first line has",
        message=f"the row has {len(cells)} cells where the first line names {len(header)} columns",
        mend="put cells that hold separators or line breaks in double quotes",
    )


def _csv_problem(detail: str, line: int, row: int) -> Problem:
    # At a quote that is not closed, the rest of the file is inside of it.
    fatal = "unexpected end" in detail or "field larger" in detail
    return Problem(
        kind="invalid_csv",
        level="fatal" if fatal else "refused",
        line=line,
        row=row,
        found="a quote that is not closed" if fatal else detail,
        expected="a row of CSV",
        message=f"invalid CSV: {'a quote that starts in this row is not closed' if fatal else detail}",
        mend='close the quote; a quote inside a cell is written twice: ""',
    )


# Excel


def _inspect_excel(path: Path) -> FileLayout:
    with _workbook(path) as book:
        sheet = _first_sheet(book)
        try:
            header = next(sheet.iter_rows(values_only=True), ())
        except _DAMAGED as error:
            raise _damaged_excel(path, error) from error
        others = [other.title for other in book.worksheets[1:]]
    names = [_excel_text(cell).strip() for cell in header]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(
            "the first row of the first sheet is empty",
            file=path,
            line=1,
            expected="the names of the columns",
            mend="write the names of the columns in the first row",
        )
    _check_header(path, tuple(names))
    told = f"; not read: {', '.join(others)}" if others else ""
    return FileLayout("xlsx", 0, (f"the sheet {sheet.title} was read{told}",), header=tuple(names))


class _workbook:  # noqa: N801 (reads as a function)
    """An Excel file open for reading row by row. Raises UserError for one that is damaged, or too big to be true."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        import openpyxl

        try:
            _refuse_huge_parts(self._path)
            # data_only: what a formula gave when the file was saved, not its text.
            self._book = openpyxl.load_workbook(self._path, read_only=True, data_only=True)
        except (*_DAMAGED, AttributeError, TypeError) as error:
            raise _damaged_excel(self._path, error) from error
        if not self._book.worksheets:
            raise UserError("the Excel file has no sheet", file=self._path, expected="a sheet of rows")
        return self._book

    def __exit__(self, *exception: object) -> None:
        self._book.close()


def _first_sheet(book: Any) -> Any:
    sheet = book.worksheets[0]
    sheet.reset_dimensions()  # some programs write a wrong one, and columns past it would be left out
    return sheet


def _damaged_excel(path: Path, error: Exception) -> UserError:
    return UserError(f"this is no Excel file, or a damaged one: {error}", file=path, mend="save it again, or as CSV")


def _refuse_huge_parts(path: Path) -> None:
    """An Excel file is a zip archive: its shared texts are held in memory, and a small one may unpack to a huge one."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            limit = MAX_SHARED_STRINGS if part.filename.endswith("sharedStrings.xml") else MAX_SHEET_BYTES
            if part.file_size > limit:
                raise UserError(
                    f"the part {part.filename} of the Excel file unpacks to {part.file_size:,} bytes",
                    file=path,
                    expected=f"at most {limit:,} bytes",
                    mend="save the table as CSV",
                )


def _read_excel(path: Path, layout: FileLayout) -> Iterator[ParsedRow | Problem]:
    with _workbook(path) as book:
        row = 0
        for line, cells in enumerate(_excel_cells(book), 1):
            if isinstance(cells, Exception) or line > MAX_EXCEL_ROWS:
                yield _damage("Excel", str(cells) or "too many rows", line, row + 1)
                return
            if line == 1:
                continue
            texts = [_excel_text(cell) for cell in cells]
            if not any(cell.strip() for cell in texts):
                yield Problem(kind="blank_line", level="warning", line=line, message="the row is blank and was skipped")
                continue
            row += 1
            yield _excel_row(texts, layout.header, line, row)


def _excel_cells(book: Any) -> Iterator[tuple[object, ...] | Exception]:
    """The cells of each row; an exception, as the last one, where the file is damaged."""
    try:
        yield from _first_sheet(book).iter_rows(values_only=True)
    except _DAMAGED as error:
        yield error


def _damage(name: str, detail: str, line: int | None, row: int) -> Problem:
    return Problem(
        kind="damaged_file",
        level="fatal",
        line=line,
        row=row,
        found=detail[:200],
        expected=f"a whole {name} file",
        message=f"the {name} file is damaged there: {detail[:200]}",
        mend="write it again",
    )


def _excel_row(texts: list[str], header: tuple[str, ...], line: int, row: int) -> ParsedRow | Problem:
    surplus = next((index for index, cell in enumerate(texts) if index >= len(header) and cell), None)
    if surplus is not None:
        return Problem(
            kind="wrong_number_of_cells",
            line=line,
            row=row,
            field=f"column {surplus + 1}",
            found=describe(texts[surplus]),
            expected=f"nothing beside the {len(header)} columns that the first row names",
            message=f"column {surplus + 1} holds {describe(texts[surplus])} and has no name in the first row",
            mend="name the column in the first row, or empty the cell",
        )
    value = dict(itertools.zip_longest(header, texts[: len(header)], fillvalue=""))
    wrong = next((name for name, cell in value.items() if cell in _EXCEL_ERRORS), None)
    if wrong is not None:
        return Problem(
            kind="excel_error",
            line=line,
            row=row,
            field=wrong,
            found=value[wrong],
            expected="a value",
            message=f"the cell of {wrong} holds the error {value[wrong]}",
            mend="mend the formula and save the file",
        )
    return ParsedRow(dict(value), line, row, line)


def _excel_text(cell: object) -> str:
    """What a cell holds, as text; a number without the format that Excel shows it in."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, datetime | date | time):
        return cell.isoformat(" ") if isinstance(cell, datetime) else cell.isoformat()
    if isinstance(cell, float) and math.isfinite(cell) and cell == int(cell):
        return str(int(cell))
    return str(cell)


# Parquet


def _inspect_parquet(path: Path) -> FileLayout:
    names = tuple(_parquet(path).schema_arrow.names)
    _check_header(path, names)
    return FileLayout("parquet", 0, (), header=names)


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, buffer_size=1024 * 1024, pre_buffer=False, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"this is no Parquet file, or a damaged one: {str(error)[:200]}", file=path, mend="write it again"
        ) from error


def _read_parquet(path: Path) -> Iterator[ParsedRow | Problem]:
    import pyarrow

    file, row = _parquet(path), 0
    try:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, use_threads=False):
            for value in batch.to_pylist():
                row += 1
                yield ParsedRow(value, None, row, row)
    except (pyarrow.ArrowException, OSError) as error:
        yield _damage("Parquet", str(error), None, row + 1)
