"""The verbs of datasets: check a file, store it as an immutable version, find versions, split their rows."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.datasets import (
    IMAGES_FOLDER,
    KIND_TITLES,
    TEXT_COLUMNS,
    Columns,
    DatasetReport,
    DatasetVersion,
    Kind,
    Problem,
    RequestedShape,
    Wanted,
)
from configs.errors import UserError
from configs.settings import load_settings
from methods.registry import load_methods
from tasks.dataset_conversion import Row, convert_rows, read_rows
from tasks.dataset_images import ImageFolder
from tasks.dataset_overlap import Against, overlap_sentence
from tasks.dataset_reading import shown
from tasks.dataset_rows import read_stored
from tasks.dataset_shapes import RowLayout, choose_layout
from tasks.dataset_sources import ARCHIVES, DATA_SUFFIXES, Source, open_source
from tasks.dataset_store import (
    VERSION_FILE,
    building_folder,
    checked_name,
    default_name,
    load_version,
    publish,
    replacing,
    tell_of,
    told_as_user_error,
    write_records,
    write_rows,
)
from tasks.dataset_tally import About, Tally
from tasks.dataset_tokens import BaseFolder, RowSample, token_report


def check_dataset(
    path: str | Path,
    columns: Columns | None = None,
    shape: RequestedShape = "auto",
    *,
    max_problems: int = 3,
    wanted: Wanted | None = None,
    against: str | Path | None = None,
    base: BaseFolder | None = None,
) -> DatasetReport:
    """Read a file, a folder or an archive to its end and report, with the first `max_problems` offenders of each kind.

    `against` names another dataset, as `resolve_dataset` takes it: the report says what both have. With a `base` model
    it shows the prompts that are made of the rows, and their tokens. Nothing is stored.

    Problems of rows are counted in the report and never raised. Raises UserError for what cannot be used at all: not
    there, not UTF-8, empty, of no known format or shape, or of a kind of rows that is not `wanted`.
    """
    path = Path(path)
    look = _Look(against, base)
    with open_source(path) as source:
        layout = _wanted_layout(source, columns, shape, wanted)
        images, tally = ImageFolder(source.root), Tally(max_problems)
        for row in tally.counted(convert_rows(source, layout, images)):
            look.at(row.kind, row.body, row.place, row.stored)
        return look.added_to(tally.report(_about(path, source, layout), images.count))


def describe_version(
    version: DatasetVersion, against: str | Path | None = None, base: BaseFolder | None = None
) -> DatasetReport:
    """The report of a stored version, with what `check_dataset` adds for `against` and `base`."""
    look = _Look(against, base)
    if look.wanted:
        for line, body, stored in read_stored(version.path):
            look.at(version.kind, body, line, stored)
    return look.added_to(version.report)


def describe_datasets(
    versions: Mapping[str, DatasetVersion], base: str | None, base_path: Path | None
) -> tuple[dict[str, DatasetReport], list[str]]:
    """The reports of what a train reads, by field, and what is worth a warning.

    The training rows (`dataset`) are rendered with the base model, and compared with the evaluation rows, or with the
    validation rows where there are none.
    """
    reports, warnings = {field: version.report for field, version in versions.items()}, []
    known = (base, base_path) if base is not None and base_path is not None else None
    if versions["dataset"].kind == "caption":
        known = None  # a pipeline of several models has no one tokenizer
    held_out = next((field for field in ("evaluation_dataset", "validation_dataset") if field in versions), None)
    against = versions[held_out].reference if held_out is not None else None
    try:
        report = describe_version(versions["dataset"], against, known)
    except UserError as error:  # what cannot be rendered here is told by the training stage, if it needs it
        warnings.append(error.problem)
        report = describe_version(versions["dataset"], against)
    reports["dataset"] = report
    if report.overlap is not None and report.overlap.prompts:
        warnings.append(
            f"the training rows are not apart: {overlap_sentence(report.overlap, report.rows_kept, report.kind)}"
        )
    return reports, warnings


class _Look:
    """What is found out about rows beside the tally, where it is asked for."""

    def __init__(self, against: str | Path | None, base: BaseFolder | None) -> None:
        self._against = Against(str(against), _rows_of(against)) if against is not None else None
        self._sample = RowSample() if base is not None else None
        self._base = base
        self.wanted = against is not None or base is not None

    def at(self, kind: Kind, body: dict[str, Any], line: int, stored: bytes) -> None:
        if self._against is not None:
            self._against.count(kind, body, line)
        if self._sample is not None:
            self._sample.take(stored)

    def added_to(self, report: DatasetReport) -> DatasetReport:
        added: dict[str, Any] = {}
        if self._against is not None:
            added["overlap"] = self._against.overlap()
        if self._base is not None and self._sample is not None and report.kind is not None:
            added["tokens"] = token_report(self._sample, report.kind, *self._base)
        return report.model_copy(update=added)


def _rows_of(reference: str | Path) -> Iterator[tuple[Kind, dict[str, Any]]]:
    path = _given_path(reference)
    if path is None:
        version = find_dataset(str(reference))
        for _, body, _ in read_stored(version.path):
            yield version.kind, body
        return
    with open_source(path) as source:
        for row in read_rows(source, ImageFolder(source.root)):
            if isinstance(row, Row):
                yield row.kind, row.body


def add_dataset(
    path: str | Path,
    name: str | None = None,
    columns: Columns | None = None,
    shape: RequestedShape = "auto",
    *,
    allow_refused: bool = False,
    wanted: Wanted | None = None,
) -> DatasetVersion:
    """Check a file, folder or archive and store its rows, and the images that they show, as an immutable version.

    It is named after the file unless told otherwise. The same rows under the same name are one version: adding them
    again returns it. Raises UserError, leaving nothing behind, for what `check_dataset` raises, for any refused row
    unless `allow_refused`, for no kept row, for a file that could not be read to its end, and for a full disk. The
    Prefect server, if one stands, is told of a new version.
    """
    path = Path(path)
    name = default_name(path) if name is None else checked_name(name)
    store = load_settings().datasets
    with open_source(path) as source:
        layout = _wanted_layout(source, columns, shape, wanted)
        with told_as_user_error(store), building_folder(store) as folder:
            images, tally = ImageFolder(source.root, folder), Tally()
            digest = write_rows(folder, tally.counted(convert_rows(source, layout, images)))
            report = tally.report(_about(path, source, layout), images.count)
            _require_usable(report, path, allow_refused)
            write_records(folder, name, digest, str(path.resolve()), report)
            version, new = publish(folder, store / name / digest)
    if new:
        tell_of(version)
    return version


def _wanted_layout(
    source: Source, columns: Columns | None, shape: RequestedShape, wanted: Wanted | None
) -> RowLayout | None:
    layout = choose_layout(source, columns, shape)
    if layout is not None and wanted is not None:
        _require_kind(layout.kind, wanted, file=source.name, line=1, field=", ".join(layout.names))
    return layout


def _about(path: Path, source: Source, layout: RowLayout | None) -> About:
    size = path.stat().st_size if path.is_file() else source.path.stat().st_size
    return About(source.name, source.layout.format, layout, source.layout.notes, size)


def _require_kind(kind: Kind, wanted: Wanted, **place: Any) -> None:
    if kind in wanted.kinds:
        return
    accepted = " or ".join(KIND_TITLES[each] for each in wanted.kinds)
    asked = f"; documents are read from a column {' or '.join(TEXT_COLUMNS)}, or from .txt files"
    raise UserError(
        f"these are {KIND_TITLES[kind]}; {wanted.by} takes {accepted}",
        **place,
        expected=f"{accepted}{asked if 'text' in wanted.kinds else ''}",
        mend=f"name another dataset, or a method for these rows: {_methods_for(kind)}",
    )


def _methods_for(kind: Kind) -> str:
    """The methods that train on rows of a kind, as a train file names them."""
    found: list[str] = []
    with contextlib.suppress(UserError):  # a defective manifest is another fault than that of the rows
        found = [f"method: {method.name}" for method in load_methods().values() if kind in method.kinds]
    return ", ".join(found) or "`tuneline methods list` shows what each method takes"


def list_datasets() -> list[DatasetVersion]:
    """Every stored version, by name, the oldest of each name first."""
    records = load_settings().datasets.glob(f"*/*/{VERSION_FILE}")
    versions = (load_version(record.parent) for record in records)
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
    wanted: Wanted | None = None,
) -> DatasetVersion:
    """The version that a train's `dataset` names: a file, which is added under its own name, or a stored one.

    A file wins over a stored dataset of the same name. Raises UserError as `add_dataset` and `find_dataset`, and for
    rows of a kind that is not `wanted`.
    """
    path = _given_path(reference)
    if path is not None:
        return add_dataset(path, columns=columns, shape=shape, allow_refused=allow_refused, wanted=wanted)
    version = find_dataset(str(reference))
    if wanted is not None:
        _require_kind(version.kind, wanted, field="dataset", value=version.reference)
    return version


def check_reference(
    reference: str | Path,
    columns: Columns | None = None,
    shape: RequestedShape = "auto",
    *,
    allow_refused: bool = False,
    wanted: Wanted | None = None,
) -> DatasetReport:
    """The report of what a train's `dataset` names, as `resolve_dataset` would find it; nothing is stored.

    Raises UserError where `resolve_dataset` would.
    """
    path = _given_path(reference)
    if path is None:
        version = find_dataset(str(reference))
        if wanted is not None:
            _require_kind(version.kind, wanted, field="dataset", value=version.reference)
        return version.report
    report = check_dataset(path, columns, shape, wanted=wanted)
    _require_usable(report, path, allow_refused)
    return report


def _given_path(reference: str | Path) -> Path | None:
    """The file or folder that a reference names; None if it is the name of a stored dataset."""
    path = Path(reference)
    if path.parts[:1] == ("~",):
        path = path.expanduser()
    return path if _is_file(path) or _looks_like_path(reference) else None


def write_split(
    version: DatasetVersion, share: float, seed: int, train_path: Path, validation_path: Path
) -> tuple[int, int]:
    """Write the rows of a version to two files, about `share` of them to the second; return the two counts.

    The side of a row follows from its content and the seed alone, so that it stays when rows are added, and
    equal rows are never on both sides. The share is met on average: of few rows it can be well off. If one
    side would be empty, the rows nearest to the border go there. The images that rows show are linked beside them.
    Raises UserError for a share outside 0 to 1, and for a version without two different rows.
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
    with told_as_user_error(train_path.parent), contextlib.ExitStack() as stack:
        files = [stack.enter_context(replacing(path)) for path in paths]
        for draw, line in _draws(version, seed):
            side = int(draw < border)
            files[side].write(line)
            counts[side] += 1
        if version.images.is_dir():
            for folder in {path.parent for path in paths}:
                _link(folder / IMAGES_FOLDER, version.images)
    return counts[0], counts[1]


def _link(link: Path, target: Path) -> None:
    """Point a symbolic link at a folder, whatever it pointed at before."""
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target.resolve(), target_is_directory=True)


def _require_usable(report: DatasetReport, path: Path, allow_refused: bool) -> None:
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
        mend=f"{first.mend}; `tuneline datasets check {path}` tells of all",
    )


def _at_row(report: DatasetReport, problem: Problem) -> str:
    return f"row {problem.row}: " if report.format in ("json", "parquet") else ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no permission on a folder above it, or a name too long to be one
        return False


def _looks_like_path(reference: str | Path) -> bool:
    text = str(reference)
    return isinstance(reference, Path) or "/" in text or "\\" in text or _names_data_file(text)


def _names_data_file(text: str) -> bool:
    return text.lower().endswith((*DATA_SUFFIXES, *ARCHIVES, ".txt"))


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
    """Each stored row with a number from 0 to 2**64 - 1 drawn from its content and the seed."""
    for _, body, line in read_stored(version.path):
        # Conversations were drawn by their messages before there were other kinds, and keep their side.
        content = json.dumps(body["messages"] if version.kind == "chat" else body, ensure_ascii=False)
        digest = hashlib.sha256(f"{seed}\n{content}".encode()).digest()
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
