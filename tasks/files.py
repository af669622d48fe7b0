"""Records on disk: written whole or not at all, read with errors that name the file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from configs.errors import UserError

Record = TypeVar("Record", bound=BaseModel)


def write_record(path: Path, record: BaseModel, *, private: bool = False) -> None:
    """Replace the file by the record, as JSON; `private`: only its owner may read it."""
    write_text(path, record.model_dump_json(indent=2), private=private)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Replace the file by the text; a reader sees the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a record back. Raises UserError naming the file if it is not one."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"this is no {kind.__name__}: {error.errors()[0]['msg']}", file=path) from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process; False if another one does. The system frees it however this one ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process is here with the same lock file. The system frees it however this one ends."""
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def last_lines(log: Path, lines: int, offset: int = 0) -> str:
    """The last lines of a log, read from `offset` bytes on and at most 1 MB of it; empty if there is none.

    A progress bar rewrites its line: only what stood there last counts.
    """
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(offset, log.stat().st_size - 1_000_000))
        text = file.read().decode("utf-8", errors="replace")
    written = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.removesuffix("\n").split("\n")]
    return "\n".join(written[-lines:]) if lines > 0 else ""
