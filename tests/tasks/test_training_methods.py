"""Methods are added and deleted as whole folders; built-in ones, other files and past trains stay as they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.records import TrainRecord
from configs.settings import load_settings
from configs.train import TrainConfig
from deployments.flow_deployments import describe_deployments
from methods.registry import find_method, load_methods
from tasks import trains
from tasks.training_methods import add_method, delete_method, new_method

MANIFEST = """
name: mine
description: A method of our own.
types: [chat]
lifecycle: [customized]
stages:
  training: {file: training.py, environment: host}
parameters:
  strength: {type: integer, minimum: 1, default: 3, title: Strength}
"""


@pytest.fixture
def folder(home: Path, tmp_path: Path) -> Path:
    made = tmp_path / "my method"
    made.mkdir()
    (made / "method.yaml").write_text(MANIFEST)
    (made / "training.py").write_text("from helper import VALUE\n")
    (made / "helper.py").write_text("VALUE = 1\n")
    (made / "also.py").symlink_to("helper.py")
    (made / "__pycache__").mkdir()
    return made


def test_a_method_is_added_with_its_form_and_deleted_without_a_trace(folder: Path) -> None:
    settings = load_settings()
    before = {item.title for item in describe_deployments(settings)}
    added = add_method(folder, settings)
    assert added.folder == settings.methods / "mine"
    assert sorted(path.name for path in added.folder.iterdir()) == [
        "also.py",
        "helper.py",
        "method.yaml",
        "training.py",
    ]
    assert find_method("mine") == added
    (made,) = [item for item in describe_deployments(settings) if item.title not in before]
    assert made.title == "customized/mine"
    train = made.form["properties"]["train"]["properties"]
    assert train["method_params"]["properties"]["strength"]["minimum"] == 1
    taken = r"my method/method\.yaml:2: there is a method of this name already[\s\S]*methods delete mine"
    with pytest.raises(UserError, match=taken):
        add_method(folder, settings)

    config = TrainConfig(name="past", method="mine", base_model="b", dataset="d")
    trains.save_record(TrainRecord(id="past_20260101_aaaa", config=config, run_id="none", status="completed"))
    delete_method("mine", settings)
    assert "mine" not in load_methods()
    assert [path.name for path in settings.methods.iterdir()] == [".lock"]
    assert {item.title for item in describe_deployments(settings)} == before
    assert trains.load_train("past").config.method == "mine"
    assert folder.is_dir()


def test_a_method_that_a_train_runs_with_is_not_deleted(folder: Path) -> None:
    settings = load_settings()
    add_method(folder, settings)
    config = TrainConfig(name="now", method="mine", base_model="b", dataset="d")
    trains.own_train("now_20260101_aaaa")
    try:
        trains.save_record(TrainRecord(id="now_20260101_aaaa", config=config, run_id="none"))
        with pytest.raises(UserError, match="now_20260101_aaaa"):
            delete_method("mine", settings)
    finally:
        trains.let_go("now_20260101_aaaa")
    assert find_method("mine").folder.is_dir()


def test_built_in_methods_are_neither_deleted_nor_replaced(folder: Path) -> None:
    settings = load_settings()
    built_in = find_method("sft").folder
    with pytest.raises(UserError, match="built-in"):
        delete_method("sft", settings)
    (folder / "method.yaml").write_text(MANIFEST.replace("name: mine", "name: sft"))
    with pytest.raises(UserError, match="of this name already"):
        add_method(folder, settings)
    assert find_method("sft").folder == built_in


def test_what_leads_out_of_the_folder_or_is_no_file_is_refused_and_nothing_is_copied(
    folder: Path, tmp_path: Path
) -> None:
    settings = load_settings()
    (tmp_path / "secret").write_text("secret")
    for target in (tmp_path / "secret", Path("../secret"), folder / "helper.py", Path("/etc")):
        (folder / "link").symlink_to(target)
        with pytest.raises(UserError, match="leads out"):
            add_method(folder, settings)
        (folder / "link").unlink()
    (folder / "below").mkdir()
    for link, target in (("link", "link"), ("below/link", ".."), ("below/link", "../../my method"), ("link", "gone")):
        (folder / link).symlink_to(target)
        with pytest.raises(UserError, match="round in a circle") as caught:
            add_method(folder, settings)
        assert caught.value.file == str(folder / link)
        (folder / link).unlink()
    (folder / "below").rmdir()
    os.mkfifo(folder / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        add_method(folder, settings)
    (folder / "pipe").unlink()
    (folder / "method.yaml").write_text(MANIFEST.replace("training.py", "absent.py"))
    with pytest.raises(UserError, match=r"my method/method\.yaml:7: no such file[\s\S]*stages\.training\.file"):
        add_method(folder, settings)
    with pytest.raises(UserError, match="no folder of a method"):
        add_method(tmp_path, settings)
    assert not settings.methods.exists() or [path.name for path in settings.methods.iterdir()] == [".lock"]


def test_a_new_method_begins_as_a_copy_under_its_own_name(folder: Path, tmp_path: Path) -> None:
    settings = load_settings()
    text = "# Ours.\nstages:\n  training: {file: training.py, environment: songs}  # not the host\n" + MANIFEST
    text = text.replace("stages:\n  training: {file: training.py, environment: host}\n", "")
    (folder / "method.yaml").write_text(text)
    (folder / "environment.yml").write_text("name: songs\ndependencies: [python=3.11]\n")
    add_method(folder, settings)
    manifest = new_method("yours", "mine", tmp_path / "yours", settings)
    changed = text.replace("name: mine", "name: yours").replace("environment: songs", "environment: yours")
    assert manifest.read_text() == changed
    assert (tmp_path / "yours" / "environment.yml").read_text() == "name: yours\ndependencies: [python=3.11]\n"
    assert (tmp_path / "yours" / "helper.py").read_text() == "VALUE = 1\n"
    assert not (tmp_path / "yours" / "__pycache__").exists()
    assert add_method(manifest.parent, settings).name == "yours"
    for name, template, target, told in (
        ("third", "mine", tmp_path / "yours", "something here already"),
        ("yours", "mine", tmp_path / "third", "of this name already"),
        ("Third", "mine", tmp_path / "third", "not usable as the name"),
        ("third", "absent", tmp_path / "third", "no such training method"),
    ):
        with pytest.raises(UserError, match=told):
            new_method(name, template, target, settings)
    assert not (tmp_path / "third").exists()


def test_a_setting_closes_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_method(folder, load_settings())
    monkeypatch.setenv("TUNELINE_METHOD_CHANGES", "closed")
    for change in (lambda: add_method(folder, load_settings()), lambda: delete_method("mine", load_settings())):
        with pytest.raises(UserError, match="TUNELINE_METHOD_CHANGES"):
            change()
    assert "mine" in load_methods()


def test_what_a_killed_addition_has_left_is_no_method_and_is_swept_away(folder: Path) -> None:
    settings = load_settings()
    left = settings.methods / ".adding-1234"
    left.mkdir(parents=True)
    (left / "method.yaml").write_text("half a manif")
    assert "mine" not in load_methods()
    add_method(folder, settings)
    assert not left.exists()
