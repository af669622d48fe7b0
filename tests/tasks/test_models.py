"""The model store and the registry, embedded and through a real MLflow server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from configs.errors import UserError
from configs.records import ModelRecord
from configs.settings import load_settings
from tasks import models, tracking
from tests.mlflow_server import MlflowServer


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A database for the embedded client and a server, both kept for all tests: lines differ by test."""
    root = tmp_path_factory.mktemp("registry")
    server = MlflowServer(root)
    server.start()
    yield {"embedded": f"sqlite:///{root}/embedded.db", "server": server.address}
    server.end()


@pytest.fixture(params=["embedded", "server"])
def line(request: pytest.FixtureRequest, addresses: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a line of models that nothing else uses."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", addresses[request.param])
    return request.node.originalname.removeprefix("test_")[:40]


def product(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def unpublished(line: str, name: str, tmp_path: Path) -> ModelRecord:
    run_id = tracking.start_run(name, "train", {})
    return ModelRecord(
        name=name,
        stage="customized",
        path=load_settings().models / name,
        line=line,
        base="tiny",
        base_path=tmp_path,
        adapter=True,
        parent="tiny",
        train=f"train-{name}",
        run_id=run_id,
        dataset="rows@0123456789ab",
    )


def published(line: str, name: str, tmp_path: Path) -> ModelRecord:
    return models.publish_model(unpublished(line, name, tmp_path), product(tmp_path, f"{name}-product"))


def test_published_model_lies_in_the_store_with_its_record_and_is_registered(line: str, tmp_path: Path) -> None:
    record = published(line, "a", tmp_path)
    assert (record.path / "adapter_model.safetensors").read_bytes() == b"weights"
    assert not (tmp_path / "a-product").exists()
    assert ModelRecord.model_validate_json((record.path / models.RECORD_FILE).read_text()) == record
    version = MlflowClient().get_model_version(line, str(record.registered_version))
    tags = {name.removeprefix("tuneline."): value for name, value in version.tags.items()}
    assert tags.items() >= {"model": "a", "stage": "customized", "base": "tiny", "train": "train-a"}.items()
    assert (tags["dataset"], tags["uri"]) == ("rows@0123456789ab", record.path.as_uri())
    run = MlflowClient().get_run(str(record.run_id))
    assert [output.model_id for output in run.outputs.model_outputs] == [models.logged_model_id(record)]


def test_registered_model_holds_its_record_and_not_its_weights(line: str, tmp_path: Path) -> None:
    record = published(line, "b", tmp_path)
    logged = models.logged_model_id(record)
    files = {entry.path for entry in MlflowClient().list_logged_model_artifacts(str(logged))}
    assert files == {"tuneline.json", "adapter_config.json"}


def test_publishing_again_makes_no_second_version(line: str, tmp_path: Path) -> None:
    record = published(line, "c", tmp_path)
    again = models.publish_model(record, tmp_path / "gone")
    assert again == record
    assert len(MlflowClient().search_model_versions(f"name = '{line}'")) == 1


def test_registration_that_was_killed_half_way_is_finished_without_a_second_logged_model(
    line: str, tmp_path: Path
) -> None:
    record = published(line, "d", tmp_path)
    logged = models.logged_model_id(record)
    MlflowClient().delete_model_version(line, str(record.registered_version))
    again = models.register_model(record)
    assert models.logged_model_id(again) == logged


def test_alias_moves_from_model_to_model_of_a_line_and_goes(line: str, tmp_path: Path) -> None:
    first, second = published(line, "e1", tmp_path), published(line, "e2", tmp_path)
    models.set_alias(first, "champion")
    assert models.find_model(f"{line}@champion") == first
    models.set_alias(second, "champion")
    models.set_alias(first, "challenger")
    assert models.find_model(f"{line}@champion") == second
    aliases = models.aliases_by_model()
    assert (aliases["e1"], aliases["e2"]) == (["challenger"], ["champion"])
    models.clear_alias(line, "champion")
    with pytest.raises(UserError, match="has the alias champion"):
        models.find_model(f"{line}@champion")


def test_scores_stand_in_the_record_the_tags_and_the_logged_model(line: str, tmp_path: Path) -> None:
    record = published(line, "f", tmp_path)
    logged = models.logged_model_id(record)
    tracking.log_scores(str(record.run_id), {"tuned_accuracy": 87.5}, logged)
    noted = models.note_evaluation(record, {"accuracy": 87.5})
    assert (noted.evaluation, noted.evaluated) == ({"accuracy": 87.5}, "f")
    assert models.find_model("f") == noted
    version = MlflowClient().get_model_version(line, str(record.registered_version))
    assert version.tags["tuneline.score.accuracy"] == "87.50"
    (metric,) = MlflowClient().get_logged_model(str(logged)).metrics
    assert (metric.key, metric.value) == ("tuned_accuracy", 87.5)


def test_model_is_found_by_train_and_by_folder_the_newest_first(line: str, tmp_path: Path) -> None:
    record = published(line, "g", tmp_path)
    assert models.find_model("train-g") == record
    assert models.find_model(str(record.path)) == record
    newer = unpublished(line, "g_s_0000", tmp_path).model_copy(update={"train": "train-g", "stage": "complete"})
    newer = models.publish_model(newer, product(tmp_path, "newer"))
    assert models.find_model("train-g") == newer


def test_base_model_is_found_by_its_folder(line: str, tiny_model: Path) -> None:
    record = models.find_model(str(tiny_model))
    assert (record.stage, record.path, record.adapter) == ("base", tiny_model, False)


def test_torn_record_is_told_by_its_file(line: str, tmp_path: Path) -> None:
    record = published(line, "h", tmp_path)
    path = record.path / models.RECORD_FILE
    path.write_text(json.dumps({"name": "h"}))
    with pytest.raises(UserError) as error:
        models.list_models()
    assert error.value.file == str(path)
