"""`tuneline models code`, `allow-code`, `revoke-code`, `allowed-code`: consent as a user gives it."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.flows.command_line import PROGRAM, files_below, printed, program_environment, read_json, tuneline
from tests.own_code_models import FILES, write_code


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_code(tmp_path / "packed")
    (tmp_path / "packed" / "model.safetensors").touch()
    (tmp_path / "packed" / "extra.py").write_text("import os  # \x1b[2J\n")
    return tmp_path


def run(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return tuneline("models", *arguments, home=work / "home", cwd=work, seconds=300)


def test_code_is_shown_allowed_by_its_digest_listed_and_revoked(work: Path) -> None:
    shown = read_json(run(work, "code", "packed", "--json"))
    digest = shown["digest"]
    assert [file["name"] for file in shown["files"]] == sorted([*FILES, "extra.py"])
    assert shown["files"][1]["warnings"] == ["line 1: imports os"]
    source = printed(run(work, "code", "packed", "--source"))
    assert "class PackedAttention(LlamaAttention)" in source
    assert "\x1b" not in source
    assert files_below(work / "home") == set()

    for given in ([], ["--yes", f"sha256:{'0' * 64}"], ["--yes", "yes"]):
        refused = run(work, "allow-code", "packed", *given)
        assert refused.returncode == 2
        assert "consent names its digest" in refused.stderr
        assert digest in refused.stderr
    assert "is allowed" in printed(run(work, "allow-code", "packed", "--yes", digest))
    assert read_json(run(work, "allowed-code", "--json")) == {"allow_remote_code": [digest], "pinned": {}}
    assert "no longer allowed" in printed(run(work, "revoke-code", digest))
    assert read_json(run(work, "allowed-code", "--json"))["allow_remote_code"] == []
    assert run(work, "revoke-code", digest).returncode == 2


def test_in_a_terminal_consent_is_typed(work: Path) -> None:
    digest = read_json(run(work, "code", "packed", "--json"))["digest"]
    for typed, allowed in (("y", []), (digest.removeprefix("sha256:")[:8], [digest])):
        terminal, other = pty.openpty()
        command = [str(PROGRAM), "models", "allow-code", "packed"]
        with subprocess.Popen(
            command,
            cwd=work,
            env=program_environment(work / "home"),
            stdin=other,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            os.write(terminal, f"{typed}\n".encode())
            said = process.communicate(timeout=300)[0].decode()
        os.close(terminal)
        os.close(other)
        assert "tuneline models code packed --source" in said
        assert process.returncode == (0 if allowed else 2)
        assert read_json(run(work, "allowed-code", "--json"))["allow_remote_code"] == allowed


def test_a_train_on_code_that_is_not_allowed_begins_nothing(work: Path) -> None:
    (work / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    (work / "train.yaml").write_text("name: mine\nbase_model: packed\ndataset: rows.jsonl\n")
    done = tuneline("train", "train.yaml", home=work / "home", cwd=work, seconds=300)
    assert done.returncode == 2
    assert "brings its own Python code, which is not allowed to run" in done.stderr
    assert files_below(work / "home") == set()


def test_a_model_without_code_has_nothing_to_allow(work: Path) -> None:
    (work / "plain").mkdir()
    (work / "plain" / "config.json").write_text("{}")
    done = run(work, "allow-code", "plain", "--yes", f"sha256:{'0' * 64}")
    assert done.returncode == 2
    assert "there is nothing to allow" in done.stderr
