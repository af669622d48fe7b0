"""`tuneline targets`: what can serve a deployed model on this host, and installing what is built here."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flows.printing import print_json, print_table

app = typer.Typer(
    help="What can serve a deployed model on this host. Without a command: each, ready or not, its quantizations.",
    invoke_without_command=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.callback()
def list_(context: typer.Context, json_: Json = False) -> None:
    """Every deployment target: whether it is ready here, and how it can hold the weights with fewer bits."""
    if context.invoked_subcommand is not None:
        return
    from configs.endpoints import QUANTIZATIONS
    from tasks.targets import TARGETS

    missing = {name: target.ready() for name, target in TARGETS.items()}
    if json_:
        print_json(
            [
                {"target": name, "ready": missing[name] is None, "missing": missing[name], "quantizations": kinds}
                for name, kinds in QUANTIZATIONS.items()
            ]
        )
        return
    rows = [(name, missing[name] or "ready", ", ".join(kinds)) for name, kinds in QUANTIZATIONS.items()]
    print_table(("Target", "On this host", "Quantization"), rows, "none")


@app.command()
def install(
    target: Annotated[Literal["llama.cpp"], typer.Argument(help="The one that is built here.")],
    jobs: Annotated[int | None, typer.Option(help="Compilers at a time; by default one a core.", min=1)] = None,
) -> None:
    """Build llama.cpp, once for this host. From the source in its package; takes minutes and a C++ compiler."""
    from tasks.llama_cpp import install as build

    found = build(jobs=jobs, say=print)
    print(f"{target} is ready: {found.folder}")
