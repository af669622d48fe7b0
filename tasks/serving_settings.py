"""What a model's own generation_config.json means for the answers that a server gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.endpoints import APPLIED_SETTINGS, GREEDY_SETTINGS, Deployment
from tasks.model_folders import base_of_adapter, is_adapter, read_json

_NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}


def greedy_settings(deployment: Deployment) -> dict[str, Any]:
    """The settings of the deployed model that change its answers at temperature 0 too."""
    folder = deployment.model_path
    if is_adapter(folder):
        folder = deployment.base_path or base_of_adapter(folder)
    file = Path(folder) / "generation_config.json"
    found = read_json(file) if file.is_file() else {}
    given = {name: found[name] for name in GREEDY_SETTINGS if found.get(name) is not None}
    return {name: value for name, value in given.items() if value != _NEUTRAL.get(name)}


def settings_notes(deployment: Deployment) -> list[str]:
    """What the deployment's notes say of these settings: which of them the target applies, and which not."""
    found = greedy_settings(deployment)
    applied = APPLIED_SETTINGS[deployment.target]
    notes = []
    for name, value in found.items():
        said = "applies it to every answer" if name in applied else "does not apply it"
        notes.append(
            f"the model's generation_config.json sets {name} to {value!r:.80}: this server {said}; evaluations of the "
            "model itself do not use it"
        )
    return notes
