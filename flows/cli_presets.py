"""`tuneline presets`: list, show."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.printing import print_fields, print_json, print_table

app = typer.Typer(help="Presets. Documented values to start from, each with its source.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every preset. `preset: NAME` in a train's file, or --preset NAME, uses it."""
    from configs.resolve import list_presets

    presets = list_presets()
    if json_:
        print_json({name: preset.model_dump(mode="json") for name, preset in presets.items()})
        return
    rows = [
        (name, preset.title, preset.documented_for, len(preset.values), preset.source)
        for name, preset in presets.items()
    ]
    print_table(("Preset", "For", "Tuning", "Values", "Source"), rows, "no presets")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a preset, or its scene, such as NL2SQL场景.")],
    json_: Json = False,
) -> None:
    """The values of a preset. Each with the document that it was taken from."""
    from configs.resolve import find_preset

    preset, source = find_preset(name)
    rows = [
        (value_name, value, preset.source_of(value_name), source.lines.get(("values", value_name)))
        for value_name, value in preset.values.items()
    ]
    if json_:
        values = {each: {"value": value, "source": document, "line": line} for each, value, document, line in rows}
        print_json({**preset.model_dump(mode="json"), "name": source.path.stem, "values": values})
        return
    print_fields(
        {
            "preset": source.path.stem,
            "for": preset.title,
            "also called": ", ".join(preset.spellings) or None,
            "tuning": preset.documented_for,
            "file": source.path,
        }
    )
    print()
    print_table(("Parameter", "Value", "Documented in", "Line"), rows, "no values")
