"""The Python code that a model folder brings: which files, under which digest, and whether this process may run it.

`auto_map` in a model's configuration names classes in Python files of the same folder. transformers runs these files
when the model is loaded. Tuneline lets it only if the user has allowed the digest of all Python files in the folder.
Standard library only: the tasks use it as well as the stages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.contract import Refused

ALLOWED_VARIABLE = "STAGE_ALLOWED_CODE"
"""Environment variable with the allowed digests. Whoever starts a process sets it from the user's consent."""
MODULES_VARIABLE = "HF_MODULES_CACHE"
"""Environment variable of the folder that transformers copies the code to and imports it from."""

MAX_FILES = 500
MAX_FILE_BYTES = 5_000_000
_MAX_JSON_BYTES = 5_000_000
_REFERENCE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.[A-Za-z_][A-Za-z0-9_]*")
_MAPPED = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
"""Configurations of a saved model that may hold `auto_map`."""


@dataclass(frozen=True)
class CodeFile:
    """A Python file: its path from the model folder (with `/`), its size in bytes and its sha256 (hexadecimal)."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ModelCode:
    """All Python files of a model folder, and the classes that its configurations name by `auto_map`."""

    files: tuple[CodeFile, ...]
    references: dict[str, tuple[str, ...]]

    @property
    def digest(self) -> str:
        """`sha256:` and the digest over names and contents of all files: another byte or name is another digest."""
        lines = "".join(f"{file.sha256} {file.name}\n" for file in self.files)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def code_of(folder: Path) -> ModelCode | None:
    """The code that the model folder brings; None if no configuration names any, whatever else lies in the folder.

    Nothing is imported. Raises Refused for an `auto_map` that names code outside of the folder, for a Python file that
    is a link to outside of it, and for code of a kind that cannot be allowed.
    """
    _refuse_other_loaders(folder)
    references = auto_maps(folder)
    if not references:
        return None
    files = tuple(_code_files(folder))
    _check_references(folder, references, {file.name for file in files})
    return ModelCode(files, references)


def auto_maps(folder: Path) -> dict[str, tuple[str, ...]]:
    """The class references of each configuration file of the folder that has an `auto_map`. Raises Refused."""
    found = {}
    for file in sorted(folder.glob("*config.json")):
        references = tuple(_references(file, read_object(file).get("auto_map")))
        if references:
            found[file.name] = references
    return found


def trusted(path: str | Path) -> bool:
    """Whether this process runs the code of a model folder: False for a folder without code, and for a hub id.

    Raises Refused for a folder with code whose digest is not among those that this process was started with.
    """
    folder = Path(path)
    code = code_of(folder) if folder.is_dir() else None
    if code is None:
        return False
    if code.digest not in allowed_here():
        raise Refused(
            f"{folder} brings its own Python code, {code.digest}, which is not allowed: either nobody has allowed it "
            "or a file has changed since. `tuneline models allow-code` shows and allows the code of a model"
        )
    return True


def allowed_here() -> frozenset[str]:
    """The digests that whoever started this process lets it run."""
    return frozenset(filter(None, os.environ.get(ALLOWED_VARIABLE, "").split(",")))


def variables(digests: Iterable[str], modules: Path) -> dict[str, str]:
    """Environment of a process that may run the code of these digests; `modules`: the folder it is imported from.

    Without digests the process may run none, whatever its parent's environment says.
    """
    listed = sorted(set(digests))
    own = {MODULES_VARIABLE: str(modules)} if listed else {}
    return {ALLOWED_VARIABLE: ",".join(listed), **own}


def loading(path: str | Path) -> dict[str, bool]:
    """The argument of every `from_pretrained` that says whether code is run. Raises Refused as `trusted` does."""
    return {"trust_remote_code": trusted(path)}


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn an exception of a model's own code into Refused: its code was written for another version, mostly."""
    try:
        yield
    except (Refused, MemoryError):
        raise
    except Exception as error:
        if not Path(path).is_dir() or code_of(Path(path)) is None:
            raise
        from transformers import __version__

        raise Refused(
            f"the own code of the model {path}{_place(error)} fails under transformers {__version__}: "
            f"{type(error).__name__}: {error}. It was written for another version: change it in a copy of the folder "
            "and allow that"
        ) from error


def carry(source: str | Path, output: Path) -> None:
    """Give a model that was saved from `source` exactly the code of `source`, so that its digest is the same.

    transformers copies only the files that it has imported. Nothing happens for a saved folder that names no code.
    """
    named = [name for name in _MAPPED if "auto_map" in _content(output / name)]
    if not named:
        return
    for left in output.rglob("*.py"):
        left.unlink()
    copy_code(Path(source), output)
    for name in named:
        content, original = _content(output / name), _content(Path(source) / name)
        if "auto_map" in original:
            content["auto_map"] = original["auto_map"]
            (output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_code(source: Path, target: Path) -> None:
    """Copy every Python file of a model folder to the same place below `target`. Raises Refused as `code_of` does."""
    for file in _code_files(source):
        copy = target / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)
        shutil.copyfile(source / file.name, copy)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises Refused if the file is too large or not a JSON object."""
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise Refused(f"{file} has more than {_MAX_JSON_BYTES} bytes, which no configuration of a model has")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise Refused(f"{file} is not a JSON object")
    return content


def _place(error: Exception) -> str:
    """Where in the model's own code an exception comes from: ` (FILE, line N)`; empty if not from there."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "transformers_modules" in frame.filename]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _content(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def _references(file: Path, auto_map: Any) -> Iterator[str]:
    """The class references of an `auto_map`: a text or a list a class, or (older tokenizers) a list for all."""
    if auto_map is None:
        return
    if not isinstance(auto_map, dict | list):
        raise Refused(f"auto_map in {file} is {auto_map!r}; expected an object such as {{'AutoConfig': 'file.Class'}}")
    for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        for reference in value if isinstance(value, list) else [value]:
            if reference is None:
                continue
            if not isinstance(reference, str):
                raise Refused(f"auto_map in {file} holds {reference!r}; expected the name of a class, as file.Class")
            yield reference


def _check_references(folder: Path, references: dict[str, tuple[str, ...]], files: set[str]) -> None:
    for name, named in references.items():
        for reference in named:
            where = f"auto_map in {folder / name} names {reference!r}"
            if "--" in reference:
                raise Refused(
                    f"{where}, which is code of another repository: only code in the model's own folder can be "
                    "allowed. Copy the file into a folder of your own with the model, and name it there"
                )
            if not _REFERENCE.fullmatch(reference):
                raise Refused(f"{where}; expected FILE.CLASS, with FILE a Python file beside it and no path")
            module = f"{reference.split('.')[0]}.py"
            if module not in files:
                raise Refused(f"{where}, but the folder holds no {module}")


def _code_files(folder: Path) -> Iterator[CodeFile]:
    """Every Python file below the folder, by name. Raises Refused for links that lead out of it."""
    root = folder.resolve()
    found: list[Path] = []
    for place, folders, names in os.walk(root):
        for name in folders:
            if Path(place, name).is_symlink():
                raise Refused(f"{Path(place, name)} is a linked folder: code behind it could change unseen. Copy it")
        found += [Path(place, name) for name in names if name.endswith(".py")]
    if len(found) > MAX_FILES:
        raise Refused(f"{folder} holds {len(found)} Python files; at most {MAX_FILES} are looked at")
    for file in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        _refuse_link_to_outside(file, root)
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise Refused(f"{file} has {size} bytes; a Python file of a model has at most {MAX_FILE_BYTES}")
        yield CodeFile(file.relative_to(root).as_posix(), size, hashlib.sha256(file.read_bytes()).hexdigest())


def _refuse_link_to_outside(file: Path, root: Path) -> None:
    target = file.resolve()
    if not target.is_file():
        raise Refused(f"{file} is a link that leads nowhere")
    # In the hub's cache every file of a snapshot is a link to the repository's own blobs.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if root not in target.parents and (blobs is None or target.parent != blobs):
        raise Refused(f"{file} is a link to {target}, outside of the model folder: copy the file into the folder")


def _refuse_other_loaders(folder: Path) -> None:
    """Refuse what other libraries than transformers would run without asking.

    mlx-lm imports the file that `model_file` names. sentence-transformers imports the classes of `modules.json`; both
    do so for a local folder without any consent. diffusers and sentence-transformers have parts in subfolders.
    """
    config = _content(folder / "config.json")
    if "model_file" in config:
        raise Refused(
            f"model_file in {folder / 'config.json'} names {config['model_file']!r}, code that mlx-lm would run; "
            "Tuneline runs code that auto_map names, and no other. Remove the line"
        )
    modules = folder / "modules.json"
    if modules.is_file() and modules.stat().st_size <= _MAX_JSON_BYTES:
        _refuse_foreign_modules(modules)
    for file in sorted(folder.glob("*/*config.json")):
        if _content(file).get("auto_map"):
            raise Refused(f"auto_map in {file} names code of a part of the model, which cannot be allowed")


def _refuse_foreign_modules(modules: Path) -> None:
    try:
        parts = json.loads(modules.read_text(encoding="utf-8"))
        types = [str(part["type"]) for part in parts]
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(f"{modules} is not a list of modules with a type each") from error
    foreign = [name for name in types if not name.startswith("sentence_transformers.")]
    if foreign:
        raise Refused(f"{modules} names {foreign[0]!r}, code that is not part of sentence-transformers")
