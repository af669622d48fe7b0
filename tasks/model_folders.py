"""What a folder with a model holds, as far as serving it goes: a self-contained model, or an adapter on a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.errors import UserError
from tasks.remote_code import refuse_code

TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
# What cannot be put into a model that is served: these are prompts in front of the input, not layers.
_PROMPT_ADAPTERS = frozenset(
    {"ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}
)


def prints_date(folder: Path) -> bool:
    """Whether the chat template of a model folder prints the day of rendering."""
    files = [folder / name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")]
    named = sorted(folder.glob("additional_chat_templates/*.jinja"))
    return any("strftime_now" in file.read_text(encoding="utf-8") for file in (*files, *named) if file.is_file())


def check_model_folder(path: Path) -> None:
    """Refuse a folder that cannot be served: no model, or an adapter without its base. Raises UserError."""
    if not path.is_dir():
        raise UserError("there is no model folder here", file=path, mend="name the folder that holds config.json")
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise UserError(
            "this folder holds no model",
            file=path,
            expected="config.json (self-contained model) or adapter_config.json (adapter on a base model)",
        )
    if is_adapter(path):
        base_of_adapter(path)


def is_adapter(path: Path) -> bool:
    """Whether the folder holds an adapter alone, which is nothing without its base model."""
    # With a config.json of its own the folder is a model, and transformers adds an embedded adapter by itself.
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def base_of_adapter(path: Path) -> Path:
    """Folder of the base model that the adapter is for. Raises UserError if it is not on this host."""
    file = path / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, named = str(config.get("peft_type")), str(config.get("base_model_name_or_path") or "")
    except (ValueError, AttributeError) as error:
        raise UserError("the adapter's configuration is not a JSON object", file=file) from error
    if kind in _PROMPT_ADAPTERS:
        raise UserError(
            "an adapter of this kind cannot be served",
            file=file,
            field="peft_type",
            value=kind,
            expected="an adapter of layers, such as LORA or IA3",
            mend="deploy it with the target custom, if its method offers that",
        )
    base = (path / Path(named).expanduser()).resolve()
    if not named or not (base / "config.json").is_file():
        raise UserError(
            "the base model of this adapter is not on this host",
            file=file,
            field="base_model_name_or_path",
            value=named,
            expected="the folder of a complete model, with config.json",
            mend="write the base model's folder there, or merge the adapter and deploy the complete model",
        )
    return base


def complete_model_only(path: Path, target: str) -> None:
    """Refuse an adapter, and a model with its own code, for a target that serves one file. Raises UserError."""
    if is_adapter(path):
        raise UserError(
            f"the target '{target}' serves complete models only, and this is an adapter",
            field="model",
            value=path.name,
            mend="`tuneline save` makes the complete model",
        )
    refuse_code(path, target)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of the model's folder. Raises UserError if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("this file of the model cannot be read", file=file) from error
    if not isinstance(content, dict):
        raise UserError("this file of the model is not a JSON object", file=file)
    return content
