"""Tells of parameters that were set and that a train makes no use of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from methods import contract


def manifest_defaults(method: Path) -> dict[str, Any]:
    """The defaults that the manifest in a method's folder names: of its own parameters, and of common ones."""
    manifest = yaml.safe_load((method / "method.yaml").read_text(encoding="utf-8"))
    own = {name: schema["default"] for name, schema in manifest.get("parameters", {}).items() if "default" in schema}
    return {**manifest.get("hyperparameters", {}).get("defaults", {}), **own}


def set_in_vain(parameters: Mapping[str, Any], unused: Iterable[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Of the unused parameters, those with another value than the default, by name."""
    return {name: parameters[name] for name in sorted(unused) if parameters[name] != defaults[name]}


def tell(job: contract.Job, what: str, in_vain: Mapping[str, Any]) -> None:
    """Warn of parameters that `what` does not use; nothing if there are none."""
    if in_vain:
        listed = ", ".join(f"{name} ({value})" for name, value in in_vain.items())
        job.warning(f"{what} does not use {listed}: no effect")
