"""What `dtype: auto` becomes on which hardware, and what is warned of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from methods import contract
from methods.toolkit import hardware, memory, models, training
from tasks.stages import EventTail, StageJob, stage_environment
from tests.methods.stage_jobs import open_job


@pytest.fixture(autouse=True)
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hardware.NATIVE_VARIABLE, raising=False)


def on_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")


def on_processor(monkeypatch: pytest.MonkeyPatch, *features: str, architecture: str = "x86_64") -> None:
    found = {"architecture": architecture, "cpu_name": "some CPU", **dict.fromkeys(features, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


def on_mac(monkeypatch: pytest.MonkeyPatch, chip: str, version: int) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: chip)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: version >= major)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([(7, 5)], "float32"),  # T4
        ([(7, 0)], "float32"),  # V100
        ([(8, 0)], "bfloat16"),  # A100
        ([(9, 0)], "bfloat16"),
        ([(8, 6), (7, 5)], "float32"),
    ],
)
def test_auto_is_bfloat16_on_gpus_from_compute_capability_8(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], expected: str
) -> None:
    on_gpus(monkeypatch, *capabilities)
    assert hardware.training_device() == hardware.inference_device() == "cuda"
    assert hardware.resolve_dtype("auto") == expected
    assert models.choose_dtype("auto") == getattr(torch, expected)


@pytest.mark.parametrize(
    ("architecture", "features", "expected"),
    [
        ("x86_64", ["avx2"], "float32"),
        ("x86_64", ["avx2", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"], "float32"),
        ("x86_64", ["avx2", "avx512_f", "avx512_bf16"], "bfloat16"),
        ("x86_64", ["amx_tile", "amx_bf16"], "bfloat16"),
        ("arm64", ["neon"], "float32"),
        ("arm64", ["neon", "bf16"], "bfloat16"),
    ],
)
def test_auto_is_bfloat16_on_processors_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, architecture: str, features: list[str], expected: str
) -> None:
    on_processor(monkeypatch, *features, architecture=architecture)
    assert hardware.resolve_dtype("auto", "cpu") == expected


@pytest.mark.parametrize(
    ("chip", "version", "expected"),
    [("Apple M1 Pro", 15, "float32"), ("Apple M3", 13, "float32"), ("Apple M3", 14, "bfloat16")],
)
def test_auto_on_a_mac_goes_by_the_device_that_computes(
    monkeypatch: pytest.MonkeyPatch, chip: str, version: int, expected: str
) -> None:
    on_mac(monkeypatch, chip, version)
    on_processor(monkeypatch, "neon", architecture="arm64")
    assert training.weights_dtype("auto", full=False) == expected
    assert hardware.resolve_dtype("auto") == "float32"  # models are loaded to the processor for inference


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_chosen_number_type_stays(name: str) -> None:
    assert hardware.resolve_dtype(name) == name


@pytest.mark.parametrize(("said", "expected"), [("yes", "bfloat16"), ("no", "float32"), (" No ", "float32")])
def test_the_variable_overrides_the_probe(monkeypatch: pytest.MonkeyPatch, said: str, expected: str) -> None:
    monkeypatch.setenv(hardware.NATIVE_VARIABLE, said)
    on_gpus(monkeypatch, (7, 5) if said == "yes" else (9, 0))
    assert hardware.resolve_dtype("auto", "cuda") == expected


def test_another_word_in_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hardware.NATIVE_VARIABLE, "maybe")
    with pytest.raises(contract.Refused, match="TUNELINE_NATIVE_BFLOAT16='maybe': expected yes or no"):
        hardware.resolve_dtype("auto", "cpu")


def test_the_variable_reaches_the_stages_and_others_of_ours_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hardware.NATIVE_VARIABLE, "no")
    monkeypatch.setenv("TUNELINE_HOME", "/somewhere")
    passed = {name: value for name, value in stage_environment().items() if name.startswith("TUNELINE_")}
    assert passed == {hardware.NATIVE_VARIABLE: "no"}


def test_emulated_bfloat16_is_warned_of_by_the_name_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, (7, 5))
    warning = hardware.emulation_warning("bfloat16", "cuda")
    assert warning is not None
    assert "emulated on some GPU (CUDA compute capability 7.5)" in warning
    assert [hardware.emulation_warning(name, "cuda") for name in ("auto", "float32", "float16")] == [None] * 3
    on_gpus(monkeypatch, (8, 0))
    assert hardware.emulation_warning("bfloat16", "cuda") is None


def job_with(folder: Path, dtype: str) -> contract.Job:
    return open_job(
        folder, StageJob(stage="training", parameters={"dtype": dtype}, inputs={}, output=folder / "output", seed=1)
    )


def test_a_training_job_settles_its_number_type_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_processor(monkeypatch, "avx2")
    job = job_with(tmp_path, "auto")
    hardware.settle_dtype(job, "cpu")
    assert job.parameters["dtype"] == "float32"
    (event,) = EventTail(tmp_path / contract.EVENTS_FILE).read()
    assert (event["type"], event["name"], event["value"], event["origin"]) == (
        "resolved",
        "dtype",
        "float32",
        "hardware",
    )
    assert "some CPU" in event["reason"]
    assert "dtype auto is float32 on some CPU" in capsys.readouterr().out


def test_a_training_job_that_chose_an_emulated_number_type_is_warned_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_processor(monkeypatch, "avx2")
    job = job_with(tmp_path, "bfloat16")
    hardware.settle_dtype(job, "cpu")
    assert job.parameters["dtype"] == "bfloat16"
    (event,) = EventTail(tmp_path / contract.EVENTS_FILE).read()
    assert (event["type"], "emulated" in event["text"]) == ("warning", True)


def test_the_estimate_of_memory_goes_by_what_auto_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SimpleNamespace(
        hidden_size=512, num_attention_heads=8, num_hidden_layers=4, vocab_size=1000, intermediate_size=2048
    )
    config = SimpleNamespace(get_text_config=lambda: text)
    parameters = {
        "dtype": "auto",
        "load_in_4bit": False,
        "optimizer": "adamw",
        "batch_size": 8,
        "tuning": "full",
        "gradient_checkpointing": False,
    }

    def estimate(dtype: str) -> float:
        return memory.estimate_gib(config, 10**9, 10**6, 512, {**parameters, "dtype": dtype})

    monkeypatch.setenv(hardware.NATIVE_VARIABLE, "yes")
    assert estimate("auto") == estimate("bfloat16") < estimate("float32")
    monkeypatch.setenv(hardware.NATIVE_VARIABLE, "no")
    assert estimate("auto") == estimate("float32")
