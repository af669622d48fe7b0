"""What a training reports between two steps, and what it computes with."""

from __future__ import annotations

from pathlib import Path

import pytest

from methods import contract
from methods.toolkit import hardware
from tasks.stages import EventTail
from tests.methods.training_bench import Bench


@pytest.fixture
def bench(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Bench:
    return Bench("sft", tiny_model, tiny_rows, tmp_path)


def test_batches_of_an_accumulated_step_and_of_the_validation_are_reported(bench: Bench) -> None:
    folder = bench.train(validation=True, max_steps=2, batch_size=2, grad_accum_steps=4)
    events = [event for event in EventTail(folder / contract.EVENTS_FILE).read() if event["type"] == "progress"]
    first = [(event["part"], event["note"]) for event in events if event["step"] == 0]
    assert first == [(0.0, ""), (0.25, "batch 1 of 4"), (0.5, "batch 2 of 4"), (0.75, "batch 3 of 4")]
    assert [event["note"] for event in events][-1].startswith("validation batch ")


@pytest.mark.parametrize(("native", "expected"), [("yes", "torch.bfloat16"), ("no", "torch.float32")])
def test_a_train_with_dtype_auto_computes_in_what_the_hardware_has(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, native: str, expected: str
) -> None:
    monkeypatch.setenv(hardware.NATIVE_VARIABLE, native)
    trainer = bench.build(dtype="auto", tuning="lora")
    frozen = {str(p.dtype) for p in trainer.model.parameters() if not p.requires_grad}
    assert frozen == {expected}
    events = EventTail(trainer.job.folder / contract.EVENTS_FILE).read()
    assert events[0]["type"] == "resolved"  # before anything is read or loaded
    assert f"torch.{events[0]['value']}" == expected


def test_a_chosen_dtype_that_is_emulated_is_a_warning_before_anything_is_loaded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(hardware.NATIVE_VARIABLE, "no")
    trainer = bench.build(dtype="bfloat16")
    events = EventTail(trainer.job.folder / contract.EVENTS_FILE).read()
    assert [event["type"] for event in events[:2]] == ["warning", "phase"]
    assert "emulated" in events[0]["text"]
