"""Every field of a train's configuration is read by a named place, and changes what happens there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.records import TrainRecord
from configs.train import Hyperparameters, TrainConfig, effective_through
from deployments import alerts
from tasks import models, resuming, tracking, trains
from tasks.checking import check_train
from tasks.datasets import find_dataset
from tasks.evaluation import read_evaluation
from tasks.launching import launcher
from tests.own_methods import install_method

ROWS = [{"question": f"what is {n} and {n}", "answer": str(2 * n)} for n in range(12)]


class Bench:
    """Opens trains on a tiny model and a small file, as far as the datasets."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.rows = self.write("rows.jsonl", [json.dumps(row) for row in ROWS])
        self.opened: list[str] = []

    def write(self, name: str, lines: list[str]) -> Path:
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    def prepared(self, **changes: Any) -> TrainRecord:
        given = {"name": "sums", "base_model": str(self.model), "dataset": str(self.rows), **changes}
        record = trains.open_train(TrainConfig(**given), {}, [])
        self.opened.append(record.id)
        return trains.prepare_datasets(trains.fetch_base(record))


@pytest.fixture
def bench(
    home: Path, tmp_path: Path, tiny_model: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    made = Bench(tmp_path, tiny_model)
    yield made
    for train_id in made.opened:
        trains.let_go(train_id)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def _first_messages(path: Path) -> list[str]:
    return [message["content"] for message in json.loads(path.read_text().splitlines()[0])["messages"]]


def _name(bench: Bench) -> None:
    record = bench.prepared(name="other-name")
    assert record.id.startswith("other-name_")
    assert trains.trained_model(record).line == "other-name"


def _description(bench: Bench) -> None:
    record = bench.prepared(description="what it is for")
    assert tracking.mlflow_client().get_run(record.run_id).data.tags["mlflow.note.content"] == "what it is for"


def _method(bench: Bench) -> None:
    with pytest.raises(UserError, match="no such training method"):
        bench.prepared(method="nothing")


def _base_model(bench: Bench) -> None:
    assert bench.prepared().base_path == bench.model


def _dataset(bench: Bench) -> None:
    record = bench.prepared()
    assert find_dataset(str(record.dataset)).rows == len(ROWS)
    assert trains.training_rows(record) == (find_dataset(str(record.dataset)).path, None)


def _columns(bench: Bench) -> None:
    turned = bench.prepared(prompt_column="answer", completion_column="question")
    assert _first_messages(trains.training_rows(turned)[0]) == ["0", "what is 0 and 0"]


def _dataset_shape(bench: Bench) -> None:
    with pytest.raises(UserError):
        bench.prepared(dataset_shape="sharegpt")


def _validation_dataset(bench: Bench) -> None:
    held_out = bench.write("held.jsonl", [json.dumps(row) for row in ROWS[:3]])
    _, validation = trains.training_rows(bench.prepared(validation_dataset=str(held_out)))
    assert validation is not None
    assert len(validation.read_text().splitlines()) == 3


def _validation_split(bench: Bench) -> None:
    train, validation = trains.training_rows(bench.prepared(validation_split=0.4))
    assert validation is not None
    held_back = len(validation.read_text().splitlines())
    assert 0 < held_back < len(ROWS)
    assert len(train.read_text().splitlines()) == len(ROWS) - held_back


def _evaluation(bench: Bench) -> None:
    record = bench.prepared(evaluation_dataset=str(bench.rows), evaluation_samples=2, max_new_tokens=1)
    scored = trains.evaluate_model(record, trains.base_as_model(record), "base", lambda _: None)
    folder = Path(tracking.mlflow_client().download_artifacts(record.run_id, "evaluation"))
    told = json.loads((folder / "scores_base.json").read_text())
    assert told["dataset"] == record.evaluation_dataset
    assert told["rows"] == 2
    assert scored.evaluation["base"]["hit_limit"] == 100  # one token ends no answer of this model


def _scoring(bench: Bench) -> None:
    rows = [{**row, "size": "big" if number > 5 else "small"} for number, row in enumerate(ROWS)]
    rows = [{**row, "answer": f"the {row['answer']}"} for row in rows]
    evaluated = bench.write("sized.jsonl", [json.dumps(row) for row in rows])
    record = bench.prepared(evaluation_dataset=str(evaluated), evaluation_by="size", stop_words="en", max_new_tokens=1)
    trains.evaluate_model(record, trains.base_as_model(record), "base", lambda _: None)
    kept = read_evaluation(trains.train_folder(record.id), "base")
    assert kept is not None
    assert {value: part.rows for value, part in kept.scores.slices["size"].items()} == {"small": 6, "big": 6}
    assert kept.scores.stop_words > 100
    check_train(record.config)
    for wrong in ({"evaluation_by": "length"}, {"stop_words": "nothing.txt"}):
        with pytest.raises(UserError, match=r"no further column|no such list"):
            check_train(record.config.model_copy(update=wrong))


def _allow_refused_rows(bench: Bench) -> None:
    bad = bench.write("bad.jsonl", [*(json.dumps(row) for row in ROWS), '{"question": "no answer"}'])
    with pytest.raises(UserError, match="answer"):
        bench.prepared(dataset=str(bad))
    record = bench.prepared(dataset=str(bad), allow_refused_rows=True)
    assert find_dataset(str(record.dataset)).report.rows_refused == 1


def _through(bench: Bench) -> None:
    assert [effective_through(bench.prepared(through=goal).config) for goal in ("customized", "deployed")] == [
        "customized",
        "deployed",
    ]


def _job_parameters(bench: Bench) -> None:
    own = {"of_its_own": {"type": "integer", "default": 1}, "at_default": {"type": "number", "default": 0.5}}
    install_method(parameters=own, hyperparameters={"unused": ["num_generations"]})
    record = bench.prepared(method="mine", hyperparameters={"learning_rate": 3e-4}, method_params={"of_its_own": 5})
    assert record.config.method_params == {"of_its_own": 5, "at_default": 0.5}
    job = trains._training_job(record, bench.folder, None)
    assert job.parameters["learning_rate"] == 3e-4
    assert job.parameters["lora_alpha"] == 16
    assert job.parameters["max_new_tokens"] == 128
    assert (job.parameters["of_its_own"], job.parameters["at_default"]) == (5, 0.5)
    assert "num_generations" not in job.parameters
    assert set(Hyperparameters.model_fields) - set(job.parameters) == {"num_generations"}
    with pytest.raises(UserError, match=r"method_params\.of_its_own = 'x'"):
        bench.prepared(method="mine", method_params={"of_its_own": "x"})


def _gpus(bench: Bench) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELINE_GPUS", "0,1")
        assert trains.take_gpus(bench.prepared(gpus=2), lambda _: None).gpus == ["0", "1"]
        with pytest.raises(UserError, match="more GPUs than this host has"):
            bench.prepared(gpus=3)


def _spreading(bench: Bench) -> None:
    record = bench.prepared(processes=3, distribution="fsdp")
    config = launcher(record.config, bench.folder, on_gpus=False)[-1]
    written = Path(config).read_text()
    assert "num_processes: 3" in written
    assert "distributed_type: FSDP" in written


def _alerts(bench: Bench) -> None:
    """That they are sent: tests/deployments/test_alerts.py."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    subscribed = bench.prepared(alerts=[{"to": "ops", "on": "failed"}]).config.alerts
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert alerts.run_tags(subscribed) == {"alert:ops:failed"}


def _endpoint(bench: Bench) -> None:
    """Deploying itself takes a server: `test_4bit_train_goes_through_to_an_endpoint_that_answers` names its own."""
    text = (Path(__file__).parents[1] / "flows" / "test_lifecycle_paths.py").read_text(encoding="utf-8")
    body = text.split("def test_4bit_train_goes_through")[1].split("\ndef ")[0]
    assert 'endpoint="four"' in body
    assert 'endpoint.name == "four"' in body


def _template_date(bench: Bench) -> None:
    chosen, today = bench.prepared(template_date="2024-07-26"), bench.prepared()
    for record, expected in ((chosen, "2024-07-26"), (today, today.created.date().isoformat())):
        job = trains._training_job(record, bench.folder / "job", None)
        assert job.inputs["date"] == expected
        assert str(trains.evaluation_generation(record).template_date) == expected
    assert today.config.template_date is None
    dated = bench.folder / "dated"
    shutil.copytree(bench.model, dated)
    template = (dated / "chat_template.jinja").read_text(encoding="utf-8")
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}" + template, encoding="utf-8")
    fixed = bench.prepared(base_model=str(dated))
    assert fixed.config.template_date == fixed.created.date()  # a copy on another day has the same prompts


def _resume_after_crash(bench: Bench) -> None:
    decided = []
    for times in (0, 1):
        record = trains.note_flow_run(bench.prepared(resume_after_crash=times), f"run-{times}", None)
        trains.close_train(record, "interrupted", "killed")
        decided.append(resuming.decide_after_crash(f"run-{times}").resume)
    assert decided == [False, True]


CONSUMED: dict[str, Callable[[Bench], None]] = {
    "name": _name,
    "description": _description,
    "method": _method,
    "base_model": _base_model,
    "dataset": _dataset,
    "prompt_column": _columns,
    "completion_column": _columns,
    "dataset_shape": _dataset_shape,
    "validation_dataset": _validation_dataset,
    "validation_split": _validation_split,
    "evaluation_dataset": _evaluation,
    "evaluation_samples": _evaluation,
    "evaluation_by": _scoring,
    "stop_words": _scoring,
    "max_new_tokens": _evaluation,
    "template_date": _template_date,
    "allow_refused_rows": _allow_refused_rows,
    "through": _through,
    "endpoint": _endpoint,
    "alerts": _alerts,
    "gpus": _gpus,
    "processes": _spreading,
    "distribution": _spreading,
    "resume_after_crash": _resume_after_crash,
    "hyperparameters": _job_parameters,
    "method_params": _job_parameters,
}


@pytest.mark.parametrize("field", TrainConfig.model_fields)
def test_field_changes_what_happens(field: str, bench: Bench) -> None:
    CONSUMED[field](bench)


def test_a_train_starts_from_a_complete_model_of_ones_own_but_not_from_an_adapter(bench: Bench) -> None:
    first = bench.prepared()
    made = trains.trained_model(first)
    store = trains.load_settings().models
    for name, stage, adapter in (("own-complete", "complete", False), ("own-adapter", "customized", True)):
        product = bench.folder / name
        product.mkdir()
        for file in bench.model.iterdir():
            (product / file.name).symlink_to(file)
        update = {"name": name, "stage": stage, "adapter": adapter, "path": store / name}
        models.publish_model(made.model_copy(update=update), product)

    again = bench.prepared(base_model="own-complete")
    assert (again.base, again.base_path) == ("own-complete", store / "own-complete")
    with pytest.raises(UserError, match="tuneline save own-adapter"):
        bench.prepared(base_model="own-adapter")
