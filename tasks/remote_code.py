"""Lets the code that a model brings run only where the user has allowed its digest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from configs.errors import UserError
from configs.records import CodeRecord
from configs.remote_code import allow_code, read_allowed_code
from configs.settings import Settings, load_settings
from methods.contract import Refused
from methods.toolkit.remote_code import ModelCode, auto_maps, code_of, read_object, variables


def model_code(folder: Path) -> ModelCode | None:
    """The code that a model folder brings. Raises UserError for code that cannot be allowed at all."""
    try:
        return code_of(folder)
    except Refused as refusal:
        raise UserError(str(refusal), field="base_model") from refusal


def needs_code(folder: Path) -> bool:
    """Whether transformers cannot load the model without the code that its folder brings.

    Many models keep their first code although transformers has had the architecture since.
    """
    return any(not _is_native(folder / name) for name in auto_maps(folder))


def admit(folder: Path, settings: Settings, named: str | None = None, entry: str | None = None) -> ModelCode | None:
    """The code of a model folder if the user has allowed it; None for a folder without code.

    `named`: how the user calls the model. `entry`: OWNER/NAME@COMMIT of a folder from the hub; where the list has it
    and no digest for it yet, the digest is kept now. Raises UserError for code that is not allowed.
    """
    code = model_code(folder)
    if code is None:
        return None
    allowed = read_allowed_code(settings)
    if code.digest in allowed.digests:
        return code
    if entry is not None and entry in allowed.allow_remote_code and entry not in allowed.pinned:
        allow_code(entry, code.digest, settings)
        return code
    raise _not_allowed(folder, code, settings, named or str(folder), allowed.pinned.get(entry or ""))


def allowed_digests(folders: Iterable[Path], settings: Settings | None = None) -> list[str]:
    """The digests of the code in these model folders, each allowed at this moment; for the inputs of a stage.

    Raises UserError for code that is not, or no longer, allowed.
    """
    settings = settings or load_settings()
    found = {code.digest for folder in folders if (code := admit(folder, settings)) is not None}
    return sorted(found)


def code_variables(folder: Path, modules: Path) -> dict[str, str]:
    """Environment of a program that loads this model folder; `modules`: the folder that its code is imported from."""
    return variables(allowed_digests([folder]), modules)


def code_record(folder: Path) -> CodeRecord | None:
    """The code of a model folder as it is kept in the record of a train; None if it brings none."""
    code = model_code(folder)
    return None if code is None else CodeRecord(digest=code.digest, files={f.name: f.sha256 for f in code.files})


def refuse_code(folder: Path, target: str) -> None:
    """Refuse a model that brings code, for a target that cannot be kept to the allowed code. Raises UserError."""
    if model_code(folder) is not None:
        raise UserError(
            f"the target '{target}' serves no model that brings its own Python code",
            field="model",
            value=folder.name,
            mend="deploy it with the target transformers, which runs exactly the allowed code",
        )


def _is_native(file: Path) -> bool:
    """Whether transformers itself has the classes for a configuration file that names others by `auto_map`."""
    import transformers

    content = read_object(file)
    if file.name == "config.json":
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        return content.get("model_type") in CONFIG_MAPPING_NAMES
    fields = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type")
    named = [content[field] for field in fields if isinstance(content.get(field), str)]
    return bool(named) and all(name in dir(transformers) for name in named)


def _not_allowed(folder: Path, code: ModelCode, settings: Settings, named: str, pinned: str | None) -> UserError:
    files = ", ".join(file.name for file in code.files)
    changed = f"; it is not the code that was allowed ({pinned})" if pinned is not None else ""
    return UserError(
        f"this model brings its own Python code, which is not allowed to run{changed}",
        file=folder,
        field="base_model",
        value=named,
        expected=f"{code.digest} in {settings.allowed_code} (Python files: {files})",
        mend=f"read it first: `tuneline models code {named} --source`; then `tuneline models allow-code {named}`",
    )
