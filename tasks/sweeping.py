"""The verbs of a sweep: plan its trains, run them a few at a time, compare them and name the best one.

Each can be repeated: a sweep is known by what it trains, and its trains' own records say how far each has come.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.records import QueueName, TrainRecord
from configs.resolve import ResolvedTrain, resolve_train
from configs.scoring import DEFAULT_CONFIDENCE, LOWER_IS_BETTER, RULE_METRICS
from configs.settings import PROJECT_ROOT, load_settings
from configs.sweeps import (
    MOST_TRAINS,
    SECTION,
    Standing,
    Sweep,
    SweepMember,
    SweepOutcome,
    SweepSection,
    Swept,
    read_grid,
    read_section,
    told,
)
from configs.train import DATASETS, TrainConfig, effective_through
from methods import contract
from tasks import models, tracking, trains
from tasks.comparing import Comparison, compare_kept
from tasks.evaluation import read_evaluation
from tasks.files import held, read_record, write_record, write_text
from tasks.gpus import host_slots, wanted_gpus
from tasks.plots import curves_of
from tasks.scored_files import compare_row_scores
from tasks.stages import EventTail

SWEEP_FILE = "sweep.json"
OUTCOME_FILE = "outcome.json"
COMPARISON_FILE = "comparison.html"
VALIDATION_LOSS = "eval_loss"
_SCORE_OF_ANSWERS = "f1"
_POLL_SECONDS = 0.5
_LENGTHS = ("max_seq_length", "max_input_length", "max_content_length", "over_length")

Teller = Callable[[SweepMember, TrainRecord | None], None]


# --- the plan ----------------------------------------------------------------------------------------------


def plan_sweep(
    source: str,
    over: Sequence[str] = (),
    changes: Sequence[str] = (),
    *,
    by: str | None = None,
    at_once: int | None = None,
    queue: QueueName = "default",
) -> Sweep:
    """The trains of a sweep, each configuration checked; the same request gives the same id.

    `source` is a train file, or a train to start from. `over` are `NAME=VALUE,VALUE,...`, of which every combination is
    a train; without any, the file's own section counts. `changes` are `name=value` for all of them. Raises UserError.
    """
    file = Path(source) if Path(source).suffix in (".yaml", ".yml") else None
    section, line = read_section(file) if file is not None else (SweepSection(), None)
    if over:
        swept = [Swept(point) for point in SweepSection(grid=read_grid(over)).points]
    else:
        swept = [Swept(point, file, line) for point in section.points]
    _check_number(swept)
    copied = trains.load_train(source) if file is None else None
    members = [_member(number, each, file, copied, changes) for number, each in enumerate(swept, start=1)]
    _check_members(members)
    first = members[0].config
    return Sweep(
        id=_sweep_id(members),
        name=first.name,
        by=by or section.by or _figure_to_compare_by(first),
        at_once=at_once or section.at_once or _at_once(first),
        queue=queue,
        members=members,
    )


def _check_number(swept: Sequence[Swept]) -> None:
    if not swept:
        raise UserError(
            "nothing says what is swept",
            field="--over",
            expected="values to try, such as --over learning_rate=1e-5,1e-4,1e-3, or a `sweep:` section in the file",
        )
    if not 2 <= len(swept) <= MOST_TRAINS:
        raise UserError(
            "a sweep has at least two trains" if len(swept) < 2 else "these are more trains than a sweep may have",
            field="sweep",
            value=f"{len(swept)} trains",
            expected=f"2 to {MOST_TRAINS}",
        )


def _member(
    number: int, swept: Swept, file: Path | None, copied: TrainRecord | None, changes: Sequence[str]
) -> SweepMember:
    content = copied.config.model_dump(mode="json") if copied is not None else None
    found: ResolvedTrain = resolve_train(
        file, changes, copied=content, copied_from=copied.id if copied is not None else None, swept=swept
    )
    return SweepMember(number=number, values=swept.values, **found.model_dump())


def _check_members(members: Sequence[SweepMember]) -> None:
    known: dict[str, SweepMember] = {}
    for member in members:
        if member.config.name != members[0].config.name:
            raise UserError(
                "the trains of a sweep have one name: their models are versions of one line",
                field="name",
                value=member.config.name,
                mend="leave the name out of the sweep",
            )
        if effective_through(member.config) == "deployed":
            raise UserError(
                "a sweep deploys nothing",
                field="through",
                value="deployed",
                mend="leave it out; afterwards `tuneline deploy LINE@challenger` deploys the best one",
            )
        same = known.setdefault(member.config.model_dump_json(), member)
        if same is not member:
            raise UserError(
                "two trains of the sweep are the same",
                field="sweep",
                value=f"{told(same.values)} and {told(member.values)}",
                mend="leave one of them out",
            )


def _sweep_id(members: Sequence[SweepMember]) -> str:
    """The name and a digest of what is trained, rows included: with other rows in a file it is another sweep."""
    content = [member.config.model_dump(mode="json") for member in members]
    files = {getattr(member.config, field) for member in members for field in DATASETS} - {None}
    rows = {file: _digest(Path(file)) for file in sorted(files) if Path(file).is_file()}
    text = json.dumps([content, rows], sort_keys=True)
    return f"{members[0].config.name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _figure_to_compare_by(config: TrainConfig) -> str | None:
    if config.evaluation_dataset is not None:
        return None  # what is measured on its rows is known when they were
    if config.validation_dataset is not None or config.validation_split is not None:
        return VALIDATION_LOSS
    raise UserError(
        "nothing says which train is the best: there are neither evaluation nor validation rows",
        field="evaluation_dataset",
        expected="held-out rows, to score each train on",
        mend="give evaluation_dataset, validation_dataset or validation_split",
    )


def _at_once(config: TrainConfig) -> int:
    """As many trains as the host's GPUs have room for; one where there are none."""
    wanted = wanted_gpus(config)
    return max(1, len(host_slots()) // wanted) if wanted else 1


def doubts(sweep: Sweep) -> list[str]:
    """What makes the figure that the sweep is decided by say less than it seems to."""
    if sweep.by is None or not sweep.by.endswith(("loss", "eval_perplexity")):
        return []
    swept = {name for member in sweep.members for name, origin in member.origins.items() if origin == SECTION}
    others = sorted(name for name in swept if _changes_the_loss(name, sweep.members[0].config))
    if not others:
        return []
    return [
        f"{', '.join(others)} may change what {sweep.by} measures, by which the best is found; an evaluation_dataset, "
        "or another figure, says more"
    ]


def _changes_the_loss(name: str, config: TrainConfig) -> bool:
    """Whether the validation loss of trains that differ in it is of another kind, or of other rows."""
    group, _, hyper = name.rpartition(".")
    if group != "hyperparameters":
        return True
    return hyper in _LENGTHS or (hyper == "seed" and config.validation_split is not None)


# --- its folder --------------------------------------------------------------------------------------------


def sweep_folder(sweep_id: str) -> Path:
    """The folder of what is kept about a sweep. Raises UserError for an id that would leave the store."""
    root = load_settings().sweeps
    folder = root / sweep_id
    if folder.parent != root or sweep_id in (".", ".."):
        raise UserError("this is no id of a sweep", field="sweep", value=sweep_id)
    return folder


def save_sweep(sweep: Sweep) -> Sweep:
    """Write what is to be trained to the sweep's folder; one that was begun keeps the time at which it was."""
    path = sweep_folder(sweep.id) / SWEEP_FILE
    if path.exists():
        sweep = sweep.model_copy(update={"created": read_record(path, Sweep).created})
    write_record(path, sweep)
    return sweep


def load_sweep(sweep_id: str) -> Sweep:
    """A sweep that was begun. Raises UserError if there is none."""
    path = sweep_folder(sweep_id) / SWEEP_FILE
    if not path.exists():
        raise UserError("there is no such sweep", field="sweep", value=sweep_id)
    return read_record(path, Sweep)


@contextlib.contextmanager
def holding(sweep_id: str) -> Iterator[None]:
    """Hold the sweep for one process. Raises UserError if another one has it; the system frees it however that ends."""
    with held(sweep_folder(sweep_id)) as free:
        if not free:
            raise UserError(
                "this sweep is already running", field="sweep", value=sweep_id, mend="wait for it, or stop it"
            )
        yield


def trains_of(sweep: Sweep) -> dict[int, TrainRecord]:
    """The trains that the sweep has begun, by number; the newest of each."""
    found = [record for record in trains.list_trains() if record.sweep is not None and record.sweep.sweep == sweep.id]
    return {record.sweep.number: record for record in found if record.sweep is not None}


# --- running -----------------------------------------------------------------------------------------------


def run_trains(sweep: Sweep, tell: Teller) -> None:
    """Run what is not completed, `at_once` trains at a time, each as a process of its own, until all have ended.

    A train that fails, or is cancelled by itself, does not end the others. `tell` hears of each that begins (with no
    record, or the one it takes up) and ends. However this is left, the trains are asked to stop, and waited for.
    """
    waiting = list(sweep.members)
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            for member in sweep.members:
                if member.number in running and running[member.number].poll() is not None:
                    del running[member.number]
                    tell(member, trains_of(sweep).get(member.number))
            for member in _next(sweep, waiting, sweep.at_once - len(running)):
                waiting.remove(member)
                running[member.number] = _start(sweep, member)
            time.sleep(_POLL_SECONDS)
    finally:
        _end(list(running.values()))


def _next(sweep: Sweep, waiting: list[SweepMember], places: int) -> list[SweepMember]:
    """The trains to start now; those that are completed wait no more. One that another process runs is waited for."""
    if not (waiting and places > 0):
        return []
    begun = trains_of(sweep)
    status = {number: trains.current_status(record) for number, record in begun.items()}
    for member in [each for each in waiting if status.get(each.number) == "completed"]:
        waiting.remove(member)
    busy = [member for member in waiting if status.get(member.number) == "running"]
    return [member for member in waiting if member not in busy][: max(0, places - len(busy))]


def _start(sweep: Sweep, member: SweepMember) -> subprocess.Popen[bytes]:
    """A train as a process of its own: it stops when its standard input ends, and so when this process does."""
    command = [sys.executable, "-m", "flows.sweep_train", sweep.id, str(member.number)]
    with (sweep_folder(sweep.id) / f"{member.number}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            env=dict(os.environ),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is told to it by its input, once
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    for process in processes:
        try:
            process.wait(load_settings().grace_seconds + 30)
        except subprocess.TimeoutExpired:
            process.kill()


def stop_train(sweep_id: str, number: int) -> None:
    """Stop the train of a sweep that this process runs: as if it was cancelled, so that nobody takes it for crashed."""
    record = trains_of(load_sweep(sweep_id)).get(number)
    if record is not None and trains.current_status(record) == "running":
        trains.cancel_train(record)
    else:
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def telling_errors(sweep_id: str, number: int) -> Iterator[None]:
    """Keep what goes wrong with a train of a sweep: one that could not even begin has no record to say it."""
    path = _error_file(sweep_id, number)
    path.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        write_text(path, str(error) or type(error).__name__)
        raise


def _error_file(sweep_id: str, number: int) -> Path:
    return sweep_folder(sweep_id) / f"{number}.error"


def error_of(sweep: Sweep, member: SweepMember) -> str:
    """Why a train of the sweep could not begin."""
    file = _error_file(sweep.id, member.number)
    return file.read_text(encoding="utf-8") if file.exists() else f"see {file.with_suffix('.log')}"


# --- the end -----------------------------------------------------------------------------------------------


def conclude(sweep: Sweep) -> SweepOutcome:
    """Rank the trains, and let the alias `challenger` of their line point to the best one's model.

    Raises UserError if no train has completed, or none has the figure.
    """
    begun = trains_of(sweep)
    by = sweep.by or _measured_figure(list(begun.values()))
    lower = lower_is_better(by)
    standings = sorted(
        (_standing(sweep, member, begun.get(member.number), by) for member in sweep.members),
        key=lambda each: math.inf if each.figure is None else each.figure if lower else -each.figure,
    )
    ranked = [each for each in standings if each.figure is not None]
    if not ranked:
        raise _no_winner(sweep, standings, list(begun.values()), by)
    records = {each.number: begun[each.number] for each in ranked}
    best = records[ranked[0].number]
    model = models.find_model(str(best.model))
    models.set_alias(model, "challenger")
    for place, each in enumerate(ranked, start=1):
        tracking.mlflow_client().set_tag(records[each.number].run_id, "tuneline.sweep.place", f"{place} by {by}")
    outcome = SweepOutcome(
        sweep=sweep.id,
        line=sweep.name,
        by=by,
        lower_is_better=lower,
        standings=standings,
        best=best.id,
        model=model.name,
        champion=models.alias_holder(sweep.name, "champion"),
        verdict=_verdict(ranked, list(records.values()), by),
        page=tracking.compare_page([record.run_id for record in records.values()]),
    )
    write_record(sweep_folder(sweep.id) / OUTCOME_FILE, outcome)
    return outcome


def compare(outcome: SweepOutcome) -> tuple[Comparison, list[TrainRecord]] | None:
    """The trains that have a place, each against the best one, and their records; None if only one has.

    Models are compared by the sweep's figure if answers are scored by it row by row, else by F1.
    """
    records = [trains.load_train(str(each.train)) for each in outcome.standings if each.figure is not None]
    if len(records) < 2:
        return None
    return compare_kept(records, outcome.by if outcome.by in RULE_METRICS else _SCORE_OF_ANSWERS), records


def lower_is_better(figure: str) -> bool:
    """Whether less of a figure is better: losses, distances, and what scoring says so of."""
    return figure in LOWER_IS_BETTER or figure.endswith(("loss", "perplexity", "distance", "kl"))


def figures_of(record: TrainRecord) -> dict[str, float]:
    """The figures of a train by name: the last points of its curves, its outcome, the scores of its model."""
    curves = curves_of(EventTail(trains.train_folder(record.id) / "training" / contract.EVENTS_FILE).read())
    last = {name: points[-1][1] for name, points in curves.items() if points}
    return {**last, **record.outcome, **record.evaluation.get("tuned", {})}


def _measured_figure(records: Sequence[TrainRecord]) -> str:
    """What was measured on the evaluation rows: F1 where answers were scored, else the method's first figure."""
    names = [name for record in records for name in record.evaluation.get("tuned", {})]
    return _SCORE_OF_ANSWERS if _SCORE_OF_ANSWERS in names or not names else names[0]


def _standing(sweep: Sweep, member: SweepMember, record: TrainRecord | None, by: str) -> Standing:
    found = Standing(number=member.number, values=member.values)
    if record is None:
        return found.model_copy(update={"reason": error_of(sweep, member)})
    status = trains.current_status(record)
    changes: dict[str, Any] = {"train": record.id, "status": status, "reason": record.reason}
    if status == "completed":
        figure = figures_of(record).get(by)
        finite = figure is not None and math.isfinite(figure)
        changes |= (
            {"figure": figure} if finite else {"reason": f"its {by} is {figure}" if figure else f"it has no {by}"}
        )
    return found.model_copy(update=changes)


def _no_winner(sweep: Sweep, standings: Sequence[Standing], records: Sequence[TrainRecord], by: str) -> UserError:
    completed = [record for record in records if record.status == "completed"]
    if not completed:
        reasons = "; ".join(f"{told(each.values)}: {each.reason or each.status}" for each in standings)
        return UserError(
            "no train of the sweep has completed",
            field="sweep",
            value=reasons,
            mend=f"the logs are in {sweep_folder(sweep.id)}; run the sweep again to take its trains up",
        )
    known = sorted({name for record in completed for name in figures_of(record)})
    return UserError(
        "no train of the sweep has this figure",
        field="by",
        value=by,
        expected=f"one of {', '.join(known)}",
        mend="run the sweep again with it: nothing is trained twice",
    )


def _verdict(ranked: Sequence[Standing], records: Sequence[TrainRecord], by: str) -> str:
    """Which is the best, by how much it leads, and, where answers were scored row by row, how sure that is."""
    first = ranked[0]
    best = f"{told(first.values)} is the best by {by}: {first.figure:.6g}"
    if len(ranked) == 1:
        return f"{best}; no other train has the figure"
    second = ranked[1]
    if second.figure == first.figure:
        return f"{best}, and {told(second.values)} is as good: the first of them is taken"
    found = [read_evaluation(trains.train_folder(record.id), "tuned") for record in records[:2]]
    told_second = f"{best}, then {told(second.values)}: {second.figure:.6g}"
    if found[0] is None or found[1] is None or found[0].dataset != found[1].dataset:
        return told_second
    rows = compare_row_scores(found[1].row_scores, found[0].row_scores, DEFAULT_CONFIDENCE)
    each = next((each for each in rows if each.metric == by), None)
    if each is None:
        return told_second
    low, high = each.interval
    sure = "the two are not told apart" if each.verdict == "not told apart" else f"the first is {each.verdict}"
    interval = f"{100 * each.confidence:g} % interval [{low:+.2f}, {high:+.2f}]"
    return f"{told_second}; {sure} on {each.rows} rows, {interval}"
