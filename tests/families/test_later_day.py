"""A model whose chat template prints today's date is trained on one day and deployed on a later one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.families.family_models import BY_NAME, make_model
from tests.families.family_rows import one_turn, write_rows
from tests.flows.command_line import printed, read_json, tuneline

pytestmark = pytest.mark.families

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += 24 * 3600;
    return failed;
}
"""
"""The time of day, a day later, for every process that is started with this library before the others."""


@pytest.fixture
def a_day_later(tmp_path: Path) -> dict[str, str]:
    """The environment of processes whose clock is a day ahead."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to shift the clock with")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    shifted = {"LD_PRELOAD": str(library)}
    told = subprocess.run(
        [sys.executable, "-c", "import datetime; print(datetime.date.today())"],
        env=shifted,
        capture_output=True,
        text=True,
        check=True,
    )
    assert date.fromisoformat(told.stdout.strip()) - date.today() == timedelta(days=1)
    return shifted


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    """Runs commands of an installation of its own, and ends its endpoints."""

    def command(*arguments: str, **options: Any) -> Any:
        return tuneline(*arguments, home=tmp_path / "home", cwd=tmp_path, seconds=900, **options)

    yield command
    command("undeploy", "dated")


def test_it_is_deployed_a_day_later(tmp_path: Path, run: Any, a_day_later: dict[str, str]) -> None:
    make_model(BY_NAME["Llama-3.2"], tmp_path / "llama")
    rows = [{"messages": row["messages"]} for row in one_turn(BY_NAME["Llama-3.2"])]
    write_rows(tmp_path / "rows.jsonl", rows)
    content = {
        "name": "dated",
        "base_model": "llama",
        "dataset": "rows.jsonl",
        "hyperparameters": {"max_steps": 2, "batch_size": 2, "learning_rate": 0.01, "dtype": "float32"},
    }
    (tmp_path / "dated.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    printed(run("train", "dated.yaml"))
    (train,) = read_json(run("trains", "list", "--json"))
    (probes,) = (tmp_path / "home").rglob("probes.json")
    assert json.loads(probes.read_text(encoding="utf-8"))["date"] == str(date.today())

    printed(run("deploy", train["model"], "--endpoint", "dated", extra=a_day_later))
    record = tmp_path / "home" / "endpoints" / "dated" / "endpoint.json"
    proof = json.loads(record.read_text(encoding="utf-8"))["deployments"][-1]["verification"]
    assert proof["prompts_checked"] == proof["answers_checked"] == 4
    assert proof["prompts_compared"] == "tokens"
