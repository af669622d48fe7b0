"""Adding training methods to this installation and deleting them; the built-in ones stay."""

from __future__ import annotations

import fcntl
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError
from configs.settings import Settings
from methods.registry import METHODS_FOLDER, Method, find_method, load_methods, read_manifest
from tasks.trains import current_status, list_trains

_MANIFEST = "method.yaml"
_NOT_COPIED = ("__pycache__", ".git", ".venv")


def add_method(folder: Path, settings: Settings) -> Method:
    """Copy a method's folder into this installation; returns the method. Nothing of it is run.

    Raises UserError if methods may not be changed, for a manifest that is wrong, a name that is taken, and for
    anything in the folder that is no plain file or folder, or leads out of it.
    """
    _refuse_if_closed(settings)
    folder = folder.expanduser().resolve()
    if not (folder / _MANIFEST).is_file():
        raise UserError("this is no folder of a method", file=folder, expected=f"a file {_MANIFEST} in it")
    method = read_manifest(folder / _MANIFEST)
    _refuse_what_leads_out(folder)
    with _alone(settings) as methods:
        if method.name in load_methods(settings):
            raise UserError(
                "there is a method of this name already",
                file=folder / _MANIFEST,
                field="name",
                value=method.name,
                mend=f"choose another name, or delete that one: tuneline methods delete {method.name}",
            )
        copy = methods / f".adding-{secrets.token_hex(4)}"
        try:
            shutil.copytree(folder, copy, symlinks=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
            read_manifest(copy / _MANIFEST)
            copy.rename(methods / method.name)  # one step: a kill leaves the whole method or none
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        return read_manifest(methods / method.name / _MANIFEST)


def delete_method(name: str, settings: Settings) -> None:
    """Delete a method that was added; its past trains and their models stay.

    Raises UserError if methods may not be changed, for a built-in method, and while a train runs with it.
    """
    _refuse_if_closed(settings)
    method = find_method(name)
    if METHODS_FOLDER in method.folder.parents:
        raise UserError("a built-in method cannot be deleted", field="method", value=name)
    running = [each.id for each in list_trains() if each.config.method == name and current_status(each) == "running"]
    if running:
        raise UserError(
            f"a train runs with this method: {', '.join(running)}",
            field="method",
            value=name,
            mend="wait for it, or cancel it: `tuneline trains cancel`",
        )
    with _alone(settings) as methods:
        gone = methods / f".deleted-{secrets.token_hex(4)}"
        method.folder.rename(gone)
        shutil.rmtree(gone)


def _refuse_if_closed(settings: Settings) -> None:
    if settings.method_changes == "closed":
        raise UserError(
            "adding and deleting methods is closed on this installation",
            field="TUNELINE_METHOD_CHANGES",
            value=settings.method_changes,
            expected="allowed",
        )


def _refuse_what_leads_out(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            target = path.readlink()
            if target.is_absolute() or not path.resolve().is_relative_to(folder):
                raise UserError(
                    "this link leads out of the method's folder",
                    file=path,
                    value=str(target),
                    expected="files, folders, and relative links between them",
                )
        elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError("this is neither a file nor a folder", file=path)


@contextmanager
def _alone(settings: Settings) -> Iterator[Path]:
    """The folder of the added methods, for oneself; with nothing in it of an addition or deletion that was killed."""
    settings.methods.mkdir(parents=True, exist_ok=True)
    with (settings.methods / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in [*settings.methods.glob(".adding-*"), *settings.methods.glob(".deleted-*")]:
            shutil.rmtree(left, ignore_errors=True)
        yield settings.methods
