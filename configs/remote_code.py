"""Which code of models the user allows to run: one file in the home folder, and no other place.

A train file, a form, a dataset, a model folder or an environment variable cannot allow anything.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from configs.base_models import is_hub_id
from configs.errors import UserError
from configs.private_files import write_private
from configs.settings import Settings
from configs.strict_yaml import read_yaml
from configs.validation_errors import Place, one_error, problems_of

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ENTRY_FORM = "sha256: and 64 hexadecimal digits, or OWNER/NAME@COMMIT with the full commit of 40"


def is_entry(text: str) -> bool:
    """Whether the text is an entry of the list: the digest of a folder's code, or a hub repository at a commit."""
    repository, _, commit = text.rpartition("@")
    return bool(DIGEST.fullmatch(text)) or (is_hub_id(repository) and bool(_COMMIT.fullmatch(commit)))


def _entry(text: str) -> str:
    if not is_entry(text):
        raise ValueError(_ENTRY_FORM)
    return text


def _digest(text: str) -> str:
    if not DIGEST.fullmatch(text):
        raise ValueError("sha256: and 64 hexadecimal digits")
    return text


class AllowedCode(BaseModel):
    """The file `allow_remote_code.yaml` of the home folder."""

    model_config = ConfigDict(extra="forbid")

    allow_remote_code: list[Annotated[str, AfterValidator(_entry)]] = Field(
        default_factory=list, description=f"What is allowed: {_ENTRY_FORM}."
    )
    pinned: dict[Annotated[str, AfterValidator(_entry)], Annotated[str, AfterValidator(_digest)]] = Field(
        default_factory=dict, description="The digest of each hub entry's code, as it was shown or first fetched."
    )

    @property
    def digests(self) -> frozenset[str]:
        """The digests of all code that may run."""
        listed = {entry for entry in self.allow_remote_code if DIGEST.fullmatch(entry)}
        return frozenset(listed | {self.pinned[entry] for entry in self.allow_remote_code if entry in self.pinned})


def read_allowed_code(settings: Settings) -> AllowedCode:
    """What the user allows; nothing if there is no file.

    Raises UserError for a file that is wrong, or that another user owns or can write.
    """
    file = settings.allowed_code
    if not file.exists():
        return AllowedCode()
    _refuse_open_file(file)
    source = read_yaml(file)
    try:
        return AllowedCode.model_validate(source.values)
    except ValidationError as error:
        places = {
            ".".join(keys): Place(".".join(keys), f"file {file}", file, line) for keys, line in source.lines.items()
        }
        listed = {
            f"allow_remote_code.{number}": places["allow_remote_code"]
            for number in range(len(source.values.get("allow_remote_code") or []))
            if "allow_remote_code" in places
        }
        raise one_error(problems_of(error.errors(), {**listed, **places}, {}), file) from error


def allow_code(entry: str, digest: str, settings: Settings) -> None:
    """Allow the code of this digest, under an entry of the list (the digest itself, or a hub repository's)."""
    with _changing(settings) as allowed:
        if entry not in allowed.allow_remote_code:
            allowed.allow_remote_code.append(entry)
        if entry != digest:
            allowed.pinned[entry] = digest


def revoke_code(entry: str, settings: Settings) -> bool:
    """Take an entry, or every entry with this digest, off the list; False if none was on it."""
    with _changing(settings) as allowed:
        gone = {entry, *(name for name, digest in allowed.pinned.items() if digest == entry)}
        kept = [each for each in allowed.allow_remote_code if each not in gone]
        changed = len(kept) < len(allowed.allow_remote_code)
        allowed.allow_remote_code = kept
        allowed.pinned = {name: digest for name, digest in allowed.pinned.items() if name not in gone}
    return changed


def _refuse_open_file(file: Path) -> None:
    about = file.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise UserError(
            "another user owns this file or can write it, so it allows nothing",
            file=file,
            expected="a file of your own that nobody else can write",
            mend=f"read it, then: chmod 600 {file}",
        )


@contextmanager
def _changing(settings: Settings) -> Iterator[AllowedCode]:
    """What is allowed, to be changed; written when the block ends without an error."""
    file = settings.allowed_code
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        allowed = read_allowed_code(settings)
        yield allowed
        _write(file, allowed)


def _write(file: Path, allowed: AllowedCode) -> None:
    text = yaml.safe_dump(allowed.model_dump(mode="json"), sort_keys=False)
    write_private(file, text)
