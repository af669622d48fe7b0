"""New training methods from a template, adding them to this installation and deleting them; the built-in ones stay."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError
from configs.settings import Settings
from configs.strict_yaml import read_yaml
from methods.manifest import NAME_PATTERN
from methods.registry import (
    MANIFEST,
    METHODS_FOLDER,
    Method,
    duplicate_name,
    find_method,
    load_methods,
    read_manifest,
)
from tasks.trains import current_status, list_trains

_NOT_COPIED = ("__pycache__", ".git", ".venv")


def new_method(name: str, template: str, folder: Path, settings: Settings) -> Path:
    """Copy a method into a new folder under another name, to be changed and then added; returns its manifest.

    Raises UserError for a name that cannot be used or is taken, and for a folder that is there already.
    """
    copied = find_method(template)
    folder = folder.expanduser().absolute()
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(
            "not usable as the name of a method",
            field="name",
            value=name,
            expected="small letters, digits and -, a letter first (at most 40)",
        )
    if name in load_methods(settings):
        raise UserError(
            "there is a method of this name already",
            field="name",
            value=name,
            mend="`tuneline methods list` shows them",
        )
    if folder.exists():
        raise UserError("there is something here already", file=folder, expected="a folder that is not there yet")
    shutil.copytree(copied.folder, folder, symlinks=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    environments = {path: path.stem.removeprefix("environment") for path in folder.glob("environment*.yml")}
    renamed = {}
    for path, suffix in environments.items():
        source = read_yaml(path)
        renamed[str(source.values["name"])] = f"{name}{suffix}"
        _rewrite(path, source.lines[("name",)], r"\bname:.*", f"name: {name}{suffix}")
    manifest = folder / MANIFEST
    source = read_yaml(manifest)
    _rewrite(manifest, source.lines[("name",)], r"\bname:.*", f"name: {name}")
    for stage, file in copied.stages.items():
        if file.environment in renamed:
            line = source.lines[("stages", stage, "environment")]
            pattern = rf"\benvironment:\s*(['\"]?){re.escape(file.environment)}\1"
            _rewrite(manifest, line, pattern, f"environment: {renamed[file.environment]}")
    read_manifest(manifest)
    return manifest


def _rewrite(path: Path, line: int, pattern: str, text: str) -> None:
    """Replace what fits the pattern on one line (from 1) of a file; comments and order stay."""
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[line - 1] = re.sub(pattern, lambda _: text, lines[line - 1], count=1)
    path.write_text("\n".join(lines), encoding="utf-8")


def add_method(folder: Path, settings: Settings) -> Method:
    """Copy a method's folder into this installation; returns the method. Nothing of it is run.

    Raises UserError if methods may not be changed, for a manifest that is wrong, a name that is taken, and for
    anything in the folder that is no plain file or folder, or leads out of it.
    """
    _refuse_if_closed(settings)
    folder = folder.expanduser().resolve()
    if not (folder / MANIFEST).is_file():
        raise UserError("this is no folder of a method", file=folder, expected=f"a file {MANIFEST} in it")
    method = read_manifest(folder / MANIFEST)
    _refuse_what_leads_out(folder)
    with _alone(settings) as methods:
        there = load_methods(settings)
        if method.name in there:
            raise duplicate_name(method, there[method.name])
        copy = methods / f".adding-{secrets.token_hex(4)}"
        try:
            shutil.copytree(folder, copy, symlinks=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
            read_manifest(copy / MANIFEST)
            copy.rename(methods / method.name)  # one step: a kill leaves the whole method or none
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        return read_manifest(methods / method.name / MANIFEST)


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
    for path in _everything_in(folder):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            _refuse_bad_link(path, folder)
        elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError("this is neither a file nor a folder", file=path)


def _everything_in(folder: Path) -> list[Path]:
    """All files and folders, in order; no link is followed."""
    found = [Path(root) / name for root, folders, files in os.walk(folder) for name in (*folders, *files)]
    return sorted(found)


def _refuse_bad_link(path: Path, folder: Path) -> None:
    target = path.readlink()
    expected = "files, folders, and relative links between them"
    try:
        end = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        problem = "this link leads to nothing, or round in a circle"
        raise UserError(problem, file=path, value=str(target), expected=expected) from error
    if target.is_absolute() or not end.is_relative_to(folder):
        raise UserError("this link leads out of the method's folder", file=path, value=str(target), expected=expected)
    if path.is_relative_to(end):
        raise UserError("this link leads round in a circle", file=path, value=str(target), expected=expected)


@contextmanager
def _alone(settings: Settings) -> Iterator[Path]:
    """The folder of the added methods, for oneself; with nothing in it of an addition or deletion that was killed."""
    settings.methods.mkdir(parents=True, exist_ok=True)
    with (settings.methods / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in [*settings.methods.glob(".adding-*"), *settings.methods.glob(".deleted-*")]:
            shutil.rmtree(left, ignore_errors=True)
        yield settings.methods
