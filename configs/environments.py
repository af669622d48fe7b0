"""The environments that stages run in: what their files ask for, what is locked, what was made."""

from __future__ import annotations

import platform
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.errors import UserError
from configs.records import now
from configs.strict_yaml import read_yaml

FILE = "environment.yml"
RECORD = "tuneline.json"
ENVIRONMENT_NAME = r"^[a-z0-9][a-z0-9_-]{0,59}$"
EnvironmentName = Annotated[str, Field(pattern=ENVIRONMENT_NAME)]
Manager = Literal["conda", "venv"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PINNED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;]+)\s*(;\s*(?P<marker>.+))?")
_CONDA_PIN = re.compile(r"# conda (?P<platform>\S+): (?P<name>\S+)=(?P<version>[^=\s]+)=(?P<build>[^=\s]+)")


class EnvironmentFile(BaseModel):
    """An `environment.yml` as conda writes it, with the packages of its `pip:` section apart."""

    model_config = ConfigDict(extra="forbid")

    name: EnvironmentName
    channels: list[str] = Field(default_factory=list)
    dependencies: list[str] = Field(default_factory=list)
    pip: list[str] = Field(default_factory=list)
    path: Path = Field(exclude=True)

    @property
    def lock(self) -> Path:
        """`environment.lock.txt` beside `environment.yml`."""
        return self.path.with_name(f"{self.path.stem}.lock.txt")

    @property
    def python(self) -> SpecifierSet:
        """The versions of Python that it allows. Raises UserError."""
        for dependency in self.dependencies:
            name, wanted = split_dependency(dependency)
            if name == "python" and wanted:
                return _versions(wanted, self.path)
        return SpecifierSet()

    @property
    def conda_only(self) -> list[str]:
        """What only conda can install."""
        return [each for each in self.dependencies if split_dependency(each)[0] not in ("python", "pip")]


class EnvironmentRecord(BaseModel):
    """An environment that was made, written last of all: without it, nothing was. Kept as `tuneline.json` in it."""

    model_config = ConfigDict(extra="forbid")

    name: EnvironmentName
    manager: Manager
    file: Path
    file_digest: str
    lock_digest: str | None = Field(description="Digest of the lock file that it was installed from, if any.")
    installed: dict[str, str] = Field(description="Name to version, as it was when it was finished.")
    created: datetime = Field(default_factory=now)


class Difference(BaseModel):
    """One thing in which an environment is not what it should be."""

    what: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.what}: {self.found}, expected {self.expected}"


class Lock(BaseModel):
    """What a lock file says for this platform: exact versions of pip's packages, and name=version=build of conda's."""

    pip: dict[str, str]
    conda: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.pip or self.conda)


def split_dependency(text: str) -> tuple[str, str]:
    """`channel::name>=1.2` as (`name`, `>=1.2`)."""
    text = text.rpartition("::")[2].strip()
    name = _NAME.match(text)
    return (name[0].lower(), text[name.end() :].strip()) if name else (text, "")


def read_environment(path: Path) -> EnvironmentFile:
    """Read an `environment.yml`. Raises UserError with the field that is wrong."""
    found = read_yaml(path)
    values = dict(found.values)
    listed = values.get("dependencies") or []
    pip: list[Any] = []
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, dict) and list(each) == ["pip"] and isinstance(each["pip"], list):
            pip += each["pip"]
    values["dependencies"] = [each for each in listed if not isinstance(each, dict) or list(each) != ["pip"]]
    try:
        file = EnvironmentFile.model_validate({**values, "pip": pip, "path": path.resolve()})
    except ValidationError as error:
        first = error.errors()[0]
        key = tuple(str(part) for part in first["loc"])
        raise UserError(
            first["msg"], file=path, line=found.lines.get(key[:1]), field=".".join(key), value=first["input"]
        ) from error
    _ = file.python
    for each in file.pip:
        if each.lstrip().startswith("-"):
            raise UserError(
                "an option of pip is no package",
                file=path,
                field="dependencies.pip",
                value=each,
                mend="name packages only; an index is set in pip's own configuration",
            )
    return file


def _versions(wanted: str, path: Path) -> SpecifierSet:
    # conda's own spelling: python=3.11 is any 3.11
    text = f"=={wanted[1:].removesuffix('.*')}.*" if re.match(r"=[^=]", wanted) else wanted
    try:
        return SpecifierSet(text)
    except InvalidSpecifier as error:
        raise UserError(
            "these are no versions of Python",
            file=path,
            field="dependencies",
            value=f"python{wanted}",
            expected="such as python=3.11 or python>=3.11,<3.14",
        ) from error


def platform_marker() -> str:
    """The marker of this platform, as pip reads it."""
    return f'sys_platform == "{sys.platform}" and platform_machine == "{platform.machine()}"'


def conda_platform() -> str:
    """This platform as conda's lines of a lock name it."""
    return f"{sys.platform}-{platform.machine()}"


def read_lock(path: Path) -> Lock:
    """What a lock file says for this platform; nothing if there is none. Raises UserError with the line."""
    lock = Lock(pip={}, conda={})
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        if conda := _CONDA_PIN.fullmatch(line.strip()):
            if conda["platform"] == conda_platform():
                lock.conda[conda["name"]] = f"{conda['version']}={conda['build']}"
        elif line.strip() and not line.lstrip().startswith("#"):
            pinned = _PINNED.fullmatch(line.strip())
            if pinned is None:
                raise UserError(
                    "this is no exact version",
                    file=path,
                    line=number,
                    value=line.strip(),
                    expected="NAME==VERSION, and after a `;` the platform",
                    mend="`tuneline envs lock` writes the file anew",
                )
            if pinned["marker"] in (None, platform_marker()):
                lock.pip[canonicalize_name(pinned["name"])] = pinned["version"]
    return lock


def lock_lines(path: Path, lock: Lock) -> list[str]:
    """The lines of the lock file with this platform's replaced; those of other platforms are kept."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        pinned, conda = _PINNED.fullmatch(line.strip()), _CONDA_PIN.fullmatch(line.strip())
        if pinned is not None and pinned["marker"] not in (None, platform_marker()):
            kept.append(line)
        if conda is not None and conda["platform"] != conda_platform():
            kept.append(line)
    ours = [f"# conda {conda_platform()}: {name}={version}" for name, version in sorted(lock.conda.items())]
    ours += [f"{name}=={version} ; {platform_marker()}" for name, version in sorted(lock.pip.items())]
    return ["# Exact versions, by platform; written by `tuneline envs lock`.", *kept, *ours]
