"""What a train gives its method beside rows, and what a method that gives no text answers says of its models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.profiles import Profile, write_profile
from configs.records import ModelRecord, TrainRecord
from configs.settings import load_settings
from configs.train import TrainConfig
from flows.cli_trains import print_evaluation
from tasks import lifecycle, models, tracking, trains
from tests.own_methods import install_method

TRAINING = """
import json
from methods import contract

def main(job):
    (job.output / "adapter_config.json").write_text(json.dumps(job.inputs["models"] | job.inputs["files"]))
    return {"model": str(job.output), "adapter": job.parameters["leaves_adapter"], "steps": 1, "loss": 0.5}

if __name__ == "__main__":
    contract.run(main)
"""
INFERENCE = """
import json
from pathlib import Path
from methods import contract

def main(job):
    rows = Path(job.inputs["evaluation_rows"]).read_text().splitlines()
    assert all("chosen" in json.loads(row) for row in rows)
    weights = job.inputs.get("adapter") or job.inputs["model"]
    tuned = (Path(weights) / "adapter_config.json").exists()
    return {"figures": {"accuracy": len(rows) / 4, "margin": 0.25 if tuned else -0.125}}

if __name__ == "__main__":
    contract.run(main)
"""
PARAMETERS = {
    "leaves_adapter": {"type": "boolean", "default": True},
    "judge": {"type": "string", "format": "model", "default": None},
    "rewards": {"type": "string", "format": "path", "default": None},
}
STAGES = {name: {"file": f"{name}.py", "environment": "host"} for name in ("training", "inference-complete")}


class Bench:
    """Opens trains of a method that only notes what it was given."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.opened = folder, model, list[str]()
        self.rows = folder / "pairs.jsonl"
        pairs = [{"prompt": f"say {n}", "chosen": f"{n}", "rejected": "no"} for n in range(4)]
        self.rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def install(self, **changes: Any) -> None:
        given = {"datasets": ["preference"], "stages": STAGES, "parameters": PARAMETERS, **changes}
        method = install_method(**given)
        (method / "training.py").write_text(TRAINING)
        (method / "inference-complete.py").write_text(INFERENCE)

    def open(self, own: dict[str, Any] | None = None, **changes: Any) -> TrainRecord:
        given = {"name": "pairs", "method": "mine", "base_model": str(self.model), "dataset": str(self.rows)}
        record = trains.open_train(TrainConfig(**given | {"method_params": own or {}} | changes), {}, [])
        self.opened.append(record.id)
        return record

    def trained(self, own: dict[str, Any] | None = None, **changes: Any) -> TrainRecord:
        record = trains.prepare_datasets(trains.fetch_base(self.open(own, **changes)))
        return trains.train_model(record, lambda events: None)

    def completed(self) -> ModelRecord:
        record = self.trained()
        model = trains.register_customized(record)
        trains.close_train(trains.load_train(record.id), "completed")
        return model


@pytest.fixture
def bench(
    home: Path, tmp_path: Path, tiny_model: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    made = Bench(tmp_path, tiny_model)
    made.install()
    yield made
    for train_id in made.opened:
        trains.let_go(train_id)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_a_model_of_a_completed_train_reaches_the_stage_and_its_very_name_is_recorded(bench: Bench) -> None:
    judge = bench.completed()
    models.set_alias(judge, "champion")
    for reference in (judge.name, "pairs@champion", str(judge.train)):
        record = bench.trained({"judge": reference})
        assert record.config.method_params["judge"] == judge.name
        given = json.loads((trains.trained_model(record).path / "adapter_config.json").read_text())
        path, base = str(judge.path), str(judge.base_path)
        assert given == {"judge": {"path": path, "base_model": base, "adapter": True, "method": "mine"}}
        trains.let_go(record.id)


def test_a_model_that_no_completed_train_has_made_is_refused(bench: Bench) -> None:
    begun = bench.trained()
    running = trains.register_customized(begun)
    for reference, told in (
        (running.name, f"the train that made this model, {begun.id}, is running"),
        (str(bench.model), "this model was not trained here"),
        ("nobody", "there is no such model"),
    ):
        with pytest.raises(UserError, match=told):
            bench.open({"judge": reference})
    trains.close_train(trains.load_train(begun.id), "failed", "why not")
    with pytest.raises(UserError, match=r"is failed[\s\S]*tuneline trains resume"):
        bench.open({"judge": running.name})


def test_a_file_is_copied_so_that_the_record_alone_repeats_the_train(bench: Bench) -> None:
    original = bench.folder / "rewards.py"
    original.write_text("first")
    record = bench.trained({"rewards": str(original)})
    original.write_text("second")
    copy = Path(record.config.method_params["rewards"])
    assert copy == trains.train_folder(record.id) / "files" / "rewards" / "rewards.py"
    assert copy.read_text() == "first"
    given = json.loads((trains.trained_model(record).path / "adapter_config.json").read_text())
    assert given == {"rewards": str(copy)}
    kept = {file.path for file in tracking.mlflow_client().list_artifacts(record.run_id, "files")}
    assert kept == {"files/rewards.py"}
    original.unlink()
    again = trains.open_train(trains.load_train(record.id).config, {}, [])
    bench.opened.append(again.id)
    assert Path(again.config.method_params["rewards"]).read_text() == "first"


def test_a_copied_run_keeps_the_values_of_its_profile_although_they_changed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(**values: Any) -> None:
        profile = Profile(method="mine", saved_from="x", **values)
        write_profile("fast", profile, load_settings(), replace=True)

    given = {"name": "pairs", "method": "mine", "base_model": str(bench.model), "dataset": str(bench.rows)}
    save(hyperparameters={"lora_rank": 4}, method_params={"leaves_adapter": False})
    monkeypatch.setattr(lifecycle, "_copied_train", lambda: None)
    first = lifecycle._open_from_form(TrainConfig(**given), "customized", None, "fast")
    assert (first.config.hyperparameters.lora_rank, first.config.method_params["leaves_adapter"]) == (4, False)
    save(hyperparameters={"lora_rank": 64})
    monkeypatch.setattr(lifecycle, "_copied_train", lambda: first)
    again = lifecycle._open_from_form(TrainConfig(**given), "customized", None, "fast")
    bench.opened += [first.id, again.id]
    assert again.config == first.config
    assert again.origins["hyperparameters.lora_rank"] == "profile fast"
    monkeypatch.setattr(lifecycle, "_copied_train", lambda: None)
    anew = lifecycle._open_from_form(TrainConfig(**given), "customized", None, "fast")
    bench.opened.append(anew.id)
    assert anew.config.hyperparameters.lora_rank == 64


def test_whether_there_is_an_adapter_the_training_says_itself(bench: Bench) -> None:
    assert trains.trained_model(bench.trained({"leaves_adapter": True})).adapter
    whole = trains.register_customized(bench.trained({"leaves_adapter": False}))
    assert (whole.stage, whole.adapter) == ("customized", False)


def test_rows_that_ask_for_no_text_are_measured_by_the_method(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    record = bench.trained({"leaves_adapter": False}, evaluation_dataset=str(bench.rows), evaluation_samples=2)
    record = trains.evaluate_model(record, trains.base_as_model(record), "base", lambda events: None)
    model = trains.register_customized(record)
    record = trains.evaluate_model(record, model, "tuned", lambda events: None)
    assert record.evaluation["base"] == {"accuracy": 50.0, "margin": -0.125}
    assert record.evaluation["tuned"] == {"accuracy": 50.0, "margin": 0.25}
    metrics = tracking.mlflow_client().get_run(record.run_id).data.metrics
    assert (metrics["margin_base"], metrics["margin_tuned"]) == (-0.125, 0.25)
    assert models.find_model(model.name).evaluation == record.evaluation["tuned"]
    assert "| margin | -0.125 | 0.25 |" in trains.report(
        trains.load_train(record.id).model_copy(update={"status": "completed"})
    )
    print_evaluation(record.evaluation["base"], record.evaluation["tuned"])
    assert ["margin", "-0.125", "0.25"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_method_without_the_stage_for_it_is_refused_or_left_unscored(bench: Bench) -> None:
    bench.install(stages={"training": STAGES["training"]})
    with pytest.raises(UserError, match=r"cannot be scored[\s\S]*evaluation_dataset"):
        bench.open(evaluation_dataset=str(bench.rows))
    stages = {"training": STAGES["training"], "inference-customized": STAGES["inference-complete"]}
    bench.install(stages=stages)
    record = bench.trained(evaluation_dataset=str(bench.rows))
    unscored = trains.evaluate_model(record, trains.base_as_model(record), "base", lambda events: None)
    assert unscored.evaluation == {}
