"""Sweeps of a tiny model: killed half-way and taken up, one train failing, the best one named."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.settings import Settings
from tasks import models, sweeping, trains
from tests.flows.command_line import printed, read_json, tuneline
from tests.flows.tiny_trains import installation, processes_naming, start_flow, train_file, wait_for

pytestmark = pytest.mark.lifecycle

RATES = {"learning_rate": [1e-5, 0.003, 0.03]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sweeps")
    with installation(folder) as settings:
        yield folder
        assert processes_naming(str(settings.root)) == []


def sweep_file(root: Path, name: str, sweep: dict[str, Any]) -> Path:
    """A train file with validation rows and a sweep of it."""
    path = train_file(root, name, validation_dataset=str(root / "validation.jsonl"))
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # Without warm-up, and with a checkpoint after every step.
    content["hyperparameters"] |= {"warmup_ratio": 0, "checkpoint_steps": 1}
    path.write_text(yaml.safe_dump({**content, "sweep": sweep}), encoding="utf-8")
    return path


def test_three_rates_killed_half_way_are_taken_up_and_the_best_is_the_challenger(root: Path) -> None:
    file = sweep_file(root, "rates", {"grid": RATES})
    sweep = sweeping.plan_sweep(str(file))
    process = start_flow(root, "sweep", str(file))

    def second_runs() -> bool:
        begun = sweeping.trains_of(sweep)
        assert process.poll() is None, (root / "flow.log").read_text()
        return 2 in begun and (trains.train_folder(begun[2].id) / "training" / "events.jsonl").exists()

    wait_for(second_runs, 240)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: processes_naming(sweep.id) == [], 60)
    before = sweeping.trains_of(sweep)
    assert before[2].reason == "asked to stop"
    assert {number: trains.current_status(record) for number, record in sweeping.trains_of(sweep).items()} == {
        **{1: "completed", 2: "cancelled"},
    }

    text = printed(tuneline("sweep", file, home=Settings().root, cwd=root, seconds=300))

    after = sweeping.trains_of(sweep)
    assert [record.status for record in after.values()] == ["completed"] * 3
    assert (after[1].id, after[2].id) == (before[1].id, before[2].id)
    assert [after[number].attempts for number in (1, 2, 3)] == [1, 2, 1]
    losses = {number: sweeping.figures_of(record)["eval_loss"] for number, record in after.items()}
    print({rate: losses[number] for number, rate in enumerate(RATES["learning_rate"], start=1)})
    best = after[min(losses, key=lambda number: losses[number])]
    assert losses[1] == max(losses.values())  # a rate this low learns nothing
    assert models.alias_holder("rates", "challenger") == best.model
    assert f"{best.model} is rates@challenger now" in text
    ranking, compared = text.split("The best first")[1].split("Parameters that differ")
    lines = [line.split()[0] for line in ranking.splitlines() if line.startswith("rates_")]
    by_loss = sorted(losses, key=lambda number: losses[number])
    assert lines == [after[number].id for number in by_loss]
    # It ends in the comparison of the trains, in the terminal and on a page of its own.
    assert [line.split() for line in compared.splitlines() if line.startswith("learning_rate")] == [
        ["learning_rate", *(str(after[number].config.hyperparameters.learning_rate) for number in by_loss)]
    ]
    page = sweeping.sweep_folder(sweep.id) / sweeping.COMPARISON_FILE
    assert f"With the curves: {page}" in text
    html = page.read_text(encoding="utf-8")
    assert all(record.id in html for record in after.values())
    assert "data:image/png" in html
    # What is done is not done again, and another figure ranks anew.
    again = read_json(tuneline("sweep", file, "--by", "loss", "--json", home=Settings().root, cwd=root))
    assert again["by"] == "loss"
    assert {each["train"] for each in again["standings"]} == {record.id for record in after.values()}
    assert [record.attempts for record in sweeping.trains_of(sweep).values()] == [1, 2, 1]


def test_a_failing_train_does_not_end_the_others(root: Path) -> None:
    points = [{"base_model": "gone"}, {"learning_rate": 0.01}, {"learning_rate": 0.02, "gpus": 1}]
    file = sweep_file(root, "partly", {"list": points, "at_once": 2})
    # Straight to the flow: the command would refuse the base model before anything begins.
    process = start_flow(root, "sweep", str(file))
    assert process.wait(300) == 0, (root / "flow.log").read_text()
    found = sweeping.SweepOutcome.model_validate_json(
        (sweeping.sweep_folder(sweeping.plan_sweep(str(file)).id) / sweeping.OUTCOME_FILE).read_text()
    )
    assert [each.number for each in found.standings if each.figure is not None] == [2]
    failed = {each.number: each for each in found.standings}
    assert failed[1].status == "failed"
    assert "gone" in str(failed[1].reason)
    assert failed[3].train is None  # it asks for a GPU, of which there is none: it did not even begin
    assert "more GPUs than this host has" in str(failed[3].reason)
    assert found.model == models.alias_holder("partly", "challenger")
    kept = json.loads((sweeping.sweep_folder(found.sweep) / sweeping.OUTCOME_FILE).read_text())
    assert kept["best"] == found.best


def test_a_sweep_of_which_nothing_completes_says_why(root: Path) -> None:
    points = [{"base_model": "gone"}, {"base_model": "gone-too"}]
    file = sweep_file(root, "nothing", {"list": points, "at_once": 2})
    process = start_flow(root, "sweep", str(file))
    assert process.wait(300) != 0
    log = (root / "flow.log").read_text()
    assert "no train of the sweep has completed" in log
    assert "base_model=gone-too: " in log
    assert models.alias_holder("nothing", "challenger") is None
