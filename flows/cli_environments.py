"""`tuneline envs`: make, check, lock and remove the environments that stages run in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.environments import Manager
from configs.errors import UserError
from configs.settings import load_settings
from flows.printing import print_fields, print_json, print_table

EXIT_DIFFERS = 1

app = typer.Typer(help="Environments of stages. Made from a method's environment.yml.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Reference = Annotated[str, typer.Argument(metavar="METHOD", help="A method, an environment's name, or its file.")]


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every environment that was made, and the stages that run in it."""
    from tasks.environments import list_environments, stages_of

    settings = load_settings()
    records = list_environments(settings)
    if json_:
        print_json([record.model_dump(mode="json") for record in records])
        return
    rows = [
        (each.name, each.manager, len(each.installed), stages_of(each.name, settings), each.created, each.file)
        for each in records
    ]
    columns = ("Environment", "Made by", "Packages", "Stages", "Created", "File")
    print_table(columns, rows, "no environments yet; `tuneline envs create METHOD` makes those of a method")


@app.command()
def create(
    method: Reference,
    manager: Annotated[Manager | None, typer.Option(help="By default conda where there is one, else venv.")] = None,
    conda: Annotated[str | None, typer.Option(help="conda, mamba or micromamba, or its path.")] = None,
) -> None:
    """Make the environments of a method, or make differing ones anew. With the locked versions if there are any."""
    from configs.environments import read_lock
    from tasks.environments import create_environment, find_files

    settings = load_settings()
    for file in find_files(method, settings):
        record = create_environment(file, settings, manager, conda)
        unlocked = f"none for this platform; `tuneline envs lock {method}` writes it"
        print_fields(
            {
                "environment": record.name,
                "folder": settings.environments / record.name,
                "made by": record.manager,
                "packages": len(record.installed),
                "lock": file.lock if read_lock(file.lock) else unlocked,
            }
        )


@app.command()
def check(
    method: Annotated[str | None, typer.Argument(help="A method, an environment's name, or its file.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every environment that was made.")] = False,
    json_: Json = False,
) -> None:
    """Name what is missing, differs from the lock or is extra. Exit code 1 if anything is."""
    from tasks.environments import check_environment, find_files, list_environments

    if (method is None) != all_:
        raise UserError("name a method, or --all for every environment", field="METHOD", value=method)
    settings = load_settings()
    references = [method] if method is not None else [record.name for record in list_environments(settings)]
    files = [file for reference in references for file in find_files(reference, settings)]
    found = {file.name: check_environment(file, settings) for file in files}
    if json_:
        print_json({name: [each.model_dump() for each in differences] for name, differences in found.items()})
    else:
        rows = [(name, each.what, each.found, each.expected) for name in found for each in found[name]]
        good = f"nothing differs in {', '.join(found)}" if found else "no environments yet"
        print_table(("Environment", "What", "Found", "Expected"), rows, good)
    if any(found.values()):
        raise typer.Exit(EXIT_DIFFERS)


@app.command()
def lock(method: Reference) -> None:
    """Lock what is really installed. The exact versions of this platform, written beside the environment file."""
    from tasks.environments import find_files, lock_environment

    settings = load_settings()
    for file in find_files(method, settings):
        path: Path = lock_environment(file, settings)
        print(f"written to {path}")


@app.command()
def remove(name: Annotated[str, typer.Argument(help="Name of the environment.")]) -> None:
    """Remove an environment, unless a stage runs in it."""
    from tasks.environments import remove_environment

    remove_environment(name, load_settings())
    print(f"{name} is removed; `tuneline envs create` makes it again")
