"""Where the rows and images of a dataset lie: a file, a folder, or an archive, unpacked where it can do no harm."""

from __future__ import annotations

import contextlib
import gzip
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from configs.datasets import Problem
from configs.errors import UserError
from tasks.dataset_images import FILE_SUFFIXES
from tasks.dataset_reading import FileLayout, ParsedRow, inspect_file, read_objects, shown
from tasks.dataset_texts import read_files, text_files

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
MAX_FILES = 1_000_000
MAX_UNPACKED = 50 * 1024**3
# A text packs 3 to 20 times; an archive of zeros, made to fill a disk, 1000 times and more.
ALWAYS_UNPACKED = 1024**3
MAX_RATIO = 200
_CHUNK = 1024 * 1024
_MAX_CAPTION = 64 * 1024


@dataclass(frozen=True, slots=True)
class Source:
    """The file that holds the rows (for `images`, the folder), and the folder that images are looked for in.

    `name` is what to call it to whoever named the archive or folder.
    """

    path: Path
    root: Path
    name: str
    layout: FileLayout


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """The rows and images that a path names; an archive is unpacked to a temporary folder, gone afterwards.

    Raises UserError for what cannot be read, and for an archive with paths that leave it, links, or too much in it.
    """
    if is_archive(path) and path.is_file():
        with tempfile.TemporaryDirectory(prefix="tuneline-archive-") as folder, _renamed(Path(folder), path):
            _unpack(path, Path(folder))
            yield _folder_source(Path(folder), f"{path}/", Path(folder))
    elif path.is_dir():
        yield _folder_source(path, f"{path}/", path)
    else:
        yield Source(path, path.parent, str(path), inspect_file(path))


def is_archive(path: Path) -> bool:
    """Whether the name says so."""
    return path.name.lower().endswith(ARCHIVES)


def read_source(source: Source) -> Iterator[ParsedRow | Problem]:
    """The rows of a source in order, with a Problem in the place of each that is none."""
    if source.layout.format == "images":
        yield from _read_captions(source.path)
    elif source.layout.format == "txt_files":
        yield from read_files(source.path)
    else:
        yield from read_objects(source.path, source.layout)


def _folder_source(folder: Path, name: str, top: Path) -> Source:
    inside = [item for item in sorted(folder.iterdir()) if not item.name.startswith((".", "__MACOSX"))]
    if len(inside) == 1 and inside[0].is_dir() and not _images(folder, first=True):
        return _folder_source(inside[0], name, top)
    files = [item for item in inside if item.is_file() and item.suffix.lower() in DATA_SUFFIXES]
    chosen = [item for item in files if item.stem.lower() == "metadata"] or files
    if len(chosen) > 1:
        raise UserError(
            f"there are {len(chosen)} files of rows: {', '.join(item.name for item in chosen[:10])}",
            file=folder,
            expected="one file of rows, or one named metadata",
            mend="name the file that is meant, or keep one",
        )
    if chosen:
        return Source(chosen[0], folder, f"{name}{chosen[0].relative_to(top)}", inspect_file(chosen[0]))
    if not _images(folder, first=True):
        if any(file.stat().st_size for file in text_files(folder)):
            note = "plain text: each .txt file is a document"
            return Source(folder, folder, name, FileLayout("txt_files", 0, (note,)))
        raise UserError(
            "the folder holds no file of rows and no images",
            file=folder,
            expected=f"one of {', '.join(DATA_SUFFIXES)}, images, each with its caption in a .txt file, or .txt files "
            "that are a document each",
            mend="name the file of the rows",
        )
    note = "each image has its caption in the .txt file of its name"
    return Source(folder, folder, name, FileLayout("images", 0, (note,)))


def _images(folder: Path, *, first: bool = False) -> list[Path]:
    """The images directly in a folder and in its `images` folder; with `first`, only whether there are any."""
    found = (
        item
        for part in (folder, folder / "images")
        if part.is_dir()
        for item in sorted(part.iterdir())
        if item.suffix.lower() in FILE_SUFFIXES
    )
    return [*([item] if (item := next(found, None)) else [])] if first else list(found)


def _read_captions(folder: Path) -> Iterator[ParsedRow | Problem]:
    for row, image in enumerate(_images(folder), 1):
        name = str(image.relative_to(folder))
        text = image.with_suffix(".txt")
        problem = _caption_problem(text)
        if problem is not None:
            kind, found = problem
            yield Problem(
                kind=kind,
                row=row,
                field=shown(name),
                found=found,
                expected=f"its caption in {shown(text.name)}, in UTF-8",
                message=f"the image {shown(name)} has no caption: {found}",
                mend=f"write {shown(text.name)} beside it, or remove the image",
            )
        else:
            yield ParsedRow({"image": name, "caption": text.read_text(encoding="utf-8-sig").strip()}, None, row, row)


def _caption_problem(text: Path) -> tuple[str, str] | None:
    if not text.is_file() or text.is_symlink():
        return "missing_caption", f"there is no {shown(text.name)}"
    if text.stat().st_size > _MAX_CAPTION:
        return "caption_too_long", f"{text.stat().st_size:,} bytes where at most {_MAX_CAPTION:,} are read"
    try:
        text.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return "wrong_encoding", f"byte {error.start} of {shown(text.name)} is not UTF-8"
    return None


# Archives


@contextlib.contextmanager
def _renamed(folder: Path, archive: Path) -> Iterator[None]:
    """Errors about files in the temporary folder name the archive instead."""
    try:
        yield
    except UserError as error:
        if error.file is None or not Path(error.file).is_relative_to(folder):
            raise
        inside = Path(error.file).relative_to(folder)
        name = f"{archive}/{inside}" if inside.parts else str(archive)
        told = {"line": error.line, "field": error.field, "expected": error.expected, "mend": error.mend}
        raise UserError(error.problem, file=name, value=error.value, **told) from None  # type: ignore[arg-type]


def _unpack(archive: Path, folder: Path) -> None:
    budget = _Budget(archive)
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, folder, budget)
        else:
            _unpack_tar(archive, folder, budget)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, gzip.BadGzipFile) as error:
        raise UserError(f"the archive is damaged: {error}", file=archive, mend="pack it again") from error
    except OSError as error:
        raise UserError(
            f"the archive cannot be unpacked: {error.strerror or error}",
            file=archive,
            mend=f"make room in {folder.parent}, or set TMPDIR to a folder on a larger disk",
        ) from error


class _Budget:
    """How much an archive may still unpack to."""

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._allowed = min(MAX_UNPACKED, max(ALWAYS_UNPACKED, MAX_RATIO * archive.stat().st_size))
        self._bytes = self._files = 0

    def take(self, size: int) -> None:
        """Count bytes before they are written."""
        self._bytes += size
        if self._bytes > self._allowed:
            raise UserError(
                f"the archive unpacks to more than {self._allowed:,} bytes",
                file=self._archive,
                expected=f"at most {self._allowed:,} bytes: {MAX_RATIO} times its size and {MAX_UNPACKED:,} in all",
                mend="unpack it yourself and name the folder, if it is meant to be so large",
            )

    def take_file(self) -> None:
        """Count a file before it is made."""
        self._files += 1
        if self._files > MAX_FILES:
            raise UserError(f"the archive holds more than {MAX_FILES:,} files", file=self._archive)


def _unpack_zip(archive: Path, folder: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as packed:
        for item in packed.infolist():
            if item.is_dir():
                continue
            _require(archive, item.filename, not stat.S_ISLNK(item.external_attr >> 16), "is a link")
            _require(archive, item.filename, not item.flag_bits & 1, "needs a password")
            with packed.open(item) as source:
                _copy(source, _inside(archive, folder, _zip_name(item)), budget)


def _zip_name(item: zipfile.ZipInfo) -> str:
    """The name of a file; without the mark for UTF-8 it is in the encoding of who packed it, in China GBK."""
    if item.flag_bits & 0x800 or item.filename.isascii():
        return item.filename
    raw = item.filename.encode("cp437")
    for encoding in ("utf-8", "gb18030"):
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(encoding)
    return item.filename


def _unpack_tar(archive: Path, folder: Path, budget: _Budget) -> None:
    with tarfile.open(archive, "r|*") as packed:
        for item in packed:
            if item.isdir():
                continue
            _require(archive, item.name, item.isfile(), "is a link or a device")
            source = packed.extractfile(item)
            if source is not None:
                _copy(source, _inside(archive, folder, item.name), budget)


def _require(archive: Path, name: str, good: bool, what: str) -> None:
    if not good:
        raise UserError(
            f"{shown(name)} in the archive {what}",
            file=archive,
            expected="plain files and folders",
            mend="pack the files themselves",
        )


def _inside(archive: Path, folder: Path, name: str) -> Path:
    """Where a member goes; never outside of the folder, whatever its name says."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    leaves = ".." in parts or not parts or parts[0].startswith("/") or ":" in parts[0] or "\0" in name
    _require(archive, name, not leaves, "has a path that leaves the archive")
    return folder.joinpath(*parts)


def _copy(source: IO[bytes], target: Path, budget: _Budget) -> None:
    budget.take_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        while chunk := source.read(_CHUNK):
            budget.take(len(chunk))
            file.write(chunk)
