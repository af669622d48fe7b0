"""`tuneline models`: list, add, show, champion; the commands about code and weights are in `cli_model_code.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.base_models import ModelType
from configs.errors import UserError
from configs.settings import load_settings
from flows.printing import print_fields, print_json, print_table

if TYPE_CHECKING:
    from configs.records import ModelRecord

NAME_LIMITS = "letters, digits, - _ . (at most 60; first a letter or digit)"

app = typer.Typer(help="Models: preset base models, and the ones made here.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command("list")
def list_(json_: Json = False) -> None:
    """Base models, and every model made here with its aliases."""
    from configs.base_models import load_base_models
    from flows.cli_trains import embedded

    embedded()
    from tasks.models import aliases_by_model, list_models

    bases = load_base_models(load_settings())
    models = list_models()
    aliases = aliases_by_model() if models else {}
    if json_:
        mine = [{**m.model_dump(mode="json"), "aliases": aliases.get(m.name, [])} for m in models]
        print_json({"preset": [entry.model_dump(mode="json") for entry in bases.values()], "mine": mine})
        return
    sources = [
        (e.name, e.type, e.path or e.hub or (e.wheel and e.wheel.requirement), e.license) for e in bases.values()
    ]
    print_table(("Base model", "Type", "Source", "License"), sources, "none", title="Preset")
    print()
    rows = [(m.name, m.stage, m.line, aliases.get(m.name, []), m.base, m.created) for m in models]
    print_table(
        ("Model", "Stage", "Line", "Aliases", "Base", "Created"), rows, "no models of your own yet", title="Mine"
    )


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name to choose it by.")],
    path: Annotated[Path | None, typer.Option(help="Local folder with config.json and safetensors.")] = None,
    hub: Annotated[str | None, typer.Option(help="Hub id OWNER/NAME.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    type_: Annotated[ModelType, typer.Option("--type", help="What it is.")] = "chat",
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file that replaces the model's template.")] = None,
    title: Annotated[str | None, typer.Option(help="Title.")] = None,
    description: Annotated[str, typer.Option(help="Description.")] = "",
    license_: Annotated[str, typer.Option("--license", help="License.")] = "",
) -> None:
    """Register your own base model, a folder or a hub id."""
    from pydantic import ValidationError

    from configs.base_models import BaseModelEntry
    from configs.validation_errors import one_error, problems_of
    from tasks.base_models import register_base_model

    if (path is None) == (hub is None):
        raise UserError("a base model has one source", field="--path, --hub", expected="exactly one of the two")
    try:
        entry = BaseModelEntry(
            name=name,
            title=title or name,
            type=type_,
            path=path,
            hub=hub,
            revision=revision,
            chat_template=_text_of(chat_template) if chat_template else None,
            description=description,
            license=license_,
        )
    except ValidationError as error:
        raise one_error(problems_of(error.errors(), {}, {"name": NAME_LIMITS}), None) from error
    print(f"{register_base_model(entry, load_settings()).name} can be chosen as a base model")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template cannot be read: {error}", file=file, field="--chat-template") from error


def find(reference: str) -> ModelRecord:
    """The model of a reference, before anything else is begun; MLflow is asked for LINE@ALIAS only."""
    if "@" in reference:
        from flows.cli_trains import embedded

        embedded()
    from tasks.models import find_model

    return find_model(reference)


@app.command()
def show(model: Annotated[str, typer.Argument(help="Name, LINE@ALIAS, or a train.")], json_: Json = False) -> None:
    """One model: what it is, where it lies, where it comes from."""
    from configs.base_models import load_base_models

    bases = load_base_models(load_settings())
    if model in bases:
        content = bases[model].model_dump(mode="json", exclude_none=True)
    else:
        content = find(model).model_dump(mode="json", exclude_none=True)
    if json_:
        print_json(content)
        return
    print_fields(content)


@app.command()
def champion(model: Annotated[str, typer.Argument(help="Name of a model, LINE@ALIAS, or a train.")]) -> None:
    """Make a model the champion of its line. It is the one that a retraining must beat."""
    found = find(model)
    if found.stage == "base":
        raise UserError("a base model is of no line", field="model", value=model, expected="a model that was made here")
    from flows.cli_trains import embedded

    embedded()
    from tasks.models import alias_holder, set_alias

    before = alias_holder(found.line, "champion")
    set_alias(found, "champion")
    instead = f" instead of {before}" if before not in (None, found.name) else ""
    print(f"{found.name} is the champion of {found.line}{instead}")
