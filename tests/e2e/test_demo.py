"""The main job on the real model: what `make demo` promises. Minutes of CPU: run by `make test-demo`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.settings import PROJECT_ROOT

TUNELINE = str(Path(sys.executable).with_name("tuneline"))


def tuneline(environment: dict[str, str], *words: str) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(
        [TUNELINE, *words], cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_takes_the_model_from_at_most_5_to_at_least_80_percent(tmp_path: Path) -> None:
    environment = {**os.environ, "TUNELINE_HOME": str(tmp_path / "home")}
    try:
        told = tuneline(environment, "demo")
        (record,) = json.loads(tuneline(environment, "trains", "list", "--json"))
        (endpoint,) = json.loads(tuneline(environment, "deployments", "--json"))
    finally:
        subprocess.run([TUNELINE, "undeploy", "commands-demo"], env=environment, capture_output=True, check=False)

    assert record["status"] == "completed"
    assert record["evaluation"]["base"]["accuracy"] <= 5
    assert record["evaluation"]["tuned"]["accuracy"] >= 80
    assert record["resolved"]["dtype"]["origin"] == "hardware"
    assert "The demo takes about" in told
    assert endpoint["state"] == "up"
    assert '"device"' in told.split("model:")[-1]
    assert "tuneline up" in told
