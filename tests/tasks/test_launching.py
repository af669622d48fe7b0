"""The settings that a training in several processes is started with, and what is refused before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from pydantic import ValidationError

from configs.errors import UserError
from configs.resolve import resolve_train
from configs.train import TrainConfig
from deployments.forms import train_form
from methods.registry import find_method
from tasks.gpus import wanted_gpus
from tasks.launching import launcher, require_packages
from tests.own_methods import install_method

GIVEN = {"name": "t", "base_model": "b", "dataset": "d"}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(GIVEN | changes)


@pytest.mark.parametrize(("distribution", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP"), ("deepspeed", "DEEPSPEED")])
@pytest.mark.parametrize("on_gpus", [True, False])
def test_accelerate_reads_the_settings_as_they_are_meant(
    tmp_path: Path, distribution: str, kind: str, on_gpus: bool
) -> None:
    hyper = {"grad_accum_steps": 4, "max_grad_norm": 0.5}
    given = config(processes=3, distribution=distribution, hyperparameters=hyper)
    arguments = launcher(given, tmp_path, on_gpus=on_gpus)
    assert arguments == ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    read = load_config_from_file(arguments[-1])
    assert (read.distributed_type, read.num_processes, read.num_machines) == (kind, 3, 1)
    assert (read.use_cpu, read.mixed_precision, read.main_process_port) == (not on_gpus, "no", 0)
    written = yaml.safe_load((tmp_path / "accelerate.yaml").read_text())
    own = [name for name in ("fsdp_config", "deepspeed_config") if name in written]
    assert own == ([] if distribution == "ddp" else [f"{distribution}_config"])
    if distribution == "deepspeed":
        assert read.deepspeed_config["gradient_accumulation_steps"] == 4
        assert read.deepspeed_config["gradient_clipping"] == 0.5


def test_one_process_is_started_as_it_always_was(tmp_path: Path) -> None:
    assert launcher(config(), tmp_path, on_gpus=True) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"processes": 2}, "it is not said how the processes share the training"),
        ({"distribution": "ddp"}, "one process has nobody to share the training with"),
        ({"processes": 2, "distribution": "ddp", "gpus": 3}, "each process has one GPU"),
        ({"processes": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_stand_together_is_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        config(**changes)


def test_each_process_takes_a_gpu_where_there_are_any(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = config(processes=2, distribution="ddp")
    for gpus, wanted in (("0,1,2", 2), ("", 0)):
        monkeypatch.setenv("TUNELINE_GPUS", gpus)
        assert wanted_gpus(spread) == wanted
    monkeypatch.setenv("TUNELINE_GPUS", "0")
    with pytest.raises(UserError, match=r"more GPUs than this host has[\s\S]*processes = 2"):
        wanted_gpus(spread)


def test_only_a_method_that_can_be_spread_is_asked_how(home: Path, tmp_path: Path) -> None:
    install_method()
    file = tmp_path / "train.yaml"
    file.write_text("name: t\nbase_model: b\ndataset: d\nmethod: mine\nprocesses: 2\ndistribution: fsdp\n")
    with pytest.raises(UserError, match=r"train\.yaml:6: the training of the method mine cannot be spread so"):
        resolve_train(file)
    install_method(hardware={"distributions": ["fsdp"]})
    assert resolve_train(file).config.processes == 2
    fields = train_form(find_method("mine"), "customized", [])["properties"]["train"]["properties"]
    assert fields["distribution"]["enum"] == ["none", "fsdp"]
    assert fields["processes"]["maximum"] == 64
    install_method()
    fields = train_form(find_method("mine"), "customized", [])["properties"]["train"]["properties"]
    assert not {"processes", "distribution"} & set(fields)


def test_a_package_that_the_environment_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.launching.packages_of", lambda python: {"accelerate": "1.15"})
    require_packages(config(processes=2, distribution="fsdp"), Path(sys.executable))
    with pytest.raises(UserError, match="has no deepspeed, which deepspeed takes"):
        require_packages(config(processes=2, distribution="deepspeed"), Path(sys.executable))
