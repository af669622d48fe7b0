"""Sweeps: what is trained, a few at a time, and which train is the best. The trains themselves are stand-ins here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.errors import UserError
from configs.records import SweepPlace, TrainRecord
from configs.sweeps import Standing, Sweep, SweepMember
from tasks import sweeping, trains
from tests.flows.tiny_trains import wait_for

TRAIN = "name: lights\nbase_model: b\ndataset: rows.jsonl\nvalidation_split: 0.1\nlearning_rate: 5e-5\n"
SECTION = "sweep:\n  by: loss\n  at_once: 3\n"
GRID = SECTION + "  grid:\n    学习率: [1e-5, 1e-4]\n    LORA_RANK: [8, 16]\n"
LIST = SECTION + "  list:\n    - {lora_rank: 4}\n    - {epochs: 3, preset: nl2json-lora}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TUNELINE_GPUS", "")
    monkeypatch.setenv("TUNELINE_GRACE_SECONDS", "5")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    return tmp_path


def plan(folder: Path, text: str, *over: str, **given: Any) -> Sweep:
    file = folder / "train.yaml"
    file.write_text(text, encoding="utf-8")
    return sweeping.plan_sweep(str(file), over, **given)


# --- the plan -----------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_its_values_win_and_say_where_they_come_from(folder: Path) -> None:
    for found in (plan(folder, TRAIN + GRID), plan(folder, TRAIN, "学习率=1e-5,1e-4", "LORA_RANK=[8, 16]")):
        hyper = [member.config.hyperparameters for member in found.members]
        assert [(each.learning_rate, each.lora_rank) for each in hyper] == [
            *((1e-5, 8), (1e-5, 16), (1e-4, 8), (1e-4, 16)),
        ]
        assert found.members[0].origins["hyperparameters.learning_rate"] == "sweep"
        assert found.members[0].origins["dataset"].startswith("file ")
        assert found.name == "lights"
    assert plan(folder, TRAIN + GRID).at_once == 3
    assert plan(folder, TRAIN + GRID).by == "loss"
    assert plan(folder, TRAIN, "seed=1,2").at_once == 1
    assert plan(folder, TRAIN, "seed=1,2").by == "eval_loss"
    assert plan(folder, TRAIN + GRID, "seed=1,2", at_once=5, by="f1").model_dump(include={"at_once", "by"}) == {
        **{"at_once": 5, "by": "f1"},
    }
    assert plan(folder, TRAIN + "evaluation_dataset: rows.jsonl\n", "seed=1,2").by is None


def test_a_list_names_the_parameters_of_each_train(folder: Path) -> None:
    first, second = (member.config.hyperparameters for member in plan(folder, TRAIN + LIST, changes=["seed=7"]).members)
    assert (first.lora_rank, first.epochs, first.lr_decay_ratio, first.seed) == (4, 1, 0.0, 7)
    assert (second.lora_rank, second.epochs, second.lr_decay_ratio, second.seed) == (8, 3, 0.1, 7)


def test_a_file_of_the_section_is_looked_for_beside_the_train_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "more.jsonl").write_text('{"prompt": "c", "completion": "d"}\n', encoding="utf-8")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    found = plan(folder, TRAIN + "sweep: {grid: {dataset: [rows.jsonl, more.jsonl]}}\n")
    assert [member.config.dataset for member in found.members] == [
        str(folder / "rows.jsonl"),
        str(folder / "more.jsonl"),
    ]
    assert found.members[0].origins["dataset"] == "sweep"


def test_the_same_request_is_the_same_sweep_until_a_row_or_a_value_changes(folder: Path) -> None:
    first = plan(folder, TRAIN + GRID)
    assert plan(folder, TRAIN + GRID, by="f1", at_once=1).id == first.id
    assert plan(folder, TRAIN + GRID, changes=["epochs=2"]).id != first.id
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "c", "completion": "d"}\n')
    assert plan(folder, TRAIN + GRID).id != first.id


def test_a_sweep_can_start_from_a_train(folder: Path) -> None:
    config = plan(folder, TRAIN, "seed=1,2").members[0].config
    trains.save_record(TrainRecord(id="lights_1", config=config, run_id="r", status="completed"))
    found = sweeping.plan_sweep("lights_1", ["learning_rate=1e-5,1e-4"])
    assert [member.config.hyperparameters.learning_rate for member in found.members] == [1e-5, 1e-4]
    assert found.members[0].origins["hyperparameters.seed"] == "copied from lights_1"


@pytest.mark.parametrize(
    ("text", "over", "told"),
    [
        (TRAIN, [], "nothing says what is swept"),
        (TRAIN, ["seed=1"], "at least two trains"),
        (TRAIN, [f"seed={','.join(map(str, range(201)))}"], "more trains than a sweep may have"),
        (TRAIN, ["seed"], "no parameter with values"),
        (TRAIN, ["seed=1,,2"], "no parameter with values"),
        (TRAIN, ["seed=1,2", "seed=3,4"], "swept twice"),
        (TRAIN, ["learning_rate=1e-4,0.0001"], "are the same"),
        (TRAIN, ["name=a,b"], "have one name"),
        (TRAIN, ["sed=1,2"], "no such parameter"),
        (TRAIN, ["epochs=1,0"], "epochs"),
        (TRAIN + "through: deployed\n", ["seed=1,2"], "deploys nothing"),
        (TRAIN.replace("validation_split: 0.1\n", ""), ["seed=1,2"], "nothing says which train is the best"),
        (TRAIN + "sweep: [1]\n", [], "no sweep"),
        (TRAIN + "sweep: {grid: {seed: [1, 2]}, list: [{seed: 1}]}\n", [], "not both"),
        (TRAIN + "sweep: {gird: {seed: [1, 2]}}\n", [], "train.yaml:6: there is no such field"),
        (TRAIN + "sweep:\n  grid:\n    seed: []\n", [], "train.yaml:8: this value is impossible"),
    ],
)
def test_an_impossible_sweep_is_refused(folder: Path, text: str, over: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        plan(folder, text, *over)
    assert told in str(refused.value)


def test_a_value_that_is_set_and_swept_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="one parameter with two values"):
        plan(folder, TRAIN, "seed=1,2", changes=["seed=3"])


def test_what_makes_losses_hard_to_compare_is_said(folder: Path) -> None:
    assert sweeping.doubts(plan(folder, TRAIN, "learning_rate=1e-5,1e-4")) == []
    assert "max_seq_length" in sweeping.doubts(plan(folder, TRAIN, "max_seq_length=512,1024"))[0]
    assert "hyperparameters.seed" in sweeping.doubts(plan(folder, TRAIN, "seed=1,2"))[0]
    assert "method_params.beta" in sweeping.doubts(plan(folder, TRAIN + "method: dpo\n", "beta=0.1,0.2"))[0]
    assert sweeping.doubts(plan(folder, TRAIN, "max_seq_length=512,1024", by="f1")) == []


# --- running ------------------------------------------------------------------------------------------------


class StandIns:
    """Processes in place of trains; each says when it begins and ends, and leaves a record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, log: Path, code: str) -> None:
        self.log = log
        log.touch()
        self.started: list[int] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.code = f"import sys, time\nlog = open({str(log)!r}, 'a', buffering=1)\n{code}"
        monkeypatch.setattr(sweeping, "_start", self.start)

    def start(self, sweep: Sweep, member: SweepMember) -> subprocess.Popen[bytes]:
        self.started.append(member.number)
        begin(sweep, member, "failed" if member.number == 2 else "completed")
        process = subprocess.Popen([sys.executable, "-S", "-c", self.code], stdin=subprocess.PIPE)
        self.processes.append(process)
        return process

    def most_at_once(self) -> int:
        running = most = 0
        for line in self.log.read_text().split():
            running += 1 if line == "begin" else -1
            most = max(most, running)
        return most


def begin(sweep: Sweep, member: SweepMember, status: Any) -> None:
    train = f"lights_{member.number}"
    place = SweepPlace(sweep=sweep.id, number=member.number)
    trains.save_record(TrainRecord(id=train, config=member.config, run_id="r", status=status, sweep=place))


def test_so_many_run_at_once_a_failed_one_ends_nothing_and_a_completed_one_is_not_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = plan(folder, TRAIN, "seed=1,2,3,4,5", at_once=2)
    begin(sweep, sweep.members[3], "completed")
    begin(sweep, sweep.members[4], "cancelled")
    monkeypatch.setattr(sweeping, "_POLL_SECONDS", 0.05)
    stand_ins = StandIns(
        monkeypatch, folder / "log", "print('begin', file=log)\ntime.sleep(0.4)\nprint('end', file=log)"
    )
    told: list[tuple[int, str | None]] = []
    sweeping.run_trains(sweep, lambda member, record: told.append((member.number, record and record.status)))
    assert stand_ins.started == [1, 2, 3, 5]
    assert stand_ins.most_at_once() == 2
    assert sorted(told) == [(1, "completed"), (2, "failed"), (3, "completed"), (5, "completed")]


def test_whoever_leaves_a_sweep_stops_its_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = plan(folder, TRAIN, "seed=1,2,3", at_once=3)
    wait = "print('begin', file=log)\nsys.stdin.buffer.read()\nprint('end', file=log)"
    stand_ins = StandIns(monkeypatch, folder / "log", wait)

    def interrupted_at_the_third(of: Sweep, member: SweepMember) -> subprocess.Popen[bytes]:
        if member.number < 3:
            return stand_ins.start(of, member)
        wait_for(lambda: stand_ins.log.read_text().count("begin") == 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "_start", interrupted_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sweeping.run_trains(sweep, lambda member, record: None)
    assert stand_ins.log.read_text().count("end") == 2
    assert not any(psutil.pid_exists(process.pid) for process in stand_ins.processes)


def test_a_sweep_runs_once_at_a_time(folder: Path) -> None:
    with sweeping.holding("lights_1"), pytest.raises(UserError, match="already running"), sweeping.holding("lights_1"):
        pass
    with pytest.raises(UserError, match="no id of a sweep"):
        sweeping.sweep_folder("../trains")


# --- the end ------------------------------------------------------------------------------------------------


def test_of_losses_and_distances_less_is_better() -> None:
    lower = ("loss", "eval_loss", "perplexity", "eval_perplexity", "bits_per_byte", "edit_distance", "kl")
    assert [name for name in lower if not sweeping.lower_is_better(name)] == []
    assert [name for name in ("f1", "ndcg_at_10", "eval_reward_accuracy") if sweeping.lower_is_better(name)] == []


def test_figures_are_last_points_outcome_and_scores(folder: Path) -> None:
    config = plan(folder, TRAIN, "seed=1,2").members[0].config
    scores = {"base": {"f1": 1.0}, "tuned": {"f1": 50.0}}
    record = trains.save_record(
        TrainRecord(id="lights_1", config=config, run_id="r", outcome={"loss": 2.0}, evaluation=scores)
    )
    events = trains.train_folder("lights_1") / "training" / "events.jsonl"
    events.parent.mkdir()
    points = [(1, {"loss": 9.0, "eval_loss": 3.0}), (2, {"loss": 1.0, "eval_loss": 2.5})]
    lines = [json.dumps({"type": "metrics", "time": 1, "step": step, "values": values}) for step, values in points]
    events.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert sweeping.figures_of(record) == {"loss": 2.0, "eval_loss": 2.5, "f1": 50.0}


def test_a_tie_is_said(folder: Path) -> None:
    standings = [Standing(number=number, values={"seed": number}, figure=50.0) for number in (1, 2)]
    assert "seed=2 is as good: the first of them is taken" in sweeping._verdict(standings, [], "f1")
    assert "no other train" in sweeping._verdict(standings[:1], [], "f1")
