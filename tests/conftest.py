"""What tests of several folders share: an installation of their own, a tiny model, a few stored rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.postgres import own_databases
from tests.tiny_models import make_tiny_chat_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of an installation that nothing else uses."""
    folder = tmp_path / "home"
    monkeypatch.setenv("TUNELINE_HOME", str(folder))
    for name, value in own_databases().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TUNELINE_GPU_LOCKS", str(tmp_path / "gpu-locks"))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of a few thousand parameters; read only."""
    return make_tiny_chat_model(tmp_path_factory.mktemp("models") / "tiny", seed=7)


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 stored rows of different lengths, one of two turns, one with a system message; read only."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rooms = ["kitchen", "hall", "attic"]
    rows = []
    for index in range(21):
        question = f"switch the light in the {rooms[index % 3]} {'on' if index % 2 else 'off'}" + " please" * (
            index % 5
        )
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{rooms[index % 3]} " + "on " * (1 + index % 4)},
        ]
        if index == 5:
            messages += [{"role": "user", "content": "and off"}, {"role": "assistant", "content": "it is off"}]
        if index == 6:
            messages.insert(0, {"role": "system", "content": "be short"})
        rows.append({"line": index + 1, "messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
