"""The hardware as a stage's interpreter sees it, asked by tasks that load no torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from tasks.hardware import ask_hardware, dtype_warning

OURS = Path(sys.executable)


def test_the_interpreter_is_asked_and_the_override_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_NATIVE_BFLOAT16", "no")
    found = ask_hardware(OURS, speed=True)
    assert found is not None
    assert found.auto == "float32"
    assert list(found.warnings) == ["bfloat16"]
    assert found.gflops is not None
    assert found.gflops > 0
    assert found.cpu_share is not None
    assert 0 < found.cpu_share <= 1


def test_a_number_type_that_is_emulated_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_NATIVE_BFLOAT16", "no")
    warning = dtype_warning("bfloat16", OURS)
    assert warning is not None
    assert "set dtype to auto or float32" in warning


def test_a_number_type_that_nothing_emulates_is_not_asked_about() -> None:
    nowhere = Path("/no/such/python")
    assert [dtype_warning(name, nowhere) for name in ("auto", "float32", "float16")] == [None] * 3


def test_an_interpreter_without_torch_gives_no_answer(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    bare.chmod(0o755)
    assert ask_hardware(bare) is None
    assert dtype_warning("bfloat16", bare) is None


def test_another_word_in_the_variable_is_an_error_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_NATIVE_BFLOAT16", "maybe")
    with pytest.raises(UserError, match="expected yes or no"):
        ask_hardware(OURS)
