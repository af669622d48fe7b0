"""The commands of the README's tour, run in order as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.resolve import resolve_train
from configs.settings import PROJECT_ROOT
from tests.tiny_models import make_tiny_chat_model

TUNELINE = Path(sys.executable).with_name("tuneline")


def _blocks(readme: str, language: str) -> list[str]:
    text = (PROJECT_ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _tour() -> list[str]:
    lines = [line for block in _blocks("README.md", "bash") for line in block.splitlines()]
    return [line for line in lines if line.strip()]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home in which the tour's base model is already there: random weights, in place of the download."""
    from deployments.ports import port_is_taken

    home = tmp_path_factory.mktemp("tour")
    make_tiny_chat_model(home / "base_models" / "smollm2-135m-instruct", seed=1)
    free = [port for port in range(42000, 42100) if not port_is_taken("127.0.0.1", port)]
    ports = {"TUNELINE_PREFECT_PORT": str(free[0]), "TUNELINE_MLFLOW_PORT": str(free[1])}
    return {**os.environ, "TUNELINE_HOME": str(home), **ports}


def test_the_tour_runs_from_its_first_command_to_its_last(environment: dict[str, str]) -> None:
    commands = _tour()
    assert len(commands) > 15
    try:
        for command in commands:
            words = shlex.split(command)
            assert words[0] == "tuneline"
            done = subprocess.run(
                [str(TUNELINE), *words[1:]],
                cwd=PROJECT_ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            assert "Traceback" not in done.stderr
    finally:
        for last in (["undeploy", "commands"], ["down"]):
            subprocess.run([str(TUNELINE), *last], env=environment, capture_output=True, check=False)


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_train_file_of_the_readme_resolves(readme: str, tmp_path: Path) -> None:
    (block,) = _blocks(readme, "yaml")
    file = tmp_path / "train.yaml"
    file.write_text(block, encoding="utf-8")

    config = resolve_train(file).config

    assert config.name == yaml.safe_load(block)["name"]
    assert config.prompt_column == "question"
    assert config.hyperparameters.lora_rank == 16


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_every_command_named_in_the_readme_exists(readme: str) -> None:
    text = (PROJECT_ROOT / readme).read_text(encoding="utf-8")
    named = {word for line in re.findall(r"tuneline ([a-z| -]+)", text) for word in line.split(" | ")[:1]}
    first_words = sorted({words.split()[0] for words in named if words.split()})
    assert first_words
    for word in first_words:
        done = subprocess.run([str(TUNELINE), word, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"tuneline {word}: {done.stderr}"
