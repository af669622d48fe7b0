"""`tuneline deployments`: what is served, its log, going back to an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import UserError
from configs.scoring import SCORE_TITLES
from flows.printing import print_fields, print_json, print_table, print_warning

if TYPE_CHECKING:
    from configs.endpoints import Endpoint, EndpointStatus, Verification

app = typer.Typer(
    help="Endpoints and what is served at them. Without a command: every endpoint, its model, whether it answers.",
    invoke_without_command=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
_COMPARED = {"tokens": "every token", "counts": "number of tokens", "nothing": "not told by the server"}
Name = Annotated[str, typer.Argument(metavar="ENDPOINT", help="Name of the endpoint.")]


@app.callback()
def list_(context: typer.Context, json_: Json = False) -> None:
    """Every endpoint with its address, its model and whether it answers."""
    if context.invoked_subcommand is not None:
        return
    from tasks.endpoints import list_endpoints

    endpoints = list_endpoints()
    if json_:
        print_json([item.model_dump(mode="json") for item in endpoints])
        return
    show_all(endpoints)


@app.command()
def log(
    endpoint: Name,
    lines: Annotated[int, typer.Option(help="How many of the last lines.", min=1)] = 200,
    gateway: Annotated[bool, typer.Option("--gateway", help="The log of the address instead of the model's.")] = False,
) -> None:
    """The log of an endpoint's model server."""
    from tasks.endpoints import endpoint_log

    print(endpoint_log(endpoint, source="gateway" if gateway else "model", lines=lines))


@app.command()
def rollback(
    endpoint: Name, to: Annotated[str | None, typer.Option(help="Deployed model; by default the one before.")] = None
) -> None:
    """Go back to the deployment before the current one."""
    from flows.cli_trains import embedded
    from tasks.endpoints import load_endpoint

    load_endpoint(endpoint)
    embedded()
    from tasks.deploying import roll_back

    show(roll_back(endpoint, to))


@app.command()
def restart(endpoint: Name) -> None:
    """Start again what is down of an endpoint. After the host was restarted, say."""
    from tasks.endpoints import restart as bring_up

    show(bring_up(endpoint))


@app.command()
def key(endpoint: Name) -> None:
    """Set or remove the endpoint's API key. It is the one in TUNELINE_ENDPOINT_KEY; removed if that is not set."""
    from tasks.endpoints import set_api_key

    changed = set_api_key(endpoint)
    print(f"{endpoint} {'asks for its key' if changed.api_key_sha256 else 'needs no key'} from now on")


@app.command()
def evaluate(
    endpoints: Annotated[
        list[str], typer.Argument(metavar="ENDPOINT", help="Endpoints; several are printed side by side.")
    ],
    dataset: Annotated[str, typer.Option(help="A file, or the name of a dataset.")],
    prompt_column: Annotated[str | None, typer.Option(help="Column of the prompt.")] = None,
    completion_column: Annotated[str | None, typer.Option(help="Column of the expected answer.")] = None,
    samples: Annotated[int, typer.Option(help="How many rows; -1 for all.", min=-1)] = -1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    json_: Json = False,
) -> None:
    """Score what endpoints answer to a dataset; recorded in MLflow.

    Endpoints that ask for a key are given the one in TUNELINE_ENDPOINT_KEY.
    """
    from configs.datasets import Columns, Wanted
    from flows.cli_trains import embedded, terminal_line
    from tasks.datasets import resolve_dataset
    from tasks.endpoints import load_endpoint
    from tasks.evaluation import endpoint_kinds, evaluate_endpoint
    from tasks.inference import Generation

    found = [load_endpoint(name) for name in endpoints]
    columns = Columns(prompt=prompt_column, completion=completion_column)
    kinds = [endpoint_kinds(endpoint) for endpoint in found]
    common = tuple(kind for kind in kinds[0] if all(kind in others for others in kinds))
    version = resolve_dataset(dataset, columns, wanted=Wanted("evaluation", common))
    embedded()
    generation = Generation(max_new_tokens=max_new_tokens)
    outcomes = []
    for endpoint in found:
        with terminal_line(f"evaluating {endpoint.name}") as follow:
            outcomes.append(evaluate_endpoint(endpoint, version, generation, samples, follow))
    if json_:
        told = (
            {"model": item.model, "dataset": item.dataset, **item.scores.model_dump(), "failed": item.failed}
            for item in outcomes
        )
        print_json([{"endpoint": one.name, **scores} for one, scores in zip(found, told, strict=True)])
        return
    for endpoint, outcome in zip(found, outcomes, strict=True):
        print(f"{endpoint.name}: {outcome.model}")
    rows = [
        (title, *(f"{outcome.figures[name]:.2f}" for outcome in outcomes))
        for name, title in SCORE_TITLES.items()
        if name in outcomes[0].figures
    ]
    print_table(("Score in percent", *(endpoint.name for endpoint in found)), rows, "nothing was scored")
    for endpoint, outcome in zip(found, outcomes, strict=True):
        if outcome.failed:
            reason = next(iter(outcome.failed.values()))
            print_warning(f"{endpoint.name} answered {outcome.rows} rows, {len(outcome.failed)} failed: {reason}")
    print(f"{outcomes[0].rows} rows of {outcomes[0].dataset}; {outcomes[0].scores.tokeniser}")


def checked_name(endpoint: str | None) -> str | None:
    """The name of an endpoint to deploy to, as it is. Raises UserError if it can be none."""
    from pydantic import TypeAdapter, ValidationError

    from configs.endpoints import EndpointName

    try:
        TypeAdapter(EndpointName | None).validate_python(endpoint)
    except ValidationError as error:
        raise UserError(
            "this is no name for an endpoint",
            field="--endpoint",
            value=endpoint,
            expected="a-z, 0-9 and - inside (at most 63), as in a host name",
        ) from error
    return endpoint


def show(endpoint: Endpoint) -> None:
    """Print what is served where."""
    current = endpoint.current_deployment
    proof = current.verification if current else None
    print_fields(
        {
            "endpoint": endpoint.name,
            "address": endpoint.address,
            "model": endpoint.current,
            "verified": proof and _told(proof),
            "note": "; ".join(current.notes) if current and current.notes else None,
        }
    )


def _told(proof: Verification) -> str:
    prompts = f"{proof.prompts_checked} prompts ({_COMPARED[proof.prompts_compared]})"
    if proof.answers_same is not None:
        return f"{prompts} equal the model's own; {proof.answers_same} answers stayed the same: {proof.answers_skipped}"
    skipped = f" ({proof.answers_skipped})" if proof.answers_skipped else ""
    return f"{prompts} and {proof.answers_checked} answers equal the model's own{skipped}"


def show_all(endpoints: Sequence[EndpointStatus]) -> None:
    """Print the endpoints as a table."""
    rows = [(e.name, e.address, e.current, e.state) for e in endpoints]
    print_table(("Endpoint", "Address", "Model", "State"), rows, "nothing is deployed; `tuneline deploy MODEL`")
