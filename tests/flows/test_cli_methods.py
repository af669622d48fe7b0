"""`tuneline methods` and `tuneline profiles` through the real program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.settings import PROJECT_ROOT
from methods.registry import find_method
from tests.tasks.test_method_checks import write_method


def tuneline(*arguments: str | Path, code: int = 0) -> str:
    """What the program prints (errors too), which is to end with `code`."""
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_method_is_begun_added_shown_and_deleted(home: Path, tmp_path: Path) -> None:
    assert "tuneline methods add" in tuneline("methods", "new", "mine", "--from", "sft", "--folder", tmp_path / "mine")
    manifest = tmp_path / "mine" / "method.yaml"
    own = "parameters:\n  beta: {type: number, minimum: 0, default: 0.1, description: Strength of it.}\n"
    common = "hyperparameters: {unused: [num_generations], defaults: {learning_rate: 1.0e-6}}\n"
    manifest.write_text(manifest.read_text().replace("parameters: {}\n", own + common))
    assert "mine is added" in tuneline("methods", "add", tmp_path / "mine")
    listed = json.loads(tuneline("methods", "list", "--json"))
    assert "mine" in {method["name"] for method in listed}
    shown = tuneline("methods", "show", "mine")
    assert "trains on    conversations (chat)" in shown
    assert "| `beta` | – | `0.1` | a number ≥ 0 | – | Strength of it. |" in shown
    assert "| `learning_rate` | `LEARNING_RATE`, `LR`, `学习率` | `1e-06` |" in shown
    assert "num_generations" not in shown
    manifest.write_text(manifest.read_text().replace("minimum: 0", "minimum: x"))
    line = manifest.read_text().partition("  beta:")[0].count("\n") + 1
    assert f"method.yaml:{line}: this is no JSON schema" in tuneline("methods", "add", tmp_path / "mine", code=2)
    assert "its past trains stay" in tuneline("methods", "delete", "mine")
    assert "no such training method" in tuneline("methods", "show", "mine", code=2)


def test_check_prints_a_table_and_fails_if_anything_is_wrong(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_GRACE_SECONDS", "2")
    write_method()
    told = tuneline("methods", "check", "mine")
    assert "✓ mine: resuming" in told
    assert "✗" not in told
    write_method("training", ', "adapter": True', "")
    told = tuneline("methods", "check", "mine", code=1)
    assert "✗ mine: training" in told
    assert "does not say whether it has left an adapter" in " ".join(told.split())
    results = json.loads(tuneline("methods", "check", "mine", "--json", code=1))
    assert [result["check"] for result in results if result["ok"] is False] == ["training"]
    assert "name one method, or --all" in tuneline("methods", "check", code=2)
    assert find_method("mine").folder.is_dir()
