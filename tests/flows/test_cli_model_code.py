"""`tuneline models code`, `allow-code`, `revoke-code`, `allowed-code`: consent as a user gives it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli import main
from tests.flows.command_line import files_below, tuneline
from tests.own_code_models import FILES, write_code

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def work(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the model `packed`, as the current one."""
    write_code(tmp_path / "packed")
    (tmp_path / "packed" / "model.safetensors").touch()
    (tmp_path / "packed" / "extra.py").write_text("import os  # \x1b[2J\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `tuneline models ...` in this process: exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tuneline", "models", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return int(code or 0), *capsys.readouterr()

    return run


class Terminal(io.StringIO):
    """Standard input that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def digest_of(run: Run) -> str:
    return str(json.loads(run("code", "packed", "--json")[1])["digest"])


def listed(run: Run) -> list[str]:
    found: list[str] = json.loads(run("allowed-code", "--json")[1])["allow_remote_code"]
    return found


def test_code_is_shown_allowed_by_its_digest_listed_and_revoked(run: Run, home: Path) -> None:
    shown = json.loads(run("code", "packed", "--json")[1])
    digest = shown["digest"]
    assert [file["name"] for file in shown["files"]] == sorted([*FILES, "extra.py"])
    assert shown["files"][1]["warnings"] == ["line 1: imports os"]
    code, source, _ = run("code", "packed", "--source")
    assert code == 0
    assert "class PackedAttention(LlamaAttention)" in source
    assert "\x1b" not in source
    assert files_below(home) == set()

    for given in ([], ["--yes", f"sha256:{'0' * 64}"], ["--yes", "yes"]):
        code, _, errors = run("allow-code", "packed", *given)
        assert code == 2
        assert "consent names its digest" in errors
        assert digest in errors
    assert "is allowed" in run("allow-code", "packed", "--yes", digest)[1]
    assert listed(run) == [digest]
    assert "no longer allowed" in run("revoke-code", digest)[1]
    assert listed(run) == []
    assert run("revoke-code", digest)[0] == 2


def test_in_a_terminal_consent_is_typed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = digest_of(run)
    for typed, allowed in (("y", []), (digest.removeprefix("sha256:")[:8], [digest])):
        monkeypatch.setattr("sys.stdin", Terminal(f"{typed}\n"))
        code, said, _ = run("allow-code", "packed")
        assert "tuneline models code packed --source" in said
        assert code == (0 if allowed else 2)
        assert listed(run) == allowed


def test_a_train_on_code_that_is_not_allowed_begins_nothing(work: Path, home: Path) -> None:
    (work / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    (work / "train.yaml").write_text("name: mine\nbase_model: packed\ndataset: rows.jsonl\n")
    done = tuneline("train", "train.yaml", home=home, cwd=work, seconds=300)
    assert done.returncode == 2
    assert "brings its own Python code, which is not allowed to run" in done.stderr
    assert files_below(home) == set()


def test_a_model_without_code_has_nothing_to_allow(run: Run, work: Path) -> None:
    (work / "plain").mkdir()
    (work / "plain" / "config.json").write_text("{}")
    code, _, errors = run("allow-code", "plain", "--yes", f"sha256:{'0' * 64}")
    assert code == 2
    assert "there is nothing to allow" in errors
