"""Profiles: saved from trains and files, picked at a start, recorded by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import UserError
from configs.profiles import Profile, delete_profile, find_profile, list_profiles, write_profile
from configs.resolve import profile_of_file, profile_of_train, recorded_profile, resolve_train
from configs.settings import load_settings
from tests.configs.test_resolve import BASE, MINE, own_method, written


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    own_method()


def save(name: str, replace: bool = False, **content: Any) -> Path:
    profile = Profile(**{"method": "mine", "saved_from": "a test", **content})
    return write_profile(name, profile, load_settings(), replace=replace)


def test_a_profile_lies_between_preset_and_file_and_its_values_are_recorded(tmp_path: Path) -> None:
    path = save("fast", hyperparameters={"lora_rank": 4, "warmup_ratio": 0.2, "epochs": 2}, method_params={"beta": 0.7})
    file = written(tmp_path, MINE + "epochs: 3\npreset: nl2json\n")
    resolved = resolve_train(file, profile="fast")
    hyper, origins = resolved.config.hyperparameters, resolved.origins
    assert (hyper.lora_rank, hyper.warmup_ratio, resolved.config.method_params["beta"]) == (4, 0.2, 0.7)
    assert origins["hyperparameters.lora_rank"] == origins["method_params.beta"] == "profile fast"
    assert origins["hyperparameters.warmup_ratio"] == "profile fast"  # nl2json has another one
    assert origins["hyperparameters.lr_decay_ratio"] == "preset nl2json"
    assert (hyper.epochs, origins["hyperparameters.epochs"]) == (3, f"file {file}:5")
    again = resolve_train(written(tmp_path, MINE + "epochs: 3\npreset: nl2json\nprofile: fast\n"))
    assert again.config == resolved.config
    path.write_text(path.read_text().replace("beta: 0.7", "beta: 0"))
    with pytest.raises(UserError, match=rf"{path}:8: this value is impossible\n  field: method_params.beta = 0"):
        resolve_train(file, profile="fast")


def test_a_profile_with_parameters_of_a_method_names_it_and_another_method_refuses_them(tmp_path: Path) -> None:
    save("fast", method_params={"beta": 0.7})
    save("plain", hyperparameters={"lora_rank": 4})
    assert resolve_train(written(tmp_path, BASE + "profile: fast\n")).config.method == "mine"
    assert resolve_train(written(tmp_path, BASE + "profile: plain\n")).config.method == "sft"
    with pytest.raises(UserError, match=r"fast\.yaml:4: the method sft has no such parameter[\s\S]*beta"):
        resolve_train(written(tmp_path, BASE + "method: sft\nprofile: fast\n"))


def test_a_file_is_saved_with_what_it_sets_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").touch()
    text = MINE + "lora_rank: 4\nbeta: 1\nrewards: rewards.py\nmax_steps: -1\ndescription: x\n"
    profile, left_out = profile_of_file(written(tmp_path, text), ["kind=hinge"])
    assert profile.method == "mine"
    assert profile.hyperparameters == {"lora_rank": 4, "max_steps": None}
    assert profile.method_params == {"beta": 1.0, "rewards": str(tmp_path / "rewards.py"), "kind": "hinge"}
    assert left_out == ["name", "base_model", "dataset", "description"]
    alone, _ = profile_of_file(written(tmp_path, "method: mine\nlora_rank: 4\n"))
    assert alone.values == {"hyperparameters": {"lora_rank": 4}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("method: mine\nbeta: 0\n", "train.yaml:2: this value is impossible"),
        ("method: mine\nlora_rank: 0\n", "train.yaml:2: this value is impossible"),
        ("method: mine\nnum_generations: 7\n", "has no use for this parameter"),
        ("method: mine\nbetta: 7\n", "did you mean beta"),
        ("method: mni\n", "no such training method"),
    ],
)
def test_what_no_train_could_be_started_with_is_not_saved(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        profile_of_file(written(tmp_path, text))


def test_a_train_is_saved_with_what_somebody_has_set(tmp_path: Path) -> None:
    save("fast", hyperparameters={"lora_rank": 4}, method_params={"beta": 0.7})
    resolved = resolve_train(written(tmp_path, MINE + "steps: 9\nepochs: 2\n"), profile="fast")
    profile = profile_of_train(resolved.config, resolved.origins, "a_1")
    assert profile.saved_from == "train a_1"
    assert profile.hyperparameters == {"lora_rank": 4, "epochs": 2}
    assert profile.method_params == {"beta": 0.7, "steps": 9}
    recorded = recorded_profile("fast", resolved.config, resolved.origins)
    assert recorded is not None
    assert recorded.values == {"hyperparameters": {"lora_rank": 4}, "method_params": {"beta": 0.7}}
    assert recorded_profile("other", resolved.config, resolved.origins) is None
    save("fast", replace=True, hyperparameters={"lora_rank": 64})
    again = resolve_train(written(tmp_path, MINE), profile=recorded)
    assert (again.config.hyperparameters.lora_rank, again.config.method_params["beta"]) == (4, 0.7)
    assert again.origins["method_params.beta"] == "profile fast"


def test_a_profile_does_not_change_what_was_copied(tmp_path: Path) -> None:
    save("fast", hyperparameters={"lora_rank": 4})
    copied = resolve_train(written(tmp_path, MINE)).config.model_dump(mode="json")
    resolved = resolve_train(copied=copied, copied_from="one", profile="fast")
    assert resolved.config.hyperparameters.lora_rank == 8
    assert "the profile fast does not change copied values (lora_rank); set them by name" in resolved.warnings


def test_profiles_are_listed_replaced_and_deleted(tmp_path: Path) -> None:
    settings = load_settings()
    path = save("fast", hyperparameters={"lora_rank": 4}, description="quick")
    assert yaml.safe_load(path.read_text()) == {
        "method": "mine",
        "description": "quick",
        "saved_from": "a test",
        "hyperparameters": {"lora_rank": 4},
    }
    assert list(list_profiles(settings)) == ["fast"]
    with pytest.raises(UserError, match=r"of this name already[\s\S]*--replace"):
        save("fast")
    save("fast", replace=True, hyperparameters={"lora_rank": 5})
    assert find_profile("fast", settings)[0].hyperparameters == {"lora_rank": 5}
    for name, told in (("fsat", "did you mean fast"), ("../fast", "not usable as the name")):
        with pytest.raises(UserError, match=told):
            find_profile(name, settings)
    with pytest.raises(UserError, match=r"train\.yaml:5: there is no such profile[\s\S]*did you mean fast"):
        resolve_train(written(tmp_path, MINE + "profile: fsat\n"))
    path.write_text("method: mine\nsaved_from: x\nvalues: {}\n")
    with pytest.raises(UserError, match=r"fast\.yaml:3: there is no such field"):
        list_profiles(settings)
    save("fast", replace=True)
    delete_profile("fast", settings)
    assert list_profiles(settings) == {}
