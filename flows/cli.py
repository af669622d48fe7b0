"""The command line: `tuneline`.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from configs.endpoints import Quantization, Target
from configs.errors import UserError
from configs.records import QueueName
from configs.services import ServiceName
from configs.settings import load_settings
from flows import (
    cli_alerts,
    cli_datasets,
    cli_deployments,
    cli_environments,
    cli_inference,
    cli_methods,
    cli_model_code,
    cli_models,
    cli_presets,
    cli_profiles,
    cli_retraining,
    cli_scores,
    cli_sweeps,
    cli_targets,
    cli_trains,
)
from flows.printing import print_fields, print_json, print_table

if TYPE_CHECKING:
    from configs.records import ModelRecord

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_CANCELLED = 130
_ABOUT_THE_HOST = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Sets = Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter; repeatable.")]

app = typer.Typer(
    name="tuneline",
    help="From a base model and a dataset to a model people can call, with the record of how it got there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it goes into logs and manuals, and rich would show `<bool>` at every switch
)
app.add_typer(cli_trains.app, name="trains")
app.add_typer(cli_datasets.app, name="datasets")
cli_models.app.add_typer(cli_model_code.app)
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_methods.app, name="methods")
app.add_typer(cli_presets.app, name="presets")
app.add_typer(cli_profiles.app, name="profiles")
app.add_typer(cli_environments.app, name="envs")
app.add_typer(cli_deployments.app, name="deployments")
app.add_typer(cli_targets.app, name="targets")
app.add_typer(cli_alerts.app, name="alerts")
app.add_typer(cli_retraining.app, name="retrain")


@app.callback()
def common(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the log lines of Prefect and MLflow.")] = False,
) -> None:
    """Options of every command."""
    if not verbose:
        # The console only: the pages of Prefect show the lines of a run all the same.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")


@app.command()
def train(
    file: Annotated[
        Path | None, typer.Argument(help="YAML file of the train, or a method that is ready, such as sft-demo.")
    ] = None,
    set_: Sets = [],  # noqa: B006 - typer reads the default, nobody changes it
    preset: Annotated[str | None, typer.Option(help="Documented values to start from, such as nl2json.")] = None,
    profile: Annotated[str | None, typer.Option(help="Parameters saved with `tuneline profiles save`.")] = None,
    through: Annotated[str | None, typer.Option(help="How far: customized, complete or deployed.")] = None,
    queue: Annotated[QueueName, typer.Option(help="Who gets a GPU first where several trains wait.")] = "default",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and start nothing.")] = False,
) -> None:
    """Train a model from a file, or as a method has it ready."""
    from configs.resolve import resolve_train
    from methods.registry import known_method

    overrides = [*set_, *([f"through={through}"] if through else [])]
    if file is not None and not file.exists() and known_method(str(file)) is not None:
        file, overrides = None, [f"method={file}", *overrides]
    resolved = resolve_train(file, overrides, preset=preset, profile=profile)
    cli_trains.show_configuration(resolved)
    if dry_run:
        cli_trains.check_first(resolved)
        print("this train would run; nothing was started")
        return
    cli_trains.start(resolved, queue)


app.command()(cli_sweeps.sweep)


@app.command()
def save(
    train: Annotated[str, typer.Argument(help="A train, or the customized model of one.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="STEP", help="Step of a checkpoint (`trains show` lists them), `best` or `last`."),
    ] = None,
) -> None:
    """Make the complete model of a train. Merged, verified, self-contained; one that has it already keeps it."""
    if checkpoint is not None:
        _save_checkpoint(train, checkpoint)
        return
    found = cli_models.find(train)
    if found.stage == "complete" and found.parent is not None:
        found = cli_models.find(found.parent)
    if found.stage != "customized":
        raise UserError(
            f"only a customized model can be saved, and this is a {found.stage} one",
            field="train",
            value=train,
            expected="a train that left an adapter, or its customized model",
        )
    cli_trains.embedded()
    from flows.complete import complete

    model: ModelRecord = complete(model=found.name)
    print_fields({"complete model": model.name, "folder": model.path, **model.verification})


def _save_checkpoint(train: str, checkpoint: str) -> None:
    from tasks.train_checkpoints import chosen_step, train_of

    record = train_of(train)
    step = chosen_step(record, checkpoint)  # a mistake is reported before a flow begins
    cli_trains.embedded()
    from flows.complete import complete

    model: ModelRecord = complete(model=record.id, checkpoint=str(step))
    print_fields(
        {
            "complete model": model.name,
            "made of": model.parent,
            "step": step,
            "folder": model.path,
            **model.verification,
        }
    )


@app.command()
def deploy(
    model: Annotated[str, typer.Argument(help="A base, customized or complete model, LINE@ALIAS, or a train.")],
    target: Annotated[
        Target | None,
        typer.Option(metavar="TARGET", help=f"What serves it: {', '.join(get_args(Target))}; else the method's first."),
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="Endpoint; by default named after the model's line.")] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(metavar="KIND", help="Fewer bits here, in a way of the target's (`tuneline targets`); else none."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of a new endpoint; by default a free one from 8100.", min=1, max=65535)
    ] = None,
) -> None:
    """Serve a model behind an OpenAI-compatible endpoint. The one before it stays until this one is proved."""
    cli_models.find(model)  # a mistake is told before a flow is begun, which would be recorded
    endpoint = cli_deployments.checked_name(endpoint)
    cli_trains.embedded()
    from deployments.guard import start_embedded_server
    from flows.deployed import deployed

    start_embedded_server()
    served = deployed(model=model, endpoint=endpoint, target=target, quantization=quantization, port=port)
    cli_deployments.show(served)


@app.command()
def undeploy(endpoint: Annotated[str, typer.Argument(help="Name of the endpoint.")]) -> None:
    """Stop serving at an endpoint. Its address and history are kept."""
    from tasks.endpoints import load_endpoint

    load_endpoint(endpoint)
    cli_trains.embedded()
    from tasks.deploying import undeploy as stop

    stop(endpoint)
    print(f"nothing is served at {endpoint} any more; `tuneline deployments rollback {endpoint}` brings it back")


app.command()(cli_inference.infer)
app.command()(cli_scores.evaluate)
app.command()(cli_scores.score)


@app.command()
def up(
    worker_only: Annotated[
        bool, typer.Option("--worker-only", help="A worker of --pool alone, for servers elsewhere.")
    ] = False,
    pool: Annotated[str | None, typer.Option(help="Work pool of --worker-only, such as gpu-a100.")] = None,
    systemd: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Start nothing: write systemd units that would.")
    ] = None,
) -> None:
    """Start the Prefect server, the MLflow server and a worker. On loopback unless TUNELINE_HOST says otherwise."""
    from deployments.services import join, what_to_click
    from deployments.services import up as start

    if worker_only != (pool is not None):
        raise UserError("--worker-only and --pool belong together", mend="tuneline up --worker-only --pool gpu-a100")
    settings = load_settings()
    if systemd is not None:
        from deployments.systemd import how_to_install, write_units

        print(how_to_install(write_units(settings, systemd, pool)))
        return
    _show_services(start(settings) if pool is None else join(settings, pool))
    cli_trains.tell_interrupted()
    print(what_to_click(settings))


@app.command()
def serve(
    service: Annotated[ServiceName, typer.Argument(help="Which one.")],
    pool: Annotated[str, typer.Option(help="Work pool of a worker.")] = "tuneline",
) -> None:
    """Run one service in the foreground, as systemd units do."""
    from deployments.serving import serve as run

    run(load_settings(), service, pool)


@app.command()
def down() -> None:
    """Stop exactly what `up` started."""
    from deployments.services import down as stop

    _show_services(stop(load_settings()))


@app.command()
def status(json_: Json = False) -> None:
    """What is running: servers, trains, endpoints, GPU holders."""
    from deployments.services import status as told
    from tasks.endpoints import list_endpoints
    from tasks.gpus import slot_states, waiting_trains
    from tasks.trains import current_status, list_trains

    services = told(load_settings())
    running = [record for record in list_trains() if current_status(record) == "running"]
    endpoints = list_endpoints()
    slots, waiting = slot_states(load_settings()), waiting_trains(load_settings())
    if json_:
        print_json(
            {
                "services": [item.model_dump(mode="json") for item in services],
                "trains": [record.id for record in running],
                "endpoints": [item.model_dump(mode="json") for item in endpoints],
                "gpus": [slot.model_dump(mode="json") for slot in slots],
                "waiting": [ticket.model_dump(mode="json") for ticket in waiting],
            }
        )
        return
    _show_services(services)
    print()
    print_table(("Running train", "Since"), [(r.id, r.created) for r in running], "no train is running")
    print()
    held = [(slot.device, slot.holder and slot.holder.train, slot.holder and slot.holder.since) for slot in slots]
    print_table(("GPU", "Held by", "Since"), held, "no GPU for trains on this host")
    if waiting:
        rows = [(ticket.train, ticket.gpus, ticket.queue, ticket.created) for ticket in waiting]
        print_table(("Waiting train", "GPUs", "Queue", "Since"), rows, "")
    print()
    cli_deployments.show_all(endpoints)


@app.command("deploy-flows")
def deploy_flows(json_: Json = False) -> None:
    """Make the Prefect page match this installation. Its methods, their forms, its base models."""
    from deployments.flow_deployments import deploy_flows as apply
    from deployments.services import running_prefect_api

    settings = load_settings()
    changes = apply(settings, running_prefect_api(settings))
    if json_:
        print_json([item.model_dump() for item in changes])
        return
    print_table(("Deployment", ""), [(item.deployment, item.change) for item in changes], "no deployments")


@app.command()
def doctor(json_: Json = False) -> None:
    """Check this host: versions, hardware, disk, ports."""
    from deployments.doctor import diagnose

    checks = diagnose(load_settings())
    if json_:
        print_json([check.model_dump(mode="json") for check in checks])
    else:
        rows = [("✓" if c.ok else "✗", c.name, c.found, None if c.ok else c.mend) for c in checks]
        print_table(("", "Check", "Found", "To mend"), rows, "nothing to check")
    if not all(check.ok for check in checks):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def demo() -> None:
    """The whole main job on a small real model. It trains, scores, merges, deploys, asks."""
    cli_trains.embedded()
    from flows.demo import run_demo

    run_demo()


def _show_services(services: list[Any]) -> None:
    rows = [(item.name, item.pool, item.state, item.address, item.pid) for item in services]
    print_table(("Service", "Pool", "State", "Address", "Process"), rows, "nothing is running")


def main() -> None:
    """Run the command line; 0 only if it worked, 2 for a mistake of the user, 1 for a failure, 130 if cancelled."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)
    except SystemExit as end:
        if end.code == EXIT_CANCELLED:  # Ctrl-C
            print("interrupted; what was finished is kept", file=sys.stderr)
        raise
    except Exception as error:
        sys.exit(_failure(error))


def _failure(error: Exception) -> int:
    """Tell a stage's end, or what the system refused, without our own traceback; a defect keeps it."""
    from tasks.stages import StageCancelled, StageFailed

    if isinstance(error, StageCancelled):
        print("cancelled; `tuneline trains resume` goes on from the checkpoint", file=sys.stderr)
        return EXIT_CANCELLED
    if isinstance(error, StageFailed):
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(error, OSError) and error.filename is not None and error.errno in _ABOUT_THE_HOST:
        mend = "make that path writable, free disk space, or choose another home: TUNELINE_HOME=/a/folder"
        print(f"error: {UserError(str(error.strerror), file=error.filename, mend=mend)}", file=sys.stderr)
        return EXIT_USER
    raise error


if __name__ == "__main__":
    main()
