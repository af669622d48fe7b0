"""The commands of the README and of docs/, run in order as they stand there, or parsed where they cannot run here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
import yaml

from configs.resolve import resolve_train
from configs.settings import PROJECT_ROOT
from flows.cli import app
from tests.tiny_models import make_tiny_chat_model

TUNELINE = Path(sys.executable).with_name("tuneline")
READMES = ["README.md", "README.zh.md"]
PAGES = sorted(str(path.relative_to(PROJECT_ROOT)) for path in (PROJECT_ROOT / "docs").glob("*.md"))


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


@pytest.mark.lifecycle
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


@pytest.mark.operations
def test_the_commands_of_operations_run_where_the_tour_has_been(environment: dict[str, str]) -> None:
    # What the page takes up from the README: a line of models to retrain.
    before = "tuneline train configs/examples/demo.yaml --set epochs=1 --set max_samples=16 --through customized"
    script = "\n".join(["set -eux", before, *_blocks("docs/operations.md", "bash")])
    assert script.count("\ntuneline ") > 15
    try:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=PROJECT_ROOT,
            env={**environment, "PATH": f"{TUNELINE.parent}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run([str(TUNELINE), "down"], env=environment, capture_output=True, check=False)


def _commands(page: str) -> list[str]:
    """Every command of a page: in its blocks, and between backticks in its text."""
    text = (PROJECT_ROOT / page).read_text(encoding="utf-8")
    lines = [line for language in ("bash", "sh") for block in _blocks(page, language) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in [*lines, *re.findall(r"`([^`\n]+)`", prose)] if re.match(r"tuneline [a-z]", line)]


def _parse(words: list[str]) -> None:
    """What the command line makes of the words, without doing it. Raises click.UsageError."""
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group) and words:
        name, *words = words
        if name not in command.commands:
            raise click.UsageError(f"no command {name}")
        command = command.commands[name]
    if words:
        command.make_context(command.name or "tuneline", words)


@pytest.mark.parametrize("page", [*READMES, *PAGES])
def test_every_command_of_a_page_is_one(page: str) -> None:
    commands = _commands(page)
    assert commands
    for command in commands:
        try:
            _parse(shlex.split(command)[1:])
        except click.MissingParameter:  # named in a sentence, without what it is given
            assert command not in "\n".join([*_blocks(page, "bash"), *_blocks(page, "sh")])
        except click.UsageError as error:
            pytest.fail(f"{page}: {command}: {error.message}")


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".zh.md")])
def test_a_translated_page_has_the_commands_and_files_of_the_page(page: str) -> None:
    original = page.replace(".zh.md", ".md")
    for language in ("bash", "sh", "python"):
        assert _blocks(page, language) == _blocks(original, language)
    here, there = ([yaml.safe_load(block) for block in _blocks(each, "yaml")] for each in (page, original))
    assert here == there  # comments are translated


@pytest.mark.parametrize("page", [*READMES, *PAGES])
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    text = (PROJECT_ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, place = target.partition("#")
        path = (PROJECT_ROOT / page).parent / file if file else PROJECT_ROOT / page
        assert path.exists(), target
        if place:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert place in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_train_file_of_the_readme_resolves(readme: str, tmp_path: Path) -> None:
    (block,) = _blocks(readme, "yaml")
    file = tmp_path / "train.yaml"
    file.write_text(block, encoding="utf-8")

    config = resolve_train(file).config

    assert config.name == yaml.safe_load(block)["name"]
    assert config.prompt_column == "question"
    assert config.hyperparameters.lora_rank == 16
