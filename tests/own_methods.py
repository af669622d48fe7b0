"""Training methods of one's own, written into the installation of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from configs.settings import load_settings

STAGE = {"file": "training.py", "environment": "host"}
GOOD: dict[str, Any] = {
    "name": "mine",
    "description": "A method of our own.",
    "types": ["chat"],
    "lifecycle": ["customized"],
    "stages": {"training": STAGE},
}


def write_manifest(folder: Path, /, **changes: Any) -> Path:
    """A good manifest with changes (None leaves a field out), and an empty training file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.py").touch()
    path = folder / "method.yaml"
    content = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def install_method(name: str = "mine", **changes: Any) -> Path:
    """Write a method into the installation that TUNELINE_HOME names; returns its folder."""
    folder = load_settings().methods / name
    write_manifest(folder, name=name, **changes)
    return folder
