"""Retraining on a tiny model that can learn to say `on`: promoted, refused, skipped, killed half-way, rolled back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.records import ModelRecord
from configs.retraining import RetrainOutcome
from configs.settings import PROJECT_ROOT, Settings
from tasks import models, retraining, tracking, trains
from tasks.datasets import add_dataset, find_dataset
from tests.flows.tiny_trains import installation, processes_naming, resolved, wait_for

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.lifecycle]

LINE = "switch"
HELD_OUT = 32


@dataclass
class Place:
    """The installation the tests of this file share; they run in order, on one line of models."""

    root: Path
    settings: Settings

    def write(self, name: str, answer: str, first: int, rows: int = 24) -> Path:
        path = self.root / f"{name}.jsonl"
        lines = [
            {"prompt": f"switch the light {number}", "completion": answer} for number in range(first, first + rows)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    def add(self, answer: str, first: int) -> str:
        """A new version of the dataset that the line follows."""
        return add_dataset(self.write("lights", answer, first), "lights").reference

    def run(self, **given: Any) -> RetrainOutcome:
        from flows.retrain import retrain

        return retrain(line=LINE, **given)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("retraining")
    with installation(root) as settings:
        yield Place(root, settings)
        assert processes_naming(str(settings.root)) == []


@pytest.fixture(scope="module")
def champion(place: Place) -> ModelRecord:
    """The line's first model, trained on wrong answers."""
    from flows.customized import customized

    place.add("off", 0)
    add_dataset(place.write("held-out", "on", 1000, HELD_OUT))
    given = resolved(
        place.root,
        LINE,
        dataset="lights",
        max_new_tokens=4,
        hyper={"max_steps": 60, "learning_rate": 0.02, "checkpoint_steps": 5, "lr_scheduler": "constant"},
    )
    return customized(train=given.config, origins=given.origins)


def test_without_held_out_rows_nothing_is_retrained(place: Place, champion: ModelRecord) -> None:
    with pytest.raises(UserError, match="no held-out rows"):
        place.run()
    assert models.alias_holder(LINE, "champion") == champion.name  # the newest model is it


def test_it_skips_as_long_as_nothing_is_new(place: Place, champion: ModelRecord) -> None:
    policy = retraining.resolve_policy(LINE, {"evaluation_dataset": "held-out", "margin": 5.0})
    assert policy.dataset == "lights"
    assert policy.evaluation_dataset == find_dataset("held-out").reference
    retraining.save_policy(policy)
    assert retraining.load_policy(LINE) == policy

    outcome = place.run()

    assert outcome.result == "skipped"
    assert f"the champion {champion.name} was trained on {champion.dataset}" in outcome.reason
    assert retraining.read_history(LINE) == [outcome]
    assert len(trains.list_trains()) == 1


def test_it_skips_an_empty_file_and_refuses_one_that_is_not_there(place: Place, champion: ModelRecord) -> None:
    empty = place.root / "empty.jsonl"
    empty.write_text("\n", encoding="utf-8")
    assert place.run(dataset=str(empty)).reason == f"the dataset is empty: {empty}"
    with pytest.raises(UserError, match="no such file"):
        place.run(dataset=str(place.root / "gone.jsonl"))


def test_it_skips_while_another_process_retrains_the_line(place: Place, champion: ModelRecord) -> None:
    hold = f"from tasks.retraining import holding\nwith holding({LINE!r}) as free: print(free, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=PROJECT_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"True\n"
    try:
        assert place.run(force=True).reason == "another retraining of this line is running"
    finally:
        holder.communicate(b"\n")


def test_a_better_challenger_is_promoted_although_the_first_run_was_killed(place: Place, champion: ModelRecord) -> None:
    from prefect.settings import PREFECT_API_URL

    version = place.add("on", 100)
    with (place.root / "flow.log").open("wb") as log:
        killed = subprocess.Popen(
            [sys.executable, "-m", "flows.retrain", LINE],
            cwd=PROJECT_ROOT,
            env=os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value())},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        checkpoint = "trains/*/training/checkpoints/checkpoint-10/complete"
        begun = {train.id for train in trains.list_trains()}

        def halfway() -> bool:
            assert killed.poll() is None, (place.root / "flow.log").read_text()
            return any(path.parts[-5] not in begun for path in place.settings.root.glob(checkpoint))

        wait_for(halfway)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    attempt = retraining.load_attempt(LINE)
    assert attempt is not None
    assert attempt.train is not None
    assert models.alias_holder(LINE, "champion") == champion.name

    outcome = place.run()

    assert outcome.result == "promoted", outcome.reason
    assert (outcome.train, outcome.champion, outcome.dataset) == (attempt.train, champion.name, version)
    assert outcome.comparison is not None
    assert outcome.comparison.rows == HELD_OUT
    record = trains.load_train(str(outcome.train))
    assert record.attempts == 2
    assert record.status == "completed"
    old = trains.load_train(str(champion.train)).config
    assert record.config.hyperparameters == old.hyperparameters
    assert (record.dataset, record.evaluation_dataset) == (version, find_dataset("held-out").reference)
    assert record.origins["dataset"] == "retraining"
    assert models.alias_holder(LINE, "champion") == outcome.model == outcome.challenger
    assert models.alias_holder(LINE, "challenger") is None
    assert retraining.load_attempt(LINE) is None
    run = tracking.mlflow_client().get_run(record.run_id)
    assert run.data.tags["tuneline.retrain.reason"] == outcome.reason
    assert run.data.metrics["retrain_difference"] == outcome.comparison.difference
    tags = tracking.mlflow_client().get_model_version_by_alias(LINE, "champion").tags
    assert (tags["tuneline.retrain.outcome"], tags["tuneline.retrain.reason"]) == ("promoted", outcome.reason)


def test_the_outcome_is_an_artifact_with_its_figures(place: Place, champion: ModelRecord) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.request("GET", f"/artifacts/retraining-{LINE}/latest").json()
    outcome = retraining.read_history(LINE)[-1]
    assert found["description"] == f"promoted: {outcome.reason}"
    values = {row[""]: row["value"] for row in json.loads(found["data"])}
    assert values["rows"] == str(HELD_OUT)
    assert values["model"] == outcome.model


def test_a_worse_challenger_is_refused_and_its_rows_not_tried_again(place: Place, champion: ModelRecord) -> None:
    better = models.alias_holder(LINE, "champion")
    place.write("lights", "off", 200)
    # Two of the held-out rows are trained on as well: they prove nothing, and are left out.
    held_out = place.root / "held-out.jsonl"
    mixed = place.root / "mixed.jsonl"
    mixed.write_text(
        (place.root / "lights.jsonl").read_text() + "".join(held_out.read_text().splitlines(keepends=True)[:2])
    )
    version = add_dataset(mixed, "lights").reference

    outcome = place.run()

    assert outcome.result == "refused"
    assert outcome.comparison is not None
    assert (outcome.comparison.rows, outcome.comparison.trained_rows) == (HELD_OUT - 2, 2)
    assert outcome.reason.startswith("not better by the margin of 5 points")
    assert models.alias_holder(LINE, "champion") == better
    assert models.alias_holder(LINE, "challenger") == outcome.challenger
    tags = tracking.mlflow_client().get_model_version_by_alias(LINE, "challenger").tags
    assert (tags["tuneline.retrain.outcome"], tags["tuneline.retrain.reason"]) == ("refused", outcome.reason)

    again = place.run()
    assert again.result == "skipped"
    assert f"refused with {version}" in again.reason
    assert [each.result for each in retraining.read_history(LINE)][-3:] == ["promoted", "refused", "skipped"]


def test_a_rollback_makes_the_champion_before_it_champion_again(place: Place, champion: ModelRecord) -> None:
    promoted = models.alias_holder(LINE, "champion")
    outcome = retraining.roll_back(LINE)
    assert (outcome.result, outcome.champion, outcome.model) == ("rolled_back", promoted, champion.name)
    assert models.alias_holder(LINE, "champion") == champion.name
    with pytest.raises(UserError, match="did not become champion by a retraining"):
        retraining.roll_back(LINE)
