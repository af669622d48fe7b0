"""Every lifecycle path on a tiny model, by the flows themselves: what comes out, what answers, what is recorded."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.records import ModelRecord, TrainRecord
from configs.resolve import resolve_train
from configs.settings import Settings
from configs.train import DATASETS, Hyperparameters, TrainConfig
from tasks import deploying, endpoints, models, tracking, trains
from tasks.files import write_record
from tests.flows.tiny_trains import installation, processes_naming, resolved

pytestmark = pytest.mark.usefixtures("prefect_server")


@dataclass
class Place:
    """The installation the tests of this file share."""

    root: Path
    settings: Settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("paths")
    with installation(root) as settings:
        yield Place(root, settings)
        for status in endpoints.list_endpoints():
            deploying.undeploy(status.name)
        assert processes_naming(str(settings.root)) == []


@pytest.fixture(scope="module")
def lora(place: Place) -> ModelRecord:
    """base → customized, with validation rows and an evaluation."""
    from flows.customized import customized

    given = resolved(
        place.root,
        "lights",
        validation_dataset=str(place.root / "validation.jsonl"),
        evaluation_dataset=str(place.root / "test.jsonl"),
        hyper={"lora_rank": 4},
    )
    return customized(train=given.config, origins=given.origins)


@pytest.fixture(scope="module")
def lora_complete(lora: ModelRecord) -> ModelRecord:
    """customized → complete."""
    from flows.complete import complete

    return complete(model=lora.name)


@pytest.fixture(scope="module")
def full(place: Place) -> ModelRecord:
    """base → complete, by full-parameter training."""
    from flows.complete import complete

    given = resolved(place.root, "full", evaluation_dataset=str(place.root / "test.jsonl"), hyper={"tuning": "full"})
    return complete(train=given.config, origins=given.origins)


def train_of(model: ModelRecord) -> TrainRecord:
    assert model.train is not None
    return trains.load_train(model.train)


def run_of(model: ModelRecord) -> Any:
    return tracking.mlflow_client().get_run(train_of(model).run_id)


def files_of(run_id: str, folder: str | None = None) -> set[str]:
    found = set()
    for entry in tracking.mlflow_client().list_artifacts(run_id, folder):
        found |= files_of(run_id, entry.path) if entry.is_dir else {entry.path}
    return found


def ask(endpoint: Endpoint, *, stream: bool) -> str:
    client = openai.OpenAI(base_url=endpoint.address, api_key="none needed", max_retries=0)
    question: Any = [{"role": "user", "content": "switch the light 5 in the kitchen"}]
    options: Any = {"model": endpoint.name, "messages": question, "temperature": 0, "max_tokens": 8}
    if not stream:
        return client.chat.completions.create(**options).choices[0].message.content or ""
    chunks = client.chat.completions.create(**options, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def answers_alike(endpoint: Endpoint) -> str:
    """The endpoint's answer, after seeing that it is the same streamed and in one piece."""
    whole = ask(endpoint, stream=False)
    assert whole
    assert ask(endpoint, stream=True) == whole
    return whole


def deploy(model: str) -> Endpoint:
    from flows.deployed import deployed

    return deployed(model=model)


# base → customized


def test_lora_train_gives_a_customized_model_named_by_base_train_date_and_draw(lora: ModelRecord) -> None:
    assert re.fullmatch(r"tiny_lights_\d{8}_[0-9a-f]{4}", lora.name)
    assert (lora.stage, lora.adapter, lora.parent, lora.line) == ("customized", True, "tiny", "lights")
    assert (lora.path / "adapter_model.safetensors").is_file()
    record = train_of(lora)
    assert (record.status, record.model, record.attempts) == ("completed", lora.name, 1)
    assert record.outcome["steps"] == 6


def test_run_of_a_train_is_finished_named_and_described(lora: ModelRecord) -> None:
    run, record = run_of(lora), train_of(lora)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == record.id
    tags = run.data.tags
    link = f"[Prefect flow run]({tags['tuneline.prefect_url']})"
    assert tags["mlflow.note.content"] == f"the train lights\n\n{link}"
    assert str(record.flow_run_id) in tags["tuneline.prefect_url"]
    assert (tags["mlflow.source.name"], tags["tuneline.base"]) == ("tuneline train", "tiny")
    assert tags["tuneline.dataset"] == record.dataset
    assert tags["mlflow.source.git.commit"]


def test_run_holds_every_parameter_and_where_it_came_from(place: Place, lora: ModelRecord) -> None:
    run, record = run_of(lora), train_of(lora)
    names = {*Hyperparameters.model_fields, *TrainConfig.model_fields} - {"hyperparameters", "method_params"}
    assert set(run.data.params) == names
    assert (run.data.params["lora_rank"], run.data.params["lora_alpha"]) == ("4", "8")
    # By their versions: a copy, which names them so, does not differ in them.
    versions = {name: getattr(record, name) for name in DATASETS if getattr(record, name) is not None}
    assert versions.items() <= run.data.params.items()
    stored = tracking.mlflow_client().download_artifacts(record.run_id, "config/parameters.json", str(place.root))
    table = json.loads(Path(stored).read_text(encoding="utf-8"))
    assert set(table) == names
    assert table["lora_rank"]["origin"].startswith(f"file {place.root / 'lights.yaml'}")
    assert table["lora_alpha"]["origin"] == "derived: 2 × lora_rank"
    assert table["weight_decay"]["origin"] == "default"


def test_recorded_train_file_gives_the_same_train_again(place: Place, lora: ModelRecord) -> None:
    record = train_of(lora)
    stored = tracking.mlflow_client().download_artifacts(record.run_id, "config/train.yaml", str(place.root))
    assert resolve_train(Path(stored)).config == record.config


def test_run_names_its_datasets_with_digest_schema_and_counts(lora: ModelRecord) -> None:
    inputs = {entry.tags[0].value: entry.dataset for entry in run_of(lora).inputs.dataset_inputs}
    assert set(inputs) == {"training", "validation", "evaluation"}
    training = inputs["training"]
    assert f"{training.name}@{training.digest}" == train_of(lora).dataset
    assert json.loads(training.profile)["num_rows"] == 48
    assert json.loads(training.schema)["columns_seen"] == {"prompt": 48, "completion": 48}


def test_run_holds_each_curve_with_each_step_once(lora: ModelRecord) -> None:
    client, run_id = tracking.mlflow_client(), train_of(lora).run_id
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "padding_share", "memory_gib"):
        points = sorted(client.get_metric_history(run_id, name), key=lambda point: point.step)
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6], name
    assert client.get_metric_history(run_id, "eval_loss")
    assert "system/cpu_utilization_percentage" in run_of(lora).data.metrics


def test_run_keeps_the_files_of_the_train(lora: ModelRecord) -> None:
    assert files_of(train_of(lora).run_id) >= {
        "config/parameters.json",
        "config/train.yaml",
        "datasets/dataset_report.html",
        "datasets/dataset_report.json",
        "datasets/dataset_report.md",
        "datasets/dataset_tokens.png",
        "datasets/evaluation_dataset_report.json",
        "datasets/validation_dataset_report.json",
        "evaluation/predictions_base.json",
        "evaluation/predictions_tuned.json",
        "training/curves.png",
        "training/environment.txt",
        "training/rows.json",
        "training/samples.jsonl",
        "training/train.log",
    }


def test_predictions_table_sets_every_answer_beside_its_reference(place: Place, lora: ModelRecord) -> None:
    table = tracking.mlflow_client().download_artifacts(
        train_of(lora).run_id, "evaluation/predictions_tuned.json", str(place.root)
    )
    content = json.loads(Path(table).read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (place.root / "test.jsonl").read_text().splitlines()]
    column = content["columns"].index("reference")
    assert [row[column] for row in content["data"]] == [row["completion"] for row in rows]


def test_prefect_flow_run_and_mlflow_run_name_each_other(lora: ModelRecord) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    record = train_of(lora)
    flow_run_id = uuid.UUID(run_of(lora).data.tags["tuneline.prefect_flow_run"])
    assert record.flow_run_id == str(flow_run_id)
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(flow_run_id)
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        artifacts = client.read_artifacts(artifact_filter=wanted)
    assert flow_run.name == record.id
    assert {f"train:{record.id}", f"mlflow:{record.run_id}"} <= set(flow_run.tags)
    (page,) = (str(artifact.data) for artifact in artifacts if artifact.key == "train-report")
    shown = {str(artifact.key): str(artifact.data) for artifact in artifacts}
    assert {"validation-dataset-report", "evaluation-dataset-report"} <= set(shown)
    assert "What training reads" in shown["dataset-report"]
    assert "| Status | completed |" in page
    assert "| Exact accuracy |" in page


def test_registered_model_carries_lineage_and_scores(lora: ModelRecord) -> None:
    record = train_of(lora)
    client = tracking.mlflow_client()
    version = client.get_model_version("lights", str(lora.registered_version))
    lineage = {"model": lora.name, "stage": "customized", "base": "tiny", "method": "sft", "train": record.id}
    assert version.tags.items() >= {f"tuneline.{name}": value for name, value in lineage.items()}.items()
    assert version.tags["tuneline.dataset"] == record.dataset
    assert version.run_id == record.run_id
    assert lora.evaluation == record.evaluation["tuned"]
    assert version.tags["tuneline.score.rouge_l"] == f"{lora.evaluation['rouge_l']:.2f}"
    logged = client.get_logged_model(str(models.logged_model_id(lora)))
    assert {metric.key: metric.value for metric in logged.metrics} == {
        f"{name}_tuned": value for name, value in lora.evaluation.items()
    }
    assert logged.model_id in {output.model_id for output in run_of(lora).outputs.model_outputs}


# customized → complete


def test_customized_model_is_saved_as_a_proved_complete_model(lora: ModelRecord, lora_complete: ModelRecord) -> None:
    assert re.fullmatch(re.escape(lora.name) + r"_s_[0-9a-f]{4}", lora_complete.name)
    assert (lora_complete.stage, lora_complete.adapter, lora_complete.parent) == ("complete", False, lora.name)
    proof = lora_complete.verification
    assert 0 < proof["merged_to_reference"] <= proof["tolerance"] < proof["merged_to_base"]
    assert (lora_complete.evaluation, lora_complete.evaluated) == (lora.evaluation, lora.name)
    assert train_of(lora).model == lora_complete.name


def test_saving_the_same_model_again_gives_the_same_complete_model(
    lora: ModelRecord, lora_complete: ModelRecord
) -> None:
    versions = tracking.mlflow_client().search_model_versions("name = 'lights'")
    assert trains.save_complete(lora, lambda _: None) == lora_complete
    assert len(tracking.mlflow_client().search_model_versions("name = 'lights'")) == len(versions)


def test_complete_model_that_was_published_but_not_registered_is_registered_by_the_rerun(
    lora: ModelRecord, lora_complete: ModelRecord
) -> None:
    client = tracking.mlflow_client()
    client.delete_model_version("lights", str(lora_complete.registered_version))
    record = lora_complete.path / models.RECORD_FILE
    write_record(record, lora_complete.model_copy(update={"registered_version": None}))
    again = trains.save_complete(lora, lambda _: None)
    version = client.get_model_version("lights", str(again.registered_version))
    assert version.tags["tuneline.model"] == lora_complete.name


# →customized → deployed, and a second deployment


def test_customized_and_complete_model_answer_alike_at_one_endpoint_and_roll_back_moves_the_alias(
    lora: ModelRecord, lora_complete: ModelRecord
) -> None:
    first = deploy(lora.name)
    answer = answers_alike(first)
    assert models.find_model("lights@deployed").name == lora.name
    second = deploy(lora_complete.name)
    assert second.address == first.address
    assert answers_alike(second) == answer
    assert models.find_model("lights@deployed").name == lora_complete.name
    back = deploying.roll_back("lights")
    assert back.current == first.current
    assert answers_alike(back) == answer
    assert models.aliases_by_model() == {lora.name: ["deployed"]}
    deploying.undeploy("lights")
    assert models.aliases_by_model() == {}


# base → customized → complete → deployed, on a base held in 4 bits


@pytest.mark.lifecycle
def test_4bit_train_goes_through_to_an_endpoint_that_answers(place: Place) -> None:
    from flows.deployed import deployed

    given = resolved(place.root, "quarter", through="deployed", endpoint="four", hyper={"load_in_4bit": True})
    endpoint = deployed(train=given.config, origins=given.origins)
    assert endpoint.name == "four"
    assert answers_alike(endpoint)
    made = {model.stage: model for model in models.list_models() if model.line == "quarter"}
    assert set(made) == {"customized", "complete"}
    assert "quantization_config" not in json.loads((made["complete"].path / "config.json").read_text())
    assert models.find_model("quarter@deployed") == made["complete"]
    assert train_of(made["complete"]).status == "completed"
    deploying.undeploy("four")


# base → complete, and complete → deployed


@pytest.mark.lifecycle
def test_full_train_gives_a_complete_model_that_is_scored_and_answers(full: ModelRecord) -> None:
    assert re.fullmatch(r"tiny_full_\d{8}_[0-9a-f]{4}_s_[0-9a-f]{4}", full.name)
    assert (full.stage, full.adapter) == ("complete", False)
    assert full.evaluation == train_of(full).evaluation["tuned"]
    assert [model.stage for model in models.list_models() if model.line == "full"] == ["complete"]
    assert train_of(full).model == full.name
    assert answers_alike(deploy(full.name))
    deploying.undeploy("full")


# base → deployed


@pytest.mark.lifecycle
def test_base_model_is_deployed_as_it_is(place: Place, lora: ModelRecord) -> None:
    endpoint = deploy(str(place.root / "tiny"))
    assert endpoint.name == "tiny"
    assert answers_alike(endpoint)
    assert models.find_model("tiny@deployed").stage == "base"
    deploying.undeploy("tiny")


# finding models


def test_models_are_found_by_name_train_alias_and_folder(lora: ModelRecord, lora_complete: ModelRecord) -> None:
    models.set_alias(lora, "champion")
    assert models.find_model(lora.name) == lora
    assert models.find_model("lights@champion") == lora
    assert models.find_model(str(lora.path)) == lora
    assert models.find_model(str(lora.train)).name == lora_complete.name
    models.set_alias(lora_complete, "champion")
    assert models.find_model("lights@champion").name == lora_complete.name


def test_unknown_model_is_told_with_the_nearest_name(lora: ModelRecord) -> None:
    with pytest.raises(UserError, match=re.escape(lora.name)):
        models.find_model(lora.name[:-1])
    with pytest.raises(UserError, match="no model of lights has the alias nobody"):
        models.find_model("lights@nobody")


# what goes wrong


def test_failed_train_says_why_and_leaves_nothing_running(place: Place) -> None:
    from flows.customized import customized

    given = resolved(place.root, "broken", hyper={"lora_targets": ["no_such_module"]})
    with pytest.raises(UserError, match="no_such_module"):
        customized(train=given.config, origins=given.origins)
    record = trains.load_train("broken")
    assert (record.status, trains.current_status(record)) == ("failed", "failed")
    assert "no_such_module" in str(record.reason)
    run = tracking.mlflow_client().get_run(record.run_id)
    assert run.info.status == "FAILED"
    assert "no_such_module" in run.data.tags["tuneline.reason"]
    assert "training/train.log" in files_of(record.run_id)
    assert processes_naming(record.id) == []
    assert not list(place.settings.models.glob("*broken*"))


def test_only_a_customized_model_can_be_saved(lora_complete: ModelRecord) -> None:
    from flows.complete import complete

    with pytest.raises(UserError, match="only a customized model can be saved"):
        complete(model=lora_complete.name)
