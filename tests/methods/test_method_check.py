"""`tuneline methods check --all`: every built-in method through every stage it declares, in its environments."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from configs.settings import PROJECT_ROOT
from methods.registry import METHODS_FOLDER, find_method, read_manifest
from tasks.method_checks import CheckResult, check_method
from tests.method_environments import HOME, create_environments

BUILT_IN = [read_manifest(path).name for path in sorted(METHODS_FOLDER.glob("*/method.yaml"))]


@pytest.mark.methods
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_method_passes_its_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_HOME", str(HOME))
    method = find_method(name)
    create_environments(method.folder)

    def tell(result: CheckResult) -> None:
        print(f"{result.method}  {result.check}  {result.ok}  {result.seconds} s  {result.detail}", flush=True)

    results = check_method(method, tell)
    assert [result.check for result in results if result.ok is False] == []
    assert {"training", "cancelling", "resuming", "a failing job"} <= {result.check for result in results} or [
        result.check for result in results
    ] == ["platform"]


def test_every_file_of_a_method_is_in_the_package() -> None:
    with (PROJECT_ROOT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["methods"]
    packed = {path for pattern in patterns for path in METHODS_FOLDER.glob(pattern)}
    for folder in {path.parent for path in METHODS_FOLDER.glob("*/method.yaml")}:
        files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        left_out = {path for path in files if path.suffix != ".py"} - packed
        assert left_out == set(), "see package-data in pyproject.toml"
        assert (folder / "__init__.py").is_file() or not any(path.suffix == ".py" for path in files)


def test_what_mlx_demo_takes_of_the_toolkit_needs_no_torch() -> None:
    lock = (METHODS_FOLDER / "mlx_demo" / "environment.lock.txt").read_text(encoding="utf-8")
    assert "torch==" not in lock
    program = (METHODS_FOLDER / "mlx_demo" / "training.py").read_text(encoding="utf-8")
    (names,) = re.findall(r"^from methods\.toolkit import (.+)$", program, flags=re.MULTILINE)
    without = f"import sys; sys.modules['torch'] = None; from methods.toolkit import {names}"
    command = [sys.executable, "-c", without]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
