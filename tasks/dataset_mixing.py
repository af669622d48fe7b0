"""Several datasets mixed into one by weights: a version of its own, which names its parents and the seed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from configs.datasets import IMAGES_FOLDER, KIND_TITLES, DatasetVersion, MixPart
from configs.errors import UserError
from configs.settings import load_settings
from tasks.dataset_conversion import Row
from tasks.dataset_fields import encoded
from tasks.dataset_rows import body_of
from tasks.dataset_shapes import RowLayout
from tasks.dataset_store import (
    ROWS_FILE,
    building_folder,
    checked_name,
    publish,
    tell_of,
    told_as_user_error,
    write_records,
    write_rows,
)
from tasks.dataset_tally import About, Tally
from tasks.datasets import find_dataset

_CONVERSATIONS = {"chat", "chat_tools"}
FROM = "dataset"
"""The further column of a mixed row that names the version it comes from, to score the parts apart."""


@dataclass(frozen=True)
class _Part:
    version: DatasetVersion
    weight: float
    rows: int  # to take


def mix_datasets(
    weights: Mapping[str, float], name: str, rows: int | None = None, seed: int = 42, *, repeat: bool = False
) -> DatasetVersion:
    """Store a dataset that takes rows of others in the proportion of their weights, spread evenly over its length.

    `rows` are those of the mix; without it there are as many as no row has to be taken twice for. Which rows of a part
    are taken follows from their content and the seed. Raises UserError for less than two datasets, weights that are
    no proportion, kinds that differ, and more `rows` than there are unless `repeat`.
    """
    name = checked_name(name)
    parts = _parts(weights, rows, repeat)
    store = load_settings().datasets
    with told_as_user_error(store), building_folder(store) as folder:
        tally = Tally()
        digest = write_rows(folder, tally.counted(_mixed(parts, seed)))
        images = _take_images(parts, folder)
        report = tally.report(_about(parts, folder), images)
        mixed = [MixPart(reference=part.version.reference, weight=part.weight, rows=part.rows) for part in parts]
        write_records(folder, name, digest, report.file, report, mixed, seed)
        version, new = publish(folder, store / name / digest)
    if new:
        tell_of(version)
    return version


# How many rows of which


def _parts(weights: Mapping[str, float], rows: int | None, repeat: bool) -> list[_Part]:
    if len(weights) < 2:
        raise UserError("a mix takes two datasets at least", field="datasets", value=", ".join(weights))
    for reference, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError("this weight is impossible", field=reference, value=weight, expected="more than 0")
    versions = {reference: find_dataset(reference) for reference in weights}
    _require_one_kind(list(versions.values()))
    shares = _shares(weights)
    most = min(int(version.rows / shares[reference]) for reference, version in versions.items())
    total = most if rows is None else rows
    if total > most and not repeat:
        raise UserError(
            f"without repeating rows this mix has at most {most:,}",
            field="rows",
            value=rows,
            expected=f"at most {most:,}",
            mend="ask for fewer rows, change the weights, or allow repeated rows with --repeat",
        )
    counts = _counts(shares, total)
    if 0 in counts.values():
        empty = next(reference for reference, count in counts.items() if count == 0)
        raise UserError(
            f"of {empty} no row would be in the mix of {total:,} rows",
            field=empty,
            value=weights[empty],
            expected="one row of each dataset at least",
            mend="raise its weight, or the rows",
        )
    return [_Part(version, weights[reference], counts[reference]) for reference, version in versions.items()]


def _require_one_kind(versions: Sequence[DatasetVersion]) -> None:
    first = versions[0]
    for other in versions[1:]:
        if other.kind != first.kind and not {other.kind, first.kind} <= _CONVERSATIONS:
            raise UserError(
                f"{first.reference} are {KIND_TITLES[first.kind]}, and {other.reference} are {KIND_TITLES[other.kind]}",
                field="datasets",
                expected="datasets of one kind",
            )


def _shares(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Exact: 0.1 and 0.2 are 1 to 2, and no row is lost to rounding."""
    exact = {reference: Fraction(str(weight)) for reference, weight in weights.items()}
    total = sum(exact.values())
    return {reference: weight / total for reference, weight in exact.items()}


def _counts(shares: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Whole rows that add up: those with the largest remainders get one more."""
    counts = {reference: int(share * total) for reference, share in shares.items()}
    missing = total - sum(counts.values())
    by_remainder = sorted(shares, key=lambda reference: counts[reference] - shares[reference] * total)
    for reference in by_remainder[:missing]:
        counts[reference] += 1
    return counts


# Which rows, in what order


def _mixed(parts: Sequence[_Part], seed: int) -> Iterator[Row]:
    """The rows of all parts; at every place the part comes next that is most behind its proportion."""
    streams = [_taken(part, seed) for part in parts]
    given = [0] * len(parts)
    for number in range(1, sum(part.rows for part in parts) + 1):
        turn = min(range(len(parts)), key=lambda place: Fraction(given[place] + 1, parts[place].rows))
        given[turn] += 1
        row = next(streams[turn])
        yield _row(row, parts[turn].version, number)


def _taken(part: _Part, seed: int) -> Iterator[dict[str, Any]]:
    """As many rows of a part as it is to give: the whole as often as it fits, then those with the lowest draws."""
    whole, rest = divmod(part.rows, part.version.rows)
    for _ in range(whole):
        for row, _ in _drawn(part.version, seed):
            yield row
    if rest == 0:
        return
    border = sorted(array("Q", (draw for _, draw in _drawn(part.version, seed))))[rest - 1]
    below = sum(draw < border for _, draw in _drawn(part.version, seed))
    ties = rest - below  # equal rows have equal draws
    for row, draw in _drawn(part.version, seed):
        if draw < border or (draw == border and ties > 0):
            ties -= draw == border
            yield row


def _drawn(version: DatasetVersion, seed: int) -> Iterator[tuple[dict[str, Any], int]]:
    with version.path.open("rb") as file:
        for line in file:
            row = json.loads(line)
            digest = hashlib.sha256(b"mix %d\n%b" % (seed, encoded(body_of(row)))).digest()
            yield row, int.from_bytes(digest[:8])


def _row(stored: dict[str, Any], version: DatasetVersion, number: int) -> Row:
    body = body_of(stored)
    content = encoded(body)
    extra = {FROM: version.reference, **stored.get("extra", {})}
    line = b'%b,"line":%d,"extra":%b}\n' % (content[:-1], stored["line"], encoded(extra))
    return Row(version.kind, body, None, number, stored["line"], extra, (), (), line, content)


# What goes with them


def _about(parts: Sequence[_Part], folder: Path) -> About:
    # A conversation without tools is a row of either kind.
    first = max((part.version for part in parts), key=lambda version: version.kind == "chat_tools")
    told = ", ".join(f"{part.rows:,} rows of {part.version.reference}" for part in parts)
    size = (folder / ROWS_FILE).stat().st_size
    return About(f"a mix of {told}", "jsonl", RowLayout(first.shape, (), first.columns), (), size)


def _take_images(parts: Sequence[_Part], folder: Path) -> int:
    """Put the images of the mixed rows beside them, without a second copy where the disk allows it."""
    wanted: dict[str, Path] = {}
    sources = [part.version.images for part in parts if part.version.images.is_dir()]
    if not sources:
        return 0
    with (folder / ROWS_FILE).open("rb") as file:
        for line in file:
            row = json.loads(line)
            for name in [*row.get("images", []), *([row["image"]] if "image" in row else [])]:
                wanted.setdefault(name, _source_of(sources, Path(name).name))
    (folder / IMAGES_FOLDER).mkdir()
    for name, source in wanted.items():
        _link_or_copy(source, folder / name)
    return len(wanted)


def _source_of(folders: Sequence[Path], name: str) -> Path:
    return next(folder / name for folder in folders if (folder / name).exists())


def _link_or_copy(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
