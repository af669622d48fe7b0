"""Manifests of training methods: read, checked, and told what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import UserError
from methods.registry import find_method, load_methods, read_manifest

GOOD: dict[str, Any] = {
    "name": "mine",
    "description": "A method of our own.",
    "types": ["chat"],
    "lifecycle": ["customized"],
    "stages": {"training": {"file": "training.py", "environment": "host"}},
}


def write_manifest(folder: Path, **changes: Any) -> Path:
    (folder / "training.py").touch()
    path = folder / "method.yaml"
    content = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content))
    return path


def test_every_built_in_method_is_valid_and_has_the_files_it_names() -> None:
    methods = load_methods()
    assert "sft" in methods
    for method in methods.values():
        assert all(method.stage_file(stage).is_file() for stage in method.stages)


def test_a_stage_in_the_host_environment_runs_with_this_interpreter(tmp_path: Path) -> None:
    method = read_manifest(write_manifest(tmp_path))
    assert method.stage_python("training") == Path(sys.executable)
    assert method.stage_file("training") == tmp_path / "training.py"


def test_a_stage_in_an_environment_of_its_own_runs_with_its_interpreter(tmp_path: Path) -> None:
    stages = {"training": {"file": "training.py", "environment": str(tmp_path / "env")}}
    method = read_manifest(write_manifest(tmp_path, stages=stages))
    with pytest.raises(UserError, match="no interpreter"):
        method.stage_python("training")
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").touch()
    assert method.stage_python("training") == tmp_path / "env" / "bin" / "python"


def test_a_stage_that_the_method_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no stage saving[\s\S]*one of training"):
        read_manifest(write_manifest(tmp_path)).stage_file("saving")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "Has Blanks"}, "field: name"),
        ({"description": None}, "field: description"),
        ({"types": ["music"]}, r"field: types.0 = 'music'"),
        ({"colour": "red"}, "field: colour"),
        ({"lifecycle": ["customized", "complete"]}, "lifecycle complete needs the stage saving"),
        ({"lifecycle": ["customized", "deployed"]}, "lifecycle deployed needs deployment_targets"),
        ({"stages": {"cooking": GOOD["stages"]["training"]}}, "field: stages.cooking"),
        ({"stages": {"training": {"file": "absent.py", "environment": "host"}}}, "field: stages.training.file"),
        ({"stages": {"training": {"file": "../out.py", "environment": "host"}}}, "field: stages.training.file"),
    ],
)
def test_a_wrong_manifest_is_refused_with_file_and_field(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    (tmp_path / "out.py").touch()
    (tmp_path / "mine").mkdir()
    path = write_manifest(tmp_path / "mine", **changes)
    with pytest.raises(UserError, match=told) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: [\n", "just words\n", "\xff\xfe"])
def test_what_is_no_mapping_or_no_yaml_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "method.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"method\.yaml"):
        read_manifest(path)


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"did you mean sft\?"):
        find_method("sfft")
