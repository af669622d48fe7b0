"""`tuneline trains`: list, show, log, cancel, resume, copy, reproduce, compare; how a train is started and shown."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from configs.scoring import are_scores_of_answers, figure_title
from configs.settings import load_settings
from flows.printing import (
    MAIN_FIGURES,
    print_block,
    print_differences,
    print_fields,
    print_json,
    print_scores,
    print_table,
    print_warning,
    print_wrapped,
)

if TYPE_CHECKING:
    from configs.endpoints import Endpoint
    from configs.records import ModelRecord, QueueName, TrainRecord
    from configs.resolve import ResolvedTrain
    from tasks.comparing import Comparison
    from tasks.reproducing import Reproduction
    from tasks.train_checkpoints import TrainCheckpoint

_SHOWN_SAMPLES = 3
LEAST_FREE = 64 * 2**20  # two fresh databases, with room for the records of some trains

app = typer.Typer(help="Trains: what ran, how it went, and running it again.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Train = Annotated[str, typer.Argument(metavar="TRAIN", help="Id of a train, or its name for the newest.")]
Sets = Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Change a parameter; repeatable.")]


def embedded() -> None:
    """Point this process at the servers that run, or at the embedded ones; before Prefect or MLflow is imported.

    Raises UserError if nothing can be written to the home folder.
    """
    from deployments.services import connect

    settings = load_settings()
    _require_room(settings.root)
    connect(settings)


def _require_room(home: Path) -> None:
    """Databases that cannot grow fail in the middle of everything, and tell it badly."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home).free
    except OSError as error:
        raise _unusable_home(home, error.strerror or str(error)) from error
    if not os.access(home, os.W_OK | os.X_OK):
        raise _unusable_home(home, "no permission to write")
    if free < LEAST_FREE:
        raise UserError(
            f"the disk is full: {free / 2**20:.0f} MiB are free, at least {LEAST_FREE / 2**20:.0f} MiB are needed",
            file=home,
            mend="free some space there, or set TUNELINE_HOME to a folder on a larger disk",
        )


def _unusable_home(home: Path, reason: str) -> UserError:
    return UserError(
        f"nothing can be written to the home folder: {reason}",
        file=home,
        field="TUNELINE_HOME",
        mend="set TUNELINE_HOME to a folder of your own",
    )


def show_configuration(resolved: ResolvedTrain) -> None:
    """Print every value with where it came from (defaults together, below the others), and what is worth telling."""
    from configs.resolve import DEFAULT, describe

    rows = [(name.removeprefix("hyperparameters."), _here(value), origin) for name, value, origin in describe(resolved)]
    given = [(name, value, _short_origin(origin)) for name, value, origin in rows if origin != DEFAULT]
    print_table(("Parameter", "Value", "From"), given, "every parameter has its default")
    print("\nDefaults:")
    print_wrapped([f"{name}: {value or '-'}" for name, value, origin in rows if origin == DEFAULT])
    print()
    for warning in resolved.warnings:
        print_warning(warning)


def _short_origin(origin: str) -> str:
    """A train has one file: its name and the line are enough, its folder stands in the command."""
    kind, _, place = origin.partition(" ")
    return f"{kind} {Path(place).name}" if kind == "file" else origin


def _here(text: str) -> str:
    """A path inside the working folder, as seen from there; any other text as it is."""
    path = Path(text)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else text


def check_first(resolved: ResolvedTrain) -> None:
    """Check method, base model and datasets before anything is begun, and print what the train will read."""
    from tasks.checking import check_train

    reports = check_train(resolved.config)
    _check_alerts(resolved)
    _warn_of_emulation(resolved)
    rows = [
        (name, f"{report.rows_kept} of {report.rows_read}", report.shape, _here(getattr(resolved.config, name)))
        for name, report in reports.items()
    ]
    print_table(("Rows", "Used", "Shape", "From"), rows, "no dataset")
    for report in reports.values():
        for kind, count in {**report.refused, **report.warnings}.items():
            print_warning(f"{_here(report.file)}: {count} rows: {kind.replace('_', ' ')}")


def _warn_of_emulation(resolved: ResolvedTrain) -> None:
    """Say before anything is begun that this host only emulates the number type that was chosen."""
    from methods.registry import find_method
    from tasks.hardware import dtype_warning

    config = resolved.config
    warning = dtype_warning(config.hyperparameters.dtype, find_method(config.method).stage_python("training"))
    if warning is not None:
        print_warning(warning)


def _check_alerts(resolved: ResolvedTrain) -> None:
    """Refuse a channel that there is not, and say what it means that no server stands by."""
    if not resolved.config.alerts:
        return
    embedded()
    from deployments.alerts import check_subscriptions, server_sends
    from deployments.guard import start_embedded_server

    start_embedded_server()
    check_subscriptions(resolved.config.alerts)
    if not server_sends():
        print_warning(
            "no Prefect server stands by: this process sends the alerts, and if it is killed they are sent when the "
            "next train begins; with `tuneline up` the server sends them"
        )


def start(resolved: ResolvedTrain, queue: QueueName = "default") -> TrainRecord:
    """Check a train, run it through to where it is to go, with a live line, and print what came out."""
    from configs.train import effective_through

    check_first(resolved)
    embedded()
    _run_flow(
        effective_through(resolved.config), {"train": resolved.config, "origins": resolved.origins, "queue": queue}
    )
    from tasks.trains import load_train

    record = load_train(resolved.config.name)
    show_outcome(record)
    return record


def tell_interrupted() -> None:
    """Close the trains whose processes are gone, and say how they go on."""
    from tasks.trains import list_trains

    if not any(record.status == "running" for record in list_trains()):
        return
    embedded()
    from tasks.lifecycle import settle

    for record in settle():
        again = f"`tuneline trains resume {record.id}` goes on from its newest checkpoint"
        print(f"{record.id} is {record.status}, {record.reason}; {again}")


def _run_flow(through: str, arguments: dict[str, Any]) -> ModelRecord | Endpoint:
    from tasks.progress import TerminalLine, in_terminal

    with in_terminal("starting") as progress:
        progress.phase = "Prefect and MLflow"
        from prefect import tags

        from deployments.automations import train_tag
        from deployments.flow_deployments import TAG
        from deployments.guard import start_embedded_server
        from deployments.work_pools import WORK_POOL
        from flows.complete import complete
        from flows.customized import customized
        from flows.deployed import deployed

        start_embedded_server()
    TerminalLine.on = True
    flows: dict[str, Callable[..., Any]] = {"customized": customized, "complete": complete, "deployed": deployed}
    # Watched by the shipped automations like a run of the page, where a server stands.
    with tags(TAG, train_tag(WORK_POOL)):
        result: ModelRecord | Endpoint = flows[through](**arguments)
    return result


def show_outcome(record: TrainRecord) -> None:
    """Print what a train made and how good it is."""
    from tasks.models import list_models

    made = [model.name for model in list_models() if model.train == record.id]
    became = {name: f"{each.value} ({each.origin}: {each.reason})" for name, each in record.resolved.items()}
    print_fields(
        {
            "train": record.id,
            "status": record.status,
            "models": "\n".join(made),
            **record.outcome,
            **became,
            "run": record.run_id,
        }
    )
    if record.stopped:
        print(record.stopped)
    if "tuned" in record.evaluation:
        print()
        print_evaluation(record.evaluation.get("base"), record.evaluation["tuned"])


def print_evaluation(base: Mapping[str, float] | None, tuned: Mapping[str, float]) -> None:
    """Print the scores of answers, or the figures of a method whose models give no text, before and after."""
    if are_scores_of_answers(tuned):
        print_scores(base, tuned, ("Base", "Fine-tuned"))
        return
    rows = [(figure_title(name), base.get(name) if base else None, value) for name, value in tuned.items()]
    print_table(("Figure", "Base", "Fine-tuned"), rows, "nothing was measured")


@contextmanager
def terminal_line(title: str) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A live line for a stage that runs outside a flow; yields the handler of its events."""
    from tasks.progress import in_terminal

    with in_terminal(title) as progress:
        yield progress.follow


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every train of this host, oldest first."""
    from tasks.trains import current_status, list_trains

    records = list_trains()
    if json_:
        print_json([{**record.model_dump(mode="json"), "status": current_status(record)} for record in records])
        return
    rows = [
        (
            record.id,
            _status_shown(record),
            record.config.method,
            record.base or record.config.base_model,
            record.dataset or record.config.dataset,
            record.outcome.get("loss"),
            record.evaluation.get("tuned", {}).get("accuracy"),
            record.created,
        )
        for record in records
    ]
    columns = ("Train", "Status", "Method", "Base model", "Dataset", "Loss", "Accuracy %", "Created")
    print_table(columns, rows, "no trains yet; `tuneline train FILE` starts one")


def _status_shown(record: TrainRecord) -> str:
    from tasks.trains import current_status

    status = current_status(record)
    return record.waiting if status == "running" and record.waiting else status


@app.command()
def show(train: Train, json_: Json = False) -> None:
    """One train: parameters with their origins, models, scores."""
    from configs.resolve import ResolvedTrain
    from tasks.trains import current_status, load_train, sync_curves

    record = load_train(train)
    embedded()
    status = current_status(record)
    if status != "running":
        sync_curves(record)
    if json_:
        print_json({**record.model_dump(mode="json"), "status": status, "checkpoints": _checkpoints(record)})
        return
    show_configuration(ResolvedTrain(config=record.config, origins=record.origins))
    show_outcome(record.model_copy(update={"status": status}))
    _show_checkpoints(record)
    if status == "running" and record.waiting:
        print(record.waiting)
    if record.reason:
        print(f"reason: {record.reason}")


def _checkpoints(record: TrainRecord) -> list[dict[str, Any]]:
    from tasks.train_checkpoints import train_checkpoints

    return [each.model_dump(mode="json") for each in train_checkpoints(record)]


def _show_checkpoints(record: TrainRecord) -> None:
    from tasks.train_checkpoints import train_checkpoints

    kept = train_checkpoints(record)
    if not kept:
        return
    names = list(dict.fromkeys(name for each in kept for name in each.figures))
    rows = [
        (each.step, *(each.figures.get(name) for name in names), f"{each.size / 2**20:.1f} MiB", _mark(each, kept[-1]))
        for each in kept
    ]
    print()
    print_table(("Step", *names, "Size", ""), rows, "", title="Checkpoints")
    print(f"`tuneline save {record.id} --checkpoint STEP` makes a model of one")


def _mark(each: TrainCheckpoint, last: TrainCheckpoint) -> str:
    return ", ".join(name for name, holds in (("best", each.best), ("last", each is last)) if holds)


@app.command()
def log(
    train: Train, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the train ends.")] = False
) -> None:
    """The log of a train."""
    from methods.contract import LOG_FILE
    from tasks.trains import current_status, load_train, train_folder

    record = load_train(train)
    path = train_folder(record.id) / "training" / LOG_FILE
    if not path.exists() and not follow:
        raise UserError("this train has no log yet", field="train", value=record.id)
    offset = 0
    while True:
        running = current_status(load_train(record.id)) == "running"
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                text = file.read()
            offset += len(text)
            print(text.decode("utf-8", errors="replace"), end="", flush=True)
        if not (follow and running):
            return
        time.sleep(0.5)


@app.command()
def cancel(train: Train) -> None:
    """Ask a running train to save a checkpoint and stop."""
    from tasks.trains import cancel_train, load_train

    record = load_train(train)
    cancel_train(record)
    print(f"{record.id} was asked to stop; `tuneline trains resume {record.id}` goes on from its checkpoint")


@app.command()
def resume(train: Train) -> None:
    """Go on with a cancelled, failed or killed train. From its newest checkpoint."""
    from configs.train import effective_through
    from tasks.trains import current_status, load_train

    record = load_train(train)
    status = current_status(record)
    if status in ("running", "completed"):
        raise UserError(f"this train is {status}", field="train", value=record.id)
    embedded()
    _run_flow(effective_through(record.config), {"resume": record.id})
    show_outcome(load_train(record.id))


@app.command()
def copy(
    train: Train,
    set_: Sets = [],  # noqa: B006 - typer reads the default, nobody changes it
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; else it is printed.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Start the copy as well.")] = False,
) -> None:
    """The configuration of a train as a file, with changes. The way to try one thing differently."""
    from configs.resolve import COPIED_FROM, resolve_train
    from tasks.files import write_text
    from tasks.reproducing import pinned_config
    from tasks.tracking import train_yaml
    from tasks.trains import load_train

    record = load_train(train)
    resolved = resolve_train(None, set_, copied=pinned_config(record), copied_from=record.id)
    text = f"{COPIED_FROM}: {record.id}\n{train_yaml(resolved.config)}"
    if output is not None:
        write_text(output, text)
        print(f"written to {output}; `tuneline train {output}` starts it")
    elif not run:
        print(text, end="")
    if run:
        show_configuration(resolved)
        start(resolved)


@app.command()
def reproduce(train: Train, json_: Json = False) -> None:
    """Run a train again from its record alone. Then tell whether curves, scores and answers agree; code 1 if not."""
    from configs.train import effective_through
    from tasks.checking import check_train
    from tasks.reproducing import compare_reproduction, reproduction_config
    from tasks.trains import load_train

    original = load_train(train)
    resolved = reproduction_config(original)
    if json_:
        check_train(resolved.config)
    else:
        show_configuration(resolved)
        check_first(resolved)
    embedded()
    model: Any = _run_flow(
        effective_through(resolved.config),
        {"train": resolved.config, "origins": resolved.origins, "queue": original.queue},
    )
    found = compare_reproduction(original, load_train(model.train))
    if json_:
        print_json(found.model_dump(mode="json"))
    else:
        _show_reproduction(found)
    if found.agreement == "different":
        raise typer.Exit(1)


def _show_reproduction(found: Reproduction) -> None:
    told = {
        "same": "has the very numbers of",
        "close": "has almost the numbers of",
        "different": "has other numbers than",
    }
    rows = [(name, each.points, each.agreement, each.largest, each.step) for name, each in found.curves.items()]
    print()
    print_table(("Curve", "Points", "It is", "Largest difference", "From step"), rows, "no curve")
    differing = [(name, *pair) for name, pair in found.figures.items() if pair[0] != pair[1]]
    print()
    print_table(("Figure", found.original, found.again), differing, f"all {len(found.figures)} figures are the same")
    if found.answers:
        print(f"\n{found.answers_same} of {found.answers} answers are the same")
    for name, column in found.versions.items():
        print_warning(f"{name} differs: {column[0]}, then {column[1]}")
    print(f"\n{found.agreement}: {found.again} {told[found.agreement]} {found.original}")


@app.command()
def compare(
    trains: Annotated[list[str], typer.Argument(metavar="TRAIN...", help="Two or more; the first is the yardstick.")],
    metric: Annotated[str, typer.Option(help="Figure that says which is better, such as accuracy or rouge_l.")] = "f1",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="HTML page of it; by default below the home.")
    ] = None,
    json_: Json = False,
) -> None:
    """Trains side by side. Parameters that differ, curves, scores with intervals, answers, versions."""
    from configs.scoring import RULE_METRICS
    from tasks.comparing import compare_kept
    from tasks.trains import load_train

    if metric not in RULE_METRICS:
        raise UserError("there is no such metric", field="--metric", value=metric, expected=", ".join(RULE_METRICS))
    if len(trains) < 2:
        raise UserError("comparing needs at least two trains", field="TRAIN", value=trains)
    records = [load_train(train) for train in trains]
    if len({record.id for record in records}) < len(records):
        raise UserError("a train is named twice", field="TRAIN", value=trains)
    show_comparison(compare_kept(records, metric), records, output, json_)


def show_comparison(
    comparison: Comparison, records: Sequence[TrainRecord], output: Path | None = None, json_: bool = False
) -> None:
    """Write the page of a comparison, and print it: what differs, what came out, which is better."""
    from tasks.comparing_report import as_page
    from tasks.files import write_text

    mlflow = _compare_page(records, comparison.verdicts)
    page = output or load_settings().comparisons / f"{_joined(comparison.trains)}.html"
    write_text(page, as_page(comparison, records, mlflow))
    if json_:
        print_json({**comparison.model_dump(mode="json"), "mlflow": mlflow, "page": str(page)})
        return
    columns = ("", *comparison.trains)
    differing = [(name, *values) for name, values in comparison.parameters.items()]
    print_table(columns, differing, "no parameter differs", title="Parameters that differ")
    figures = [(name, *values) for name, values in comparison.figures.items()]
    print()
    print_table(columns, figures, "no figures yet", title="Outcome")
    print()
    print_table(columns, [(name, *values) for name, values in comparison.versions.items()], "", title="Versions")
    for train, differences in comparison.differences.items():
        print()
        print_differences([each for each in differences if each.metric in MAIN_FIGURES], (comparison.trains[0], train))
    print()
    for sample in comparison.samples[:_SHOWN_SAMPLES]:
        answers = [f"{train}: {answer}" for train, answer in zip(comparison.trains, sample.answers, strict=True)]
        print_block(f"{sample.row}. {sample.prompt}", f"expected: {sample.reference}", *answers)
    print(f"\n{comparison.verdict}")
    print(f"\nWith the curves: {page}")
    if mlflow is not None:
        print(f"In MLflow: {mlflow}")


def _joined(trains: Sequence[str]) -> str:
    """A name for the page: the first two, and a mark of all where there are more."""
    named = "_and_".join(trains[:2])
    return named if len(trains) == 2 else f"{named}_{hashlib.sha256(' '.join(trains).encode()).hexdigest()[:8]}"


def _compare_page(records: Sequence[TrainRecord], verdicts: Mapping[str, str]) -> str | None:
    """The address of MLflow's page, which then shows the verdicts too, if its server runs; the figures need none."""
    from deployments.services import addresses

    if addresses(load_settings()).mlflow is None and not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        return None
    embedded()
    from mlflow.exceptions import MlflowException

    from tasks.tracking import compare_page, log_verdicts

    try:
        log_verdicts({record.run_id: verdicts[record.id] for record in records if record.id in verdicts})
        return compare_page([record.run_id for record in records])
    except MlflowException as error:
        print_warning(f"MLflow does not tell where these trains are: {str(error)[:300]}")
        return None
