"""How two versions differ: rows that are new, gone, or answered otherwise. Memory grows with the rows of both."""

from __future__ import annotations

from collections import Counter, defaultdict

from configs.datasets import DatasetChanges, DatasetVersion, Kind, RowChange
from tasks.dataset_rows import Body, key, parts, prompt_of, read_stored

FIRST = 5
_SHOWN = 120
_Pair = tuple[int | None, int | None]  # positions in both versions; None: not there


def compare_versions(before: DatasetVersion, after: DatasetVersion) -> DatasetChanges:
    """What is to be done to the rows of `before` to have those of `after`; order does not count.

    A row that only one of them has is `changed` if the other one has a row of its own with the same prompt.
    """
    left = Counter(key(body) for _, body, _ in read_stored(before.path))
    total = left.total()
    fresh: dict[int, list[int]] = defaultdict(list)  # by prompt, the positions of rows that `before` does not have
    for position, (_, body, _) in enumerate(read_stored(after.path)):
        content = key(body)
        if left[content]:
            left[content] -= 1
        else:
            fresh[_prompt(after.kind, body)].append(position)
    changed: list[_Pair] = []
    removed: list[_Pair] = []
    # Of equal rows, which one is gone does not matter: the first.
    for position, (_, body, _) in enumerate(read_stored(before.path)):
        content = key(body)
        if not left[content]:
            continue
        left[content] -= 1
        others = fresh.get(_prompt(before.kind, body))
        if others:
            changed.append((position, others.pop(0)))
        else:
            removed.append((position, None))
    added: list[_Pair] = sorted((None, position) for positions in fresh.values() for position in positions)
    return DatasetChanges(
        before=before.reference,
        after=after.reference,
        same=total - len(changed) - len(removed),
        added=len(added),
        removed=len(removed),
        changed=len(changed),
        first=_first(before, after, {"changed": changed, "removed": removed, "added": added}),
    )


def _prompt(kind: Kind, body: Body) -> int:
    return key(prompt_of(kind, body))


def _first(before: DatasetVersion, after: DatasetVersion, pairs: dict[str, list[_Pair]]) -> dict[str, list[RowChange]]:
    """The first of each, with their lines and the start of what differs."""
    chosen = {name: found[:FIRST] for name, found in pairs.items() if found}
    each = [pair for found in chosen.values() for pair in found]
    old = _rows_at(before, {one for one, _ in each})
    new = _rows_at(after, {other for _, other in each})
    return {name: [_change(old.get(one), new.get(other)) for one, other in found] for name, found in chosen.items()}


def _rows_at(version: DatasetVersion, positions: set[int | None]) -> dict[int | None, tuple[int, str]]:
    """Line and text of the rows at the positions."""
    return {
        position: (line, " | ".join(part.text for part in parts(version.kind, body)))
        for position, (line, body, _) in enumerate(read_stored(version.path))
        if position in positions
    }


def _change(before: tuple[int, str] | None, after: tuple[int, str] | None) -> RowChange:
    texts = [row[1] for row in (before, after) if row is not None]
    return RowChange(
        before=before[0] if before else None, after=after[0] if after else None, text=" → ".join(_excerpts(texts))
    )


def _excerpts(texts: list[str]) -> list[str]:
    """The start of one text; of two, the places around their first difference."""
    start = 0
    if len(texts) == 2:
        differing = (place for place, (one, other) in enumerate(zip(*texts, strict=False)) if one != other)
        start = max(0, next(differing, min(map(len, texts))) - _SHOWN // 4)
    return [_excerpt(text, start) for text in texts]


def _excerpt(text: str, start: int) -> str:
    end = start + _SHOWN
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
