"""Which training methods there are: each a folder with a `method.yaml`."""

from __future__ import annotations

import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from configs.errors import UserError
from configs.settings import Settings, load_settings
from configs.strict_yaml import read_yaml
from methods.manifest import HOST_ENVIRONMENT, MANIFEST, Method, StageName
from methods.manifest_reading import read_manifest

__all__ = [
    "HOST_ENVIRONMENT",
    "MANIFEST",
    "METHODS_FOLDER",
    "Method",
    "StageName",
    "duplicate_name",
    "find_method",
    "known_method",
    "load_methods",
    "read_manifest",
]

METHODS_FOLDER = Path(__file__).resolve().parent


def load_methods(settings: Settings | None = None) -> dict[str, Method]:
    """All methods by name: the built-in ones, and those that were added to this installation.

    Raises UserError naming the manifest, the line and the field that is wrong.
    """
    found: dict[str, Method] = {}
    for path in _manifests(settings or load_settings()):
        method = read_manifest(path)
        if method.name in found:
            raise duplicate_name(method, found[method.name])
        found[method.name] = method
    return found


def _manifests(settings: Settings) -> list[Path]:
    added = settings.methods.glob(f"[!.]*/{MANIFEST}")
    return [*sorted(METHODS_FOLDER.glob(f"*/{MANIFEST}")), *sorted(added)]


def duplicate_name(method: Method, other: Method) -> UserError:
    """The error to raise for a method whose name another one has."""
    path = method.folder / MANIFEST
    built_in = METHODS_FOLDER in other.folder.parents
    delete = f", or delete that one: tuneline methods delete {other.name}"
    return UserError(
        "there is a method of this name already",
        file=path,
        line=read_yaml(path).lines.get(("name",)),
        field="name",
        value=method.name,
        expected=f"another name than that of {'the built-in one in ' if built_in else ''}{other.folder}",
        mend=f"choose another name{'' if built_in else delete}",
    )


def find_method(name: str) -> Method:
    """The method of that name; a defective manifest of another one does no harm. Raises UserError with the nearest."""
    settings = load_settings()
    # Most folders are named by their method: then the others need not be read.
    for path in (METHODS_FOLDER / name / MANIFEST, settings.methods / name / MANIFEST):
        if re.fullmatch(r"[\w-]+", name) and path.is_file():
            method = read_manifest(path)
            if method.name == name:
                return method
    methods: dict[str, Method] = {}
    for path in _manifests(settings):
        with suppress(UserError):
            method = read_manifest(path)
            methods.setdefault(method.name, method)
    if name not in methods:
        near = get_close_matches(name, methods, n=1)
        raise UserError(
            "no such training method",
            field="method",
            value=name,
            expected=f"one of {', '.join(methods)}",
            mend=f"did you mean {near[0]}?" if near else "`tuneline methods list` shows them",
        )
    return methods[name]


def known_method(name: str) -> Method | None:
    """The method of that name; None if it was deleted, or is defective, since a train was made with it."""
    with suppress(UserError):
        return find_method(name)
    return None
