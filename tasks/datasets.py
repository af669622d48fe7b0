"""The verbs of datasets: check a file, store it as an immutable version, find versions, split their rows."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from configs.datasets import (
    Columns,
    DatasetReport,
    DatasetVersion,
    LengthStatistics,
    Problem,
    RequestedShape,
)
from configs.errors import UserError
from configs.settings import load_settings
from tasks import events
from tasks.dataset_reading import FileLayout, inspect_file, shown
from tasks.dataset_shapes import Row, RowLayout, choose_layout, convert_rows

ROWS_FILE = "rows.jsonl"
VERSION_FILE = "version.json"
REPORT_FILE = "report.json"
MAX_LISTED_COLUMNS = 200
_MORE_COLUMNS = "(columns past the first 200)"
_NAME = re.compile(r"\w[\w.-]{0,59}")
_SPLITS = {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}
_HASHES_AT_ONCE = 1_000_000


def check_dataset(
    path: str | Path,
    columns: Columns | None = None,
    shape: RequestedShape = "auto",
    *,
    max_problems: int = 3,
) -> DatasetReport:
    """Read the whole file and report on it, with the first `max_problems` offenders of each kind.

    Problems of rows are counted in the report and never raised. Raises UserError for a file that cannot be
    used at all: not there, not UTF-8 JSON, empty, of no known shape, or made for another kind of training.
    """
    path = Path(path)
    tally = _Tally(path, inspect_file(path), choose_layout(path, columns, shape), max_problems)
    for _ in tally.rows():
        pass
    return tally.report()


def add_dataset(
    path: str | Path,
    name: str | None = None,
    columns: Columns | None = None,
    shape: RequestedShape = "auto",
    *,
    allow_refused: bool = False,
) -> DatasetVersion:
    """Check the file and store its rows as an immutable version, named after the file unless told otherwise.

    The same rows under the same name are one version: adding them again returns it. Raises UserError, leaving
    nothing behind, for what `check_dataset` raises, for any refused row unless `allow_refused`, for no kept
    row, for a file that could not be read to its end, and for a full disk. The Prefect server, if one stands, is told
    of a new version.
    """
    path = Path(path)
    name = _default_name(path) if name is None else _checked_name(name)
    tally = _Tally(path, inspect_file(path), choose_layout(path, columns, shape))
    store = load_settings().datasets
    with _told_as_user_error(store), _building_folder(store) as folder:
        digest = hashlib.sha256()
        with (folder / ROWS_FILE).open("wb") as file:
            for row in tally.rows():
                digest.update(row.stored)
                file.write(row.stored)
            _flush(file)
        report = tally.report()
        _require_usable(report, allow_refused)
        _write_records(folder, name, digest.hexdigest(), path, report)
        new = not (store / name / digest.hexdigest()).exists()
        version = _publish(folder, store / name / digest.hexdigest())
    if new:
        labels = {"version": version.reference, "rows": str(version.rows)}
        events.emit(events.DATASET_ADDED, "dataset", version.name, labels)
    return version


def list_datasets() -> list[DatasetVersion]:
    """Every stored version, by name, the oldest of each name first."""
    records = load_settings().datasets.glob(f"*/*/{VERSION_FILE}")
    versions = (_load_version(record.parent) for record in records)
    return sorted(versions, key=lambda version: (version.name, version.created))


def find_dataset(reference: str) -> DatasetVersion:
    """The version that `name` (the newest) or `name@digest-prefix` names.

    Raises UserError, with the nearest names, if there is none, and if the prefix fits several.
    """
    name, at, prefix = reference.partition("@")
    everything = list_datasets()
    named = [version for version in everything if version.name == unicodedata.normalize("NFC", name)]
    if not named:
        raise _unknown_dataset(reference, name, sorted({version.name for version in everything}))
    if not at:
        return named[-1]
    fitting = [version for version in named if prefix and version.digest.startswith(prefix.lower())]
    if len(fitting) == 1:
        return fitting[0]
    raise UserError(
        f"{len(fitting) or 'no'} versions of the dataset {name!r} have a digest that starts with {prefix!r}",
        field="dataset",
        value=reference,
        expected=f"one of: {', '.join(version.reference for version in named)}",
        mend="name the version by more of its digest" if fitting else "see `tuneline datasets list`",
    )


def resolve_dataset(
    reference: str | Path,
    columns: Columns | None = None,
    shape: RequestedShape = "auto",
    *,
    allow_refused: bool = False,
) -> DatasetVersion:
    """The version that a train's `dataset` names: a file, which is added under its own name, or a stored one.

    A file wins over a stored dataset of the same name. Raises UserError as `add_dataset` and `find_dataset`.
    """
    path = Path(reference)
    if path.parts[:1] == ("~",):
        path = path.expanduser()
    if _is_file(path) or _looks_like_path(reference):
        return add_dataset(path, columns=columns, shape=shape, allow_refused=allow_refused)
    return find_dataset(str(reference))


def check_reference(
    reference: str | Path,
    columns: Columns | None = None,
    shape: RequestedShape = "auto",
    *,
    allow_refused: bool = False,
) -> DatasetReport:
    """The report of what a train's `dataset` names, as `resolve_dataset` would find it; nothing is stored.

    Raises UserError where `resolve_dataset` would.
    """
    path = Path(reference).expanduser()
    if not (_is_file(path) or _looks_like_path(reference)):
        return find_dataset(str(reference)).report
    report = check_dataset(path, columns, shape)
    _require_usable(report, allow_refused)
    return report


def write_split(
    version: DatasetVersion, share: float, seed: int, train_path: Path, validation_path: Path
) -> tuple[int, int]:
    """Write the rows of a version to two files, about `share` of them to the second; return the two counts.

    The side of a row follows from its messages and the seed alone, so that it stays when rows are added, and
    equal rows are never on both sides. The share is met on average: of few rows it can be well off. If one
    side would be empty, the rows nearest to the border go there. Raises UserError for a share outside 0 to 1,
    and for a version without two different rows.
    """
    if not 0 < share < 1:
        raise UserError(
            "the validation share is impossible",
            field="validation_split",
            value=share,
            expected="more than 0 and less than 1",
        )
    border = _border(version, share, seed)
    counts = [0, 0]
    paths = (train_path, validation_path)
    with _told_as_user_error(train_path.parent), contextlib.ExitStack() as stack:
        files = [stack.enter_context(_replacing(path)) for path in paths]
        for draw, line in _draws(version, seed):
            side = int(draw < border)
            files[side].write(line)
            counts[side] += 1
    return counts[0], counts[1]


class _Tally:
    """Counts what one reading of a file finds.

    Besides the offenders told, memory grows by 8 bytes a row: the hashes that find duplicates.
    """

    def __init__(self, path: Path, file_layout: FileLayout, layout: RowLayout | None, max_problems: int = 3) -> None:
        self._path, self._file_layout, self._layout = path, file_layout, layout
        self._max_problems = max_problems
        self._kept = 0
        self._complete = True
        self._kinds: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()
        self._problems: list[Problem] = []
        self._columns: Counter[str] = Counter()
        self._extra_kept: Counter[str] = Counter()
        self._extra_dropped: Counter[str] = Counter()
        self._prompts: Counter[int] = Counter()
        self._answers: Counter[int] = Counter()
        self._turns: Counter[int] = Counter()
        self._hashes = array("Q")

    def rows(self) -> Iterator[Row]:
        """Read the file once; the kept rows pass through, everything is counted."""
        for item in convert_rows(self._path, self._layout):
            if isinstance(item, Problem):
                self._count_problem(item)
            else:
                self._count_row(item)
                yield item

    def report(self) -> DatasetReport:
        """What was found; call it when `rows` is exhausted."""
        layout = self._layout
        return DatasetReport(
            file=str(self._path),
            format=self._file_layout.format,
            shape=layout.shape if layout else None,
            columns=layout.columns if layout else Columns(),
            notes=list(self._file_layout.notes),
            size_bytes=self._path.stat().st_size,
            complete=self._complete,
            rows_read=self._kept + sum(self._refused.values()),
            rows_kept=self._kept,
            refused=dict(self._refused),
            warnings=dict(self._warnings),
            problems=[item.model_copy(update={"count": self._kinds[item.kind]}) for item in self._problems],
            columns_seen=dict(self._columns),
            extra_kept=dict(self._extra_kept),
            extra_dropped=dict(self._extra_dropped),
            duplicate_rows=_count_duplicates(self._hashes),
            empty_answers=self._refused["empty_answer"],
            prompt_characters=_statistics(self._prompts),
            answer_characters=_statistics(self._answers),
            turns=_statistics(self._turns),
        )

    def _count_problem(self, problem: Problem) -> None:
        self._kinds[problem.kind] += 1
        (self._warnings if problem.level == "warning" else self._refused)[problem.kind] += 1
        if problem.level == "fatal":
            self._complete = False
        if self._kinds[problem.kind] <= self._max_problems:
            self._problems.append(problem)

    def _count_row(self, row: Row) -> None:
        self._kept += 1
        _count_names(self._columns, row.columns)
        _count_names(self._extra_kept, tuple(row.extra))
        _count_names(self._extra_dropped, row.dropped)
        self._prompts[row.prompt_characters] += 1
        self._answers[row.answer_characters] += 1
        self._turns[row.turns] += 1
        self._hashes.append(int.from_bytes(hashlib.sha256(row.content).digest()[:8]))


def _count_names(counter: Counter[str], names: tuple[str, ...]) -> None:
    # A file whose keys are data would otherwise fill the memory.
    for name in names:
        counter[name if name in counter or len(counter) < MAX_LISTED_COLUMNS else _MORE_COLUMNS] += 1


def _count_duplicates(hashes: array[int]) -> int:
    """How many hashes repeat an earlier one, in sets of about a million, so that memory stays bounded."""
    parts = len(hashes) // _HASHES_AT_ONCE + 1
    distinct = sum(len({item for item in hashes if item % parts == part}) for part in range(parts))
    return len(hashes) - distinct


def _statistics(lengths: Counter[int]) -> LengthStatistics | None:
    if not lengths:
        return None
    total = lengths.total()
    ordered = sorted(lengths.items())
    return LengthStatistics(
        min=ordered[0][0],
        mean=round(sum(length * count for length, count in ordered) / total, 2),
        p50=_percentile(ordered, total, 50),
        p95=_percentile(ordered, total, 95),
        max=ordered[-1][0],
    )


def _percentile(ordered: list[tuple[int, int]], total: int, percent: int) -> int:
    rank = -(-total * percent // 100)
    for length, count in ordered:
        rank -= count
        if rank <= 0:
            return length
    return ordered[-1][0]


def _require_usable(report: DatasetReport, allow_refused: bool) -> None:
    if report.ok or (allow_refused and report.complete and report.rows_kept > 0):
        return
    if report.rows_read == 0:
        raise UserError("the dataset holds no rows", file=report.file, expected="at least one row")
    first = next(problem for problem in report.problems if problem.level != "warning")
    counted = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in report.refused.items())
    told = f"{report.rows_refused:,} of {report.rows_read:,} rows are refused ({counted}); the first: "
    stopped = "" if report.complete else "; the rest of the file could not be read"
    raise UserError(
        f"{told if report.rows_refused > 1 else ''}{_at_row(report, first)}{first.message}{stopped}",
        file=report.file,
        line=first.line,
        field=first.field,
        expected=first.expected,
        mend=f"{first.mend}; `tuneline datasets check {report.file}` tells of all",
    )


def _at_row(report: DatasetReport, problem: Problem) -> str:
    return f"row {problem.row}: " if report.format == "json" else ""


def _write_records(folder: Path, name: str, digest: str, source: Path, report: DatasetReport) -> None:
    if report.shape is None:
        raise ValueError("a dataset without a shape has no rows to store")
    version = DatasetVersion(
        name=name,
        digest=digest,
        rows=report.rows_kept,
        shape=report.shape,
        columns=report.columns,
        source=str(source.resolve()),
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
        _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(folder: Path, target: Path) -> DatasetVersion:
    """Give the finished folder its name; if that version is there already, it stays and is returned."""
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o755)
    target.parent.mkdir(exist_ok=True)
    try:
        folder.rename(target)
    except OSError as error:
        # A folder is never renamed over one that holds files: these rows are stored already.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _sync_folder(target.parent)
    return _load_version(target)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _building_folder(store: Path) -> Iterator[Path]:
    """A folder inside the store that is gone afterwards unless it was renamed."""
    store.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".adding-", dir=store))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is complete, and leaves nothing if it never is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            _flush(file)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _told_as_user_error(folder: Path) -> Iterator[None]:
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


def _load_version(folder: Path) -> DatasetVersion:
    record = json.loads((folder / VERSION_FILE).read_text(encoding="utf-8"))
    report = DatasetReport.model_validate_json((folder / REPORT_FILE).read_text(encoding="utf-8"))
    return DatasetVersion(**record, path=folder / ROWS_FILE, report=report)


def _default_name(path: Path) -> str:
    """The file's name; for one that only tells the split, the folder's name before it: `orders-train`."""
    stem = _slug(path.stem)
    folder = path.absolute().parent.name
    return _slug(f"{folder}-{stem}") if stem.lower() in _SPLITS and folder else stem


def _slug(stem: str) -> str:
    """A dataset name made of a file name, in whatever script it is written."""
    text = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", stem)).strip("-._")
    return text[:60] or "dataset"


def _checked_name(name: str) -> str:
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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no permission on a folder above it, or a name too long to be one
        return False


def _looks_like_path(reference: str | Path) -> bool:
    text = str(reference)
    return isinstance(reference, Path) or "/" in text or "\\" in text or _names_data_file(text)


def _names_data_file(text: str) -> bool:
    return Path(text).suffix.lower() in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xlsx")


def _unknown_dataset(reference: str, name: str, names: list[str]) -> UserError:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not names:
        mend = "add one: tuneline datasets add FILE"
    elif near:
        mend = f"did you mean {' or '.join(near)}?"
    else:
        mend = "see `tuneline datasets list`, or add it: tuneline datasets add FILE"
    return UserError(
        f"there is no dataset {shown(name)!r}",
        field="dataset",
        value=reference,
        expected=f"a file, or one of: {', '.join(names[:20]) or '(none is stored yet)'}",
        mend=mend,
    )


def _draws(version: DatasetVersion, seed: int) -> Iterator[tuple[int, bytes]]:
    """Each stored row with a number from 0 to 2**64 - 1 drawn from its messages and the seed."""
    with version.path.open("rb") as file:
        for line in file:
            messages = json.dumps(json.loads(line)["messages"], ensure_ascii=False)
            digest = hashlib.sha256(f"{seed}\n{messages}".encode()).digest()
            yield int.from_bytes(digest[:8]), line


def _border(version: DatasetVersion, share: float, seed: int) -> int:
    """The draw below which rows are for validation, moved as little as leaves neither side empty."""
    border = int(share * 2**64)
    lowest, highest = 2**64, -1
    for draw, _ in _draws(version, seed):
        lowest, highest = min(lowest, draw), max(highest, draw)
    if lowest >= highest:
        raise UserError(
            f"the dataset {version.reference} has no two different rows, so it cannot be split",
            field="validation_split",
            value=share,
            expected="two different rows at least",
            mend="add rows, or name a validation_dataset",
        )
    return min(max(border, lowest + 1), highest)
