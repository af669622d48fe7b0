"""`tuneline profiles`: save, list, show, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.settings import load_settings
from flows.cli_methods import match_deployments
from flows.printing import print_fields, print_json, print_table, print_warning

app = typer.Typer(help="Parameter profiles. Parameters saved under a name, to start trains with.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a profile.")]


@app.command()
def save(
    name: Name,
    source: Annotated[str, typer.Argument(metavar="TRAIN_OR_YAML", help="A train, or a YAML file with parameters.")],
    set_: Annotated[
        list[str], typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter of a file; repeatable.")
    ] = [],  # noqa: B006 - typer reads the default, nobody changes it
    description: Annotated[str, typer.Option(help="What it is good for.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite the profile of this name.")] = False,
) -> None:
    """Save the parameters that a train or a file sets. Datasets, models and names are no parameters."""
    from configs.profiles import write_profile
    from configs.resolve import profile_of_file, profile_of_train

    left_out: list[str] = []
    if Path(source).suffix in (".yaml", ".yml"):
        profile, left_out = profile_of_file(Path(source), set_)
    else:
        from configs.errors import UserError
        from tasks.trains import load_train

        if set_:
            raise UserError("--set goes with a file", field="--set", value=set_, mend="copy the train to a file first")
        record = load_train(source)
        profile = profile_of_train(record.config, record.origins, record.id)
    profile = profile.model_copy(update={"description": description})
    path = write_profile(name, profile, load_settings(), replace=replace)
    print(f"saved as {path}; `tuneline train FILE --profile {name}` starts a train with it")
    if left_out:
        print_warning(f"no parameters, and left out: {', '.join(left_out)}")
    show(name)
    match_deployments()


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every profile."""
    from configs.profiles import list_profiles

    profiles = list_profiles(load_settings())
    if json_:
        print_json({name: profile.model_dump(mode="json") for name, profile in profiles.items()})
        return
    rows = [
        (name, profile.method, len(profile.hyperparameters) + len(profile.method_params), profile.description)
        for name, profile in profiles.items()
    ]
    print_table(("Profile", "Method", "Parameters", "Description"), rows, "no profiles yet; `tuneline profiles save`")


@app.command()
def show(name: Name, json_: Json = False) -> None:
    """The values of a profile."""
    from configs.profiles import find_profile

    profile, source = find_profile(name, load_settings())
    if json_:
        print_json(profile.model_dump(mode="json"))
        return
    print_fields(
        {
            "profile": name,
            "method": profile.method,
            "description": profile.description or None,
            "saved from": profile.saved_from,
            "file": source.path,
        }
    )
    print_table(("Parameter", "Value"), [*profile.hyperparameters.items(), *profile.method_params.items()], "no values")


@app.command()
def delete(name: Name) -> None:
    """Delete a profile. Trains that were started with it keep their values."""
    from configs.profiles import delete_profile

    delete_profile(name, load_settings())
    print(f"{name} is deleted; the trains that were started with it keep its values")
    match_deployments()
