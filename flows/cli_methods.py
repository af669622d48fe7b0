"""`tuneline methods`: list, show, new, add, delete, check."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.datasets import KIND_TITLES
from configs.errors import UserError
from configs.settings import load_settings
from flows import cli_trains
from flows.printing import print_block, print_fields, print_heading, print_json, print_table

if TYPE_CHECKING:
    from methods.registry import Method

app = typer.Typer(help="Training methods.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every training method."""
    from methods.registry import load_methods

    methods = load_methods().values()
    if json_:
        print_json([method.model_dump(mode="json") for method in methods])
        return
    rows = [(m.name, m.types, " → ".join(m.lifecycle), m.description) for m in methods]
    print_table(("Method", "Types", "Lifecycle", "Description"), rows, "no methods")


@app.command()
def show(method: Annotated[str, typer.Argument(help="Name of a method.")], json_: Json = False) -> None:
    """One method: its stages, and every parameter it takes."""
    from methods.registry import find_method

    found = find_method(method)
    if json_:
        print_json(found.model_dump(mode="json"))
        return
    print_fields(
        {
            "method": found.name,
            "description": found.description,
            "types": found.types,
            "trains on": ", ".join(f"{KIND_TITLES[kind]} ({kind})" for kind in found.kinds),
            "lifecycle": " → ".join(found.lifecycle),
            "targets": found.deployment_targets,
            "hardware": ", ".join(f"{k} {v}" for k, v in found.hardware.model_dump().items()),
            "folder": found.folder,
        }
    )
    rows = [(name, stage.file, stage.environment) for name, stage in found.stages.items()]
    print_table(("Stage", "File", "Environment"), rows, "no stages")
    _print_parameters(found)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the new method: small letters, digits and -.")],
    template: Annotated[str, typer.Option("--from", help="Method to begin with.")] = "custom01",
    folder: Annotated[Path | None, typer.Option(help="Where to write it; by default a folder NAME here.")] = None,
) -> None:
    """Copy a method to begin a new one with. A folder to edit and then to add."""
    from tasks.training_methods import new_method

    manifest = new_method(name, template, folder or Path(name), load_settings())
    print(f"{manifest}\nchange what is in its folder, then: tuneline methods add {manifest.parent}")


@app.command()
def add(folder: Annotated[Path, typer.Argument(help="Folder of the method, with its method.yaml.")]) -> None:
    """Add a method. Checked, copied into the installation, and on the Prefect page if a server runs."""
    from tasks.training_methods import add_method

    added = add_method(folder, load_settings())
    print(f"{added.name} is added: {added.folder}")
    match_deployments()


@app.command()
def delete(name: Annotated[str, typer.Argument(help="Name of a method that was added.")]) -> None:
    """Delete a method that was added; its past trains and models stay."""
    from tasks.training_methods import delete_method

    delete_method(name, load_settings())
    print(f"{name} is deleted; its past trains stay")
    match_deployments()


@app.command()
def check(
    method: Annotated[str | None, typer.Argument(help="Name of a method.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every method that this platform can run.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the job folders, with logs and results.")] = False,
    json_: Json = False,
) -> None:
    """Run every stage of a method on a tiny model. Then cancel, resume and fail; exit code 1 if anything is wrong."""
    from methods.registry import find_method, load_methods
    from tasks.method_checks import CheckResult, check_method

    if (method is None) != all_:
        raise UserError("name one method, or --all", field="METHOD", value=method)
    methods = [find_method(method)] if method is not None else list(load_methods().values())

    def tell(result: CheckResult) -> None:
        if not json_:
            print(f"{_MARKS[result.ok]} {result.method}: {result.check} ({result.seconds:.0f} s)", flush=True)

    results = [result for each in methods for result in check_method(each, tell, keep=keep)]
    if json_:
        print_json([result.model_dump() for result in results])
    else:
        print()
        rows = [(_MARKS[each.ok], each.method, each.check, each.detail, f"{each.seconds:.1f}") for each in results]
        print_table(("", "Method", "Check", "Found", "Seconds"), rows, "no methods")
    if any(result.ok is False for result in results):
        raise typer.Exit(1)


_MARKS = {True: "✓", False: "✗", None: "–"}


def match_deployments() -> None:
    """Make the Prefect page match, if a server runs; otherwise the next `tuneline up` does."""
    cli_trains.embedded()
    from flows.records import match_deployments as match

    changed = match(load_settings(), set())
    rows = [(item.deployment, item.change) for item in changed]
    print_table(
        ("Deployment", ""), rows, "no deployment has changed; if no server runs, `tuneline up` makes them match"
    )


def _print_parameters(method: Method) -> None:
    """The reference of all parameters that it takes: for reading in a terminal, as Markdown for a file."""
    from configs.reference import parameter_table, parameters

    if not sys.stdout.isatty():
        print(parameter_table(method))
        return
    for heading, found in parameters(method).items():
        print_heading(heading)
        for each in found:
            typical = f"; typical {each.typical}" if each.typical else ""
            print_block(each.name, each.meaning, f"Default: {each.default}. Takes {each.limits}{typical}.")
            if each.spellings:
                print_block("", f"Also written {', '.join(each.spellings)}.")
