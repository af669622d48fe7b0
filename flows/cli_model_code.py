"""`tuneline models code`, `allow-code`, `revoke-code`, `allowed-code`, `convert`: what a model's files bring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import UserError
from configs.settings import load_settings
from flows.printing import print_fields, print_json, print_table, print_warning

if TYPE_CHECKING:
    from tasks.code_listing import ListedCode

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Model = Annotated[
    str, typer.Argument(help="Name, folder, or OWNER/NAME on the hub, with @REVISION if it is not the newest.")
]
_TYPED = 8


@app.command()
def code(
    model: Model,
    source: Annotated[bool, typer.Option("--source", help="Print the source of every file.")] = False,
    json_: Json = False,
) -> None:
    """Show the Python code that a model brings, and its digest. Nothing of it is run."""
    from tasks.code_listing import list_code

    listed = list_code(model, load_settings())
    if json_:
        print_json(_as_json(listed))
    elif source:
        _print_paged(_sources(listed))
    else:
        _print_listed(listed)


@app.command("allow-code")
def allow(
    model: Model,
    yes: Annotated[
        str | None, typer.Option("--yes", metavar="DIGEST", help="Allow without asking, if this is the digest.")
    ] = None,
) -> None:
    """Allow the Python code of a model that you have read. It runs with all your rights."""
    from configs.remote_code import allow_code
    from tasks.code_listing import list_code

    settings = load_settings()
    listed = list_code(model, settings)
    _print_listed(listed)
    _confirm(listed, model, yes)
    allow_code(listed.entry, listed.code.digest, settings)
    print(f"{listed.entry} is allowed ({settings.allowed_code})")


@app.command("revoke-code")
def revoke(entry: Annotated[str, typer.Argument(help="sha256:DIGEST or OWNER/NAME@COMMIT, as it is listed.")]) -> None:
    """Take code off the list. Trains, questions and servers that begin later are refused it."""
    from configs.remote_code import revoke_code

    settings = load_settings()
    if not revoke_code(entry, settings):
        raise UserError(
            "this code is not allowed, so there is nothing to revoke",
            file=settings.allowed_code,
            field="entry",
            value=entry,
            mend="`tuneline models allowed-code` shows the list",
        )
    print(f"{entry} is no longer allowed")


@app.command("allowed-code")
def allowed(json_: Json = False) -> None:
    """List the code of models that you allow."""
    from configs.remote_code import read_allowed_code

    settings = load_settings()
    found = read_allowed_code(settings)
    if json_:
        print_json(found.model_dump(mode="json"))
        return
    rows = [(entry, found.pinned.get(entry, entry)) for entry in found.allow_remote_code]
    print_table(("Allowed", "Digest"), rows, f"no code is allowed ({settings.allowed_code})")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder with pytorch_model.bin, or OWNER/NAME[@REVISION] on the hub.")],
    to: Annotated[Path | None, typer.Option(help="Folder to write; by default one in Tuneline's home.")] = None,
    json_: Json = False,
) -> None:
    """Convert pytorch_model*.bin to safetensors. The process has no network, no keys and loads no pickled code."""
    from tasks.bin_weights import convert_model

    done = convert_model(model, to, load_settings())
    if json_:
        print_json(done.model_dump(mode="json"))
        return
    print_fields(done.model_dump())
    print(f"every tensor was compared with its source; to use it: tuneline models add NAME --path {done.folder}")


def _confirm(listed: ListedCode, model: str, yes: str | None) -> None:
    """Return if the user consents to this very digest. Raises UserError otherwise."""
    digest = listed.code.digest
    if yes is None and sys.stdin.isatty():
        print(f"\nRead it: tuneline models code {model} --source   (or the files in {listed.folder})")
        yes = typer.prompt(f"To allow it, type the first {_TYPED} digits of the digest").strip()
        if yes == digest.removeprefix("sha256:")[:_TYPED]:
            return
    if yes != digest:
        raise UserError(
            "the code is not allowed: consent names its digest",
            field="--yes",
            value=yes,
            expected=digest,
            mend=f"read it: `tuneline models code {model} --source`",
        )


def _print_listed(listed: ListedCode) -> None:
    from tasks.code_listing import warnings_of

    rows = [(file.name, file.size, file.sha256) for file in listed.code.files]
    print_table(("Python file", "Bytes", "sha256"), rows, "none", title=str(listed.folder))
    print()
    named = {f"{file} names": ", ".join(references) for file, references in listed.code.references.items()}
    print_fields({**named, "digest": listed.code.digest, "entry": listed.entry})
    if not listed.needed:
        print("\ntransformers has this architecture itself: without consent its own code is used")
    for file in listed.code.files:
        for warning in warnings_of(listed.source(file.name)):
            print_warning(f"{file.name}: {warning}")


def _print_paged(text: str) -> None:
    from click import echo_via_pager

    if sys.stdout.isatty():
        echo_via_pager(text)
    else:
        print(text)


def _as_json(listed: ListedCode) -> dict[str, object]:
    from tasks.code_listing import warnings_of

    return {
        "folder": listed.folder,
        "digest": listed.code.digest,
        "entry": listed.entry,
        "needed": listed.needed,
        "references": listed.code.references,
        "files": [
            {
                "name": file.name,
                "bytes": file.size,
                "sha256": file.sha256,
                "warnings": warnings_of(listed.source(file.name)),
            }
            for file in listed.code.files
        ],
    }


def _sources(listed: ListedCode) -> str:
    """The source of every file; control characters are shown as escapes, so that none can act on the terminal."""
    parts = []
    for file in listed.code.files:
        text = listed.source(file.name).decode("utf-8", errors="backslashreplace")
        shown = "".join(each if each.isprintable() or each in "\n\t" else f"\\x{ord(each):02x}" for each in text)
        parts.append(f"# ---- {file.name} ({file.sha256})\n{shown.rstrip()}\n")
    return "\n".join(parts)
