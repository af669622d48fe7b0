"""Manifests of training methods: read, checked, and told what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.train import Hyperparameters, TrainConfig
from methods.registry import find_method, known_method, load_methods, read_manifest
from tests.own_methods import STAGE, install_method, write_manifest

PLAIN = {"type": "number", "default": 0.1}


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


def test_a_parameter_that_a_method_does_not_use_is_at_its_default_where_nobody_sets_it() -> None:
    method = find_method("pretrain")
    common = Hyperparameters()
    for name in method.hyperparameters.unused:
        assert method.hyperparameter_default(name) == getattr(common, name)


def own(**keywords: Any) -> dict[str, Any]:
    """Changes of a manifest: one parameter of its own, `beta`, with these keywords."""
    return {"parameters": {"good": PLAIN, "beta": keywords}}


def common(**groups: Any) -> dict[str, Any]:
    return {"hyperparameters": groups}


# Changes of a good manifest, the line at fault as it stands there, and what is told.
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"name": "Has Blanks"}, "name: Has Blanks", "field: name"),
    ({"description": None}, "name: mine", "field: description"),
    ({"stages": None}, "name: mine", "field: stages"),
    ({"stages": {"training": {"environment": "host"}}}, "  training:", "field: stages.training.file"),
    ({"stages": {"training": {"file": "training.py"}}}, "  training:", "field: stages.training.environment"),
    ({"types": ["music"]}, "types:", "field: types.0 = 'music'"),
    ({"colour": "red"}, "colour: red", "field: colour"),
    ({"folder": "/tmp"}, "folder: /tmp", "there is no such field"),
    ({"datasets": ["songs"]}, "datasets:", "field: datasets.0 = 'songs'"),
    ({"deterministic": "often"}, "deterministic: often", "field: deterministic"),
    ({"lifecycle": ["customized", "complete"]}, "lifecycle:", "lifecycle complete needs the stage saving"),
    ({"lifecycle": ["customized", "deployed"]}, "lifecycle:", "lifecycle deployed needs deployment_targets"),
    ({"deployment_targets": ["custom"]}, "deployment_targets:", "custom needs the stage deploying"),
    ({"stages": {"cooking": STAGE}}, "  cooking:", "field: stages.cooking"),
    # missing file, path outside of the folder, circle of links
    ({"stages": {"training": {**STAGE, "file": "absent.py"}}}, "    file: absent.py", "no such file inside"),
    ({"stages": {"training": {**STAGE, "file": "../out.py"}}}, "    file: ../out.py", "no such file inside"),
    ({"stages": {"training": {**STAGE, "file": "out.py"}}}, "    file: out.py", "no such file inside"),
    ({"stages": {"training": {**STAGE, "file": "circle.py"}}}, "    file: circle.py", "no such file inside"),
    ({**own(**PLAIN), "stays_customized": {"gamma": [1]}}, "  gamma:", "no such parameter of its own"),
    ({**own(**PLAIN), "stays_customized": {"beta": [0.5, "x"]}}, "  beta:", "the parameter does not take this value"),
    # environments
    (
        {"stages": {"training": {**STAGE, "environment": "songs"}}},
        "    environment: songs",
        "the environment of stage training is unknown",
    ),
    (
        {"stages": {"training": {**STAGE, "environment": "../env"}}},
        "    environment: ../env",
        "this folder is not inside the method's",
    ),
    # what a train of it is where nobody says otherwise
    ({"train": {"dataest": "x"}}, "  dataest: x", "did you mean dataset?"),
    ({"train": {"method": "sft"}}, "  method: sft", "field: train.method"),
    ({"train": {"dataset": "absent.jsonl"}}, "  dataset: absent.jsonl", "there is no such file"),
    ({"train": {"max_new_tokens": 0}}, "  max_new_tokens: 0", "expected: a whole number ≥ 1"),
    # how it takes the common hyper-parameters
    (common(unused=["lora_rnak"]), "  unused:", "did you mean lora_rank?"),
    (common(defaults={"lora_rank": 0}), "    lora_rank: 0", "expected: a whole number ≥ 1"),
    (common(defaults={"lora": 1}), "    lora: 1", "there is no such hyper-parameter"),
    (common(choices={"tuning": ["none"]}), "    tuning:", "expected: one of full, lora"),
    (common(choices={"optimizer": ["sgd"]}), "    optimizer:", "its default, adamw, is none of the choices"),
    (common(choices={"tuning": ["full"]}, defaults={"tuning": "full"}), "    tuning:", "no customized model"),
    (common(unused=["seed"], defaults={"seed": 1}), "    seed: 1", "said to be unused as well"),
    (common(defaults={"tuning": "full", "load_in_4bit": True}), "  defaults:", "cannot be trained in full"),
    (common(odd=1), "  odd: 1", "field: hyperparameters.odd"),
    # parameters of its own
    ({"parameters": {"Beta": PLAIN}}, "  Beta:", "not usable as the name of a parameter"),
    ({"parameters": {"batch_size": PLAIN}}, "  batch_size:", "taken by the parameter batch_size"),
    ({"parameters": {"lr": PLAIN}}, "  lr:", "taken by the parameter learning_rate"),
    ({"parameters": {"dataset": PLAIN}}, "  dataset:", "taken by the parameter dataset"),
    ({"parameters": {"a_b": PLAIN, "ab": PLAIN}}, "  ab:", "taken by the parameter a_b"),
    ({"parameters": {"beta": 1}}, "  beta: 1", "field: parameters.beta = 1"),
    (own(type="float", default=1), "    type: float", "expected: one of string, integer, number"),
    (own(default=1), "  beta:", "a parameter has one type"),
    (own(type="number", default=1, range=[0, 1]), "    range:", "there is no such keyword"),
    (own(type="number"), "  beta:", "this parameter has no default"),
    (own(type="number", default=1, required=True), "    default: 1", "what is required has no default"),
    (own(type="number", default="x"), "    default: x", "the default is no value that the schema allows"),
    (own(type="number", minimum=0, default=-1), "    default: -1", "expected: a number ≥ 0"),
    (own(type="number", minimum="x", default=1), "    minimum: x", "this is no JSON schema"),
    (own(type="string", enum=["a"], default="b"), "    default: b", "expected: one of a"),
    (own(type="string", pattern="(", default="b"), "    pattern: (", "'(' is not a 'regex'"),
    (own(type="string", format="date", default="b"), "    format: date", "there is no such format"),
    (own(type="string", format="model", default="b"), "    default: b", "no model is there on every installation"),
    (own(type="string", format="path", default="b.py"), "    default: b.py", "no such file inside the method's folder"),
    (own(type="number", default=1, title=3), "    title: 3", "this is text"),
    (own(type="number", required="yes"), "    required: 'yes'", "this is a switch"),
]


@pytest.mark.parametrize(("changes", "line", "told"), BAD, ids=[told for _, _, told in BAD])
def test_a_wrong_manifest_is_refused_with_file_line_and_field(
    tmp_path: Path, changes: dict[str, Any], line: str, told: str
) -> None:
    (tmp_path / "out.py").touch()
    path = write_manifest(tmp_path / "mine", **changes)
    (path.parent / "out.py").symlink_to("../out.py")
    (path.parent / "circle.py").symlink_to("circle.py")
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    assert told in str(caught.value)
    assert caught.value.file == str(path)
    assert caught.value.line is not None
    assert path.read_text().splitlines()[caught.value.line - 1].startswith(line)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: [\n", "just words\n", "\xff\xfe"])
def test_what_is_no_mapping_or_no_yaml_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "method.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"method\.yaml"):
        read_manifest(path)


def test_a_manifest_that_contains_itself_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_manifest(tmp_path)
    path.write_text(path.read_text() + "parameters: &all\n  beta: {type: object, default: *all}\n")
    with pytest.raises(UserError, match=r"method\.yaml:\d+: the YAML is nested too deeply"):
        read_manifest(path)


def test_two_methods_of_one_name_are_refused_with_the_line_of_the_second(home: Path) -> None:
    folder = install_method("mine")
    write_manifest(folder.with_name("other"), name="mine")
    write_manifest(folder.with_name("like-sft"), name="sft")
    with pytest.raises(
        UserError, match=r"like-sft/method\.yaml:1: there is a method of this name already[\s\S]*built-in"
    ):
        load_methods()
    (folder.with_name("like-sft") / "method.yaml").unlink()
    with pytest.raises(UserError, match=r"other/method\.yaml:1[\s\S]*tuneline methods delete mine"):
        load_methods()


def test_a_defective_method_does_no_harm_to_another_one(home: Path) -> None:
    install_method("broken", stages={})
    good = install_method("good")
    assert find_method("good").folder == good
    with pytest.raises(UserError, match=r"broken/method\.yaml"):
        find_method("broken")
    assert known_method("broken") is known_method("absent") is None


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"did you mean sft\?"):
        find_method("sfft")


def test_an_environment_is_known_by_the_file_beside_the_manifest(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, stages={"training": {**STAGE, "environment": "songs"}})
    (tmp_path / "environment.yml").write_text("name: songs\ndependencies: [python=3.11]\n")
    with pytest.raises(UserError, match=r"was not made yet[\s\S]*tuneline envs create mine"):
        read_manifest(path).stage_python("training")


def test_kinds_of_rows_follow_from_the_types_unless_they_are_named(tmp_path: Path) -> None:
    method = read_manifest(write_manifest(tmp_path, types=["chat", "embedding"]))
    assert method.kinds == method.evaluated_kinds == ("chat", "pair", "triplet", "scored_pair")
    method = read_manifest(write_manifest(tmp_path, datasets=["preference"]))
    assert (method.kinds, method.evaluated_kinds) == (("preference",), ("chat", "preference"))
    method = read_manifest(write_manifest(tmp_path, datasets=["preference"], evaluation=["ranking"]))
    assert method.evaluated_kinds == ("ranking",)


def test_rows_of_a_manifest_are_its_own_or_ship(tmp_path: Path) -> None:
    train = {"dataset": "rows.jsonl", "validation_dataset": "samples/commands_en/validation.jsonl", "name": "x"}
    (tmp_path / "rows.jsonl").touch()
    found = read_manifest(write_manifest(tmp_path, train=train)).train_defaults
    assert found["dataset"] == str(tmp_path / "rows.jsonl")
    assert Path(found["validation_dataset"]).is_file()
    assert found["name"] == "x"


def test_the_job_holds_what_the_method_takes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").touch()
    file = {"type": "string", "format": "path", "default": "rewards.py"}
    takes = {"unused": ["tuning", "num_generations"], "defaults": {"lora_rank": 4}}
    method = read_manifest(write_manifest(tmp_path, parameters={"beta": PLAIN, "file": file}, hyperparameters=takes))
    config = TrainConfig(name="a", method="mine", base_model="b", dataset="c", method_params={"beta": 0.7})
    job = method.job_parameters(config)
    assert (job["beta"], job["file"]) == (0.7, str(tmp_path / "rewards.py"))
    assert (job["lora_alpha"], job["max_new_tokens"]) == (16, 128)
    assert not {"tuning", "num_generations", "method_params"} & set(job)
    assert method.hyperparameter_default("lora_rank") == 4
