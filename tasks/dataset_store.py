"""The store of dataset versions on disk: made whole or not at all, and never changed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from configs.datasets import DatasetReport, DatasetVersion, MixPart
from configs.errors import UserError
from tasks import events
from tasks.dataset_conversion import Row

ROWS_FILE = "rows.jsonl"
VERSION_FILE = "version.json"
REPORT_FILE = "report.json"
_NAME = re.compile(r"\w[\w.-]{0,59}")
_SPLITS = {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}


def write_records(
    folder: Path,
    name: str,
    digest: str,
    source: str,
    report: DatasetReport,
    parents: Sequence[MixPart] = (),
    seed: int | None = None,
) -> None:
    """Write what is known of a version beside its rows."""
    if report.shape is None or report.kind is None:
        raise ValueError("a dataset without a shape has no rows to store")
    version = DatasetVersion(
        name=name,
        digest=digest,
        rows=report.rows_kept,
        shape=report.shape,
        kind=report.kind,
        columns=report.columns,
        source=source,
        parents=list(parents),
        seed=seed,
        created=datetime.now(UTC),
        path=folder / ROWS_FILE,
        report=report,
    )
    # Neither is stored twice; the path follows from where the version lies, so that the store can be moved.
    _write_json(folder / VERSION_FILE, version.model_dump_json(indent=2, exclude={"path", "report"}))
    _write_json(folder / REPORT_FILE, report.model_dump_json(indent=2))


def _write_json(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode() + b"\n")
        flush(file)


def flush(file: BinaryIO) -> None:
    """Have the file on the disk, whatever happens next."""
    file.flush()
    os.fsync(file.fileno())


def write_rows(folder: Path, rows: Iterable[Row]) -> str:
    """Write the stored rows of a version; returns their digest."""
    digest = hashlib.sha256()
    with (folder / ROWS_FILE).open("wb") as file:
        for row in rows:
            digest.update(row.stored)
            file.write(row.stored)
        flush(file)
    return digest.hexdigest()


def publish(folder: Path, target: Path) -> tuple[DatasetVersion, bool]:
    """Give the finished folder its name, and say whether it is new; a version that is there already stays."""
    for item in folder.rglob("*"):
        item.chmod(0o755 if item.is_dir() else 0o444)
    folder.chmod(0o755)
    target.parent.mkdir(exist_ok=True)
    new = True
    try:
        folder.rename(target)
    except OSError as error:
        new = False
        # A folder is never renamed over one that holds files: these rows are stored already.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _sync_folder(target.parent)
    return load_version(target), new


def tell_of(version: DatasetVersion) -> None:
    """Tell the Prefect server, if one stands, of a new version."""
    labels = {"version": version.reference, "rows": str(version.rows)}
    events.emit(events.DATASET_ADDED, "dataset", version.name, labels)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def building_folder(store: Path) -> Iterator[Path]:
    """A folder inside the store that is gone afterwards unless it was renamed."""
    store.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".adding-", dir=store))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is complete, and leaves nothing if it never is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            flush(file)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def told_as_user_error(folder: Path) -> Iterator[None]:
    """A full disk, or a folder that cannot be written, is told as UserError."""
    try:
        yield
    except OSError as error:
        raise _storing_failed(folder, error) from error


def _storing_failed(folder: Path, error: OSError) -> UserError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or folder
        return UserError(f"the dataset cannot be stored: {error.strerror}", file=where, mend="check the folder")
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return UserError(
        f"the disk is full: {free:,} bytes are free, and the dataset needs more; nothing was stored",
        file=folder,
        mend="free some space there, or set TUNELINE_HOME to a folder on a larger disk",
    )


def load_version(folder: Path) -> DatasetVersion:
    """The version in a folder of the store."""
    record = json.loads((folder / VERSION_FILE).read_text(encoding="utf-8"))
    report = DatasetReport.model_validate_json((folder / REPORT_FILE).read_text(encoding="utf-8"))
    return DatasetVersion(**record, path=folder / ROWS_FILE, report=report)


def default_name(path: Path) -> str:
    """The file's name; for one that only tells the split, the folder's name before it: `orders-train`."""
    bare = path.name
    for suffix in (".tar.gz", path.suffix):
        bare = bare.removesuffix(suffix) if suffix else bare
    stem = _slug(bare if path.is_file() else path.absolute().name)
    folder = path.absolute().parent.name
    return _slug(f"{folder}-{stem}") if stem.lower() in _SPLITS and folder else stem


def _slug(stem: str) -> str:
    """A dataset name made of a file name, in whatever script it is written."""
    text = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", stem)).strip("-._")
    return text[:60] or "dataset"


def checked_name(name: str) -> str:
    """A name that stays inside of the store, normalised. Raises UserError."""
    name = unicodedata.normalize("NFC", name)
    if _NAME.fullmatch(name):
        return name
    raise UserError(
        "this is no name for a dataset",
        field="name",
        value=name,
        expected="a letter or digit, then at most 59 letters, digits, '.', '_' or '-'",
        mend=f"for example {_slug(name)!r}",
    )
