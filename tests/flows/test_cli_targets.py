"""`tuneline targets`: what is ready on this host, and what is missing where it is not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from configs.endpoints import QUANTIZATIONS
from tests.flows.command_line import printed, read_json, tuneline
from tests.stand_ins import llama_cpp, vllm


class Host:
    """An installation on a host of which the test says what it has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.has = {"TUNELINE_LLAMA_CPP": str(folder / "llama.cpp"), "OLLAMA_HOST": "127.0.0.1:9"}

    def targets(self, *words: str) -> subprocess.CompletedProcess[str]:
        return tuneline("targets", *words, home=self.folder / "home", cwd=self.folder, extra=self.has)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_every_target_says_what_it_lacks(host: Host) -> None:
    listed = {each["target"]: each for each in read_json(host.targets("--json"))}
    assert {name: tuple(each["quantizations"]) for name, each in listed.items()} == QUANTIZATIONS
    assert listed["transformers"]["ready"]
    assert "tuneline targets install llama.cpp" in listed["llama.cpp"]["missing"]
    assert "TUNELINE_VLLM" in listed["vllm"]["missing"]
    assert not listed["ollama"]["ready"]


def test_what_is_there_is_ready(host: Host) -> None:
    llama_cpp(host.folder / "llama.cpp")
    vllm(host.folder / "vllm")
    host.has["TUNELINE_VLLM"] = str(host.folder / "vllm")
    listed = {each["target"]: each for each in read_json(host.targets("--json"))}
    assert listed["llama.cpp"]["ready"]
    assert listed["vllm"]["ready"]
    assert "OLLAMA_HOST" in listed["ollama"]["missing"]
    assert "q8_0, q4_K_M, q4_K_S" in printed(host.targets())
    assert "llama.cpp is ready" in printed(host.targets("install", "llama.cpp"))


def test_without_a_compiler_the_build_is_refused(host: Host) -> None:
    (host.folder / "empty").mkdir()
    host.has["PATH"] = str(host.folder / "empty")
    done = host.targets("install", "llama.cpp")
    assert done.returncode == 2
    assert "there is no C++ compiler" in done.stderr
    assert [path.name for path in (host.folder / "llama.cpp").iterdir()] == ["lock"]
