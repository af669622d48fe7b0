"""The template of the work pools on a real server, and the launcher on real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, cast

import jsonschema  # type: ignore[import-untyped]
import psutil
import pytest

from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings
from deployments import launcher
from deployments.flow_deployments import describe_deployments
from deployments.work_pools import WORK_POOL, base_job_template, ensure_pool
from tasks.processes import OUTLIVES_VARIABLE, STAGE_FOLDER_VARIABLE
from tests.flows.tiny_trains import wait_for

COUNTED = "COUNTED_BY_TEST"


class Prefect:
    """What the launcher asks of a Prefect server: one flow run, in the state a test wants."""

    def __init__(self) -> None:
        self.run, self.state, self.attempts = str(uuid.uuid4()), "RUNNING", 1
        self.reports: list[tuple[str, str, str | None]] = []
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({"state_type": ours.state, "run_count": ours.attempts})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["state"]["message"] if "state" in body else body[0]["message"]
                ours.reports.append((self.path, text, self.headers.get("Authorization")))
                self._answer({})

            def _answer(self, content: dict[str, Any]) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def variables(self) -> dict[str, str]:
        api = f"http://127.0.0.1:{self.server.server_port}/api"
        return {"PREFECT_API_URL": api, "PREFECT__FLOW_RUN_ID": self.run, "PREFECT_API_AUTH_STRING": "admin:word"}


@pytest.fixture
def prefect(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefect]:
    prefect = Prefect()
    for name, value in {**prefect.variables, COUNTED: prefect.run}.items():
        monkeypatch.setenv(name, value)
    yield prefect
    for process in counted(prefect):
        process.kill()
    prefect.server.shutdown()
    prefect.server.server_close()


def counted(prefect: Prefect) -> list[psutil.Process]:
    """Every process that descends from the test's launcher, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get(COUNTED) == prefect.run
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def launch(script: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "deployments.launcher", *options, "--", "python", "-c"]
    return subprocess.Popen([*command, textwrap.dedent(script)], stderr=subprocess.PIPE, text=True)


# A flow as Prefect starts it: below a shell, in a session of its own, with a stage that saves for a while, whose data
# loader must not be signalled, and a server that is to outlive them all.
FLOW = """
    import os, pathlib, subprocess, sys
    here = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(os.environ["HERE"])
    STAGE = '''
    import os, pathlib, signal, subprocess, sys, time
    here = pathlib.Path(os.environ["HERE"])
    loader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    (here / "ready").touch()
    while not asked: time.sleep(0.05)
    time.sleep(1)
    if loader.poll() is None: (here / "saved").touch()
    loader.kill()
    '''
    FLOW = '''
    import os, pathlib, signal, subprocess, sys
    here = pathlib.Path(os.environ["HERE"])
    def server():
        return subprocess.Popen(["sleep", "600"], env={**os.environ, OUTLIVES: "1"}, start_new_session=True)
    server()
    from methods import supervisor
    command = [sys.executable, "-S", supervisor.__file__, str(here), "20", sys.executable, "-c", STAGE]
    stage = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, FOLDER: str(here)},
                             start_new_session=True)
    class Asked(Exception): pass
    def ask(*_): raise Asked
    signal.signal(signal.SIGTERM, ask)
    try:
        stage.wait()
    except Asked:
        stage.terminate()
        stage.wait()
        (here / "closed").touch()
        sys.exit(3)
    '''
    FLOW = f"STAGE = {STAGE!r}; FOLDER, OUTLIVES = {FOLDER!r}, {OUTLIVES!r}" + FLOW
    engine = subprocess.Popen([sys.executable, "-c", FLOW], start_new_session=True)
    (here / "engine").write_text(str(engine.pid))
    sys.exit(engine.wait())
"""


def flow_script() -> str:
    names = f"FOLDER, OUTLIVES = {STAGE_FOLDER_VARIABLE!r}, {OUTLIVES_VARIABLE!r}\n"
    # The scripts inside it begin at the margin, as it does itself.
    return names + textwrap.dedent(FLOW)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    return tmp_path


def only_the_server_is_left(prefect: Prefect) -> bool:
    return [process.name() for process in counted(prefect)] == ["sleep"]


def test_sigterm_lets_the_stage_save_and_ends_the_rest_but_not_what_outlives(prefect: Prefect, here: Path) -> None:
    run = launch(flow_script(), "--grace", "20")
    wait_for((here / "ready").exists)
    run.terminate()
    assert run.wait(30) == 3  # the command's own exit code
    assert (here / "saved").exists()
    assert (here / "closed").exists()
    assert only_the_server_is_left(prefect)


def test_what_prefect_cancels_itself_is_not_told_twice(prefect: Prefect, here: Path) -> None:
    prefect.state = "CANCELLING"
    run = launch(flow_script(), "--grace", "20", "--settle", "15")
    wait_for((here / "ready").exists)
    run.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(2)
    assert not (here / "closed").exists()
    os.kill(int((here / "engine").read_text()), signal.SIGTERM)  # as Prefect does it
    assert run.wait(30) == 3
    assert only_the_server_is_left(prefect)


def test_a_killed_flow_leaves_nothing_and_its_stage_has_saved(prefect: Prefect, here: Path) -> None:
    run = launch(flow_script(), "--grace", "20")
    wait_for((here / "ready").exists)
    os.kill(int((here / "engine").read_text()), signal.SIGKILL)
    assert run.wait(30) != 0
    assert (here / "saved").exists()
    assert not (here / "closed").exists()
    assert only_the_server_is_left(prefect)


def test_what_does_not_listen_is_killed_when_the_grace_is_over(prefect: Prefect, here: Path) -> None:
    script = """
        import os, pathlib, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        (pathlib.Path(os.environ["HERE"]) / "ready").touch()
        time.sleep(600)
    """
    run = launch(script, "--grace", "1")
    wait_for((here / "ready").exists)
    run.terminate()
    assert run.wait(30) == 128 + signal.SIGKILL
    assert counted(prefect) == []


def test_orphans_of_a_command_that_has_ended_are_ended(prefect: Prefect, home: Path) -> None:
    script = 'import subprocess; subprocess.Popen(["sleep", "600"], start_new_session=True); print("said")'
    assert launch(script).wait(30) == 0
    assert counted(prefect) == []
    assert (home / "services" / "flow_runs" / f"{prefect.run}.log").read_text() == "said\n"


@pytest.mark.parametrize("state", ["PENDING", "CRASHED"])
def test_a_flow_that_never_began_is_reported_with_what_it_said(prefect: Prefect, state: str) -> None:
    prefect.state, prefect.attempts = state, 0
    assert launch("import sys; sys.exit('No module named prefect')").wait(30) == 1
    (log, text, login), (state, reason, _) = prefect.reports
    assert (log, state) == ("/api/logs/", f"/api/flow_runs/{prefect.run}/set_state")
    assert text == reason
    assert "No module named prefect" in reason
    assert login == "Basic YWRtaW46d29yZA=="


@pytest.mark.parametrize("state", ["FAILED", "CRASHED"])
def test_a_flow_that_failed_by_itself_is_not_reported_again(prefect: Prefect, state: str) -> None:
    prefect.state = state
    assert launch("import sys; sys.exit(1)").wait(30) == 1
    assert prefect.reports == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--environment", "/no/such/prefix"], ["environment = '/no/such/prefix'", "bin/python", "work pool"]),
        (["--environment", "name"], ["environment = 'name'", "needs a conda executable"]),
        (["--environment", "name", "--conda", "no-conda"], ["conda = 'no-conda'", "micromamba", "work pool"]),
    ],
)
def test_an_environment_that_is_not_there_is_named_before_anything_starts(
    prefect: Prefect, options: list[str], words: list[str]
) -> None:
    run = launch("print()", *options)
    _, said = run.communicate(timeout=30)
    assert run.returncode == 1
    assert len(prefect.reports) == 2
    for word in words:
        assert word in said
        assert word in prefect.reports[1][1]


def test_a_virtual_environment_is_used_without_conda(prefect: Prefect, tmp_path: Path, home: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "own")], check=True)
    script = "import os, sys; print(sys.prefix, os.environ['VIRTUAL_ENV'], os.environ['TUNELINE_GPUS'])"
    assert launch(script, "--environment", str(tmp_path / "own"), "--gpus", "0,2").wait(30) == 0
    said = (home / "services" / "flow_runs" / f"{prefect.run}.log").read_text().split()
    assert said == [str(tmp_path / "own"), str(tmp_path / "own"), "0,2"]


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("conda", "conda 26.7.0", ["run", "--no-capture-output", "-n", "ft"]),
        ("mamba", "mamba 1.5.8\nconda 24.1.0", ["run", "--no-capture-output", "-n", "ft"]),
        ("mamba", "2.3.0", ["run", "-n", "ft"]),
        ("micromamba", "2.3.0", ["run", "-n", "ft"]),
    ],
)
def test_each_conda_gets_the_options_it_knows(tmp_path: Path, name: str, version: str, expected: list[str]) -> None:
    executable = tmp_path / name
    executable.write_text(f"#!/bin/sh\ncat <<'E'\n{version}\nE\n")
    executable.chmod(0o755)
    command, _ = launcher.in_environment(["python"], str(executable), "ft")
    assert command == [str(executable), *expected, "python"]


# --- the template -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [("environment", 'x" -- rm'), ("conda", "x\\"), ("gpus", "0;1"), ("env", "x"), ("working_dir", 3)],
)
def test_a_value_that_would_be_another_argument_is_refused(variable: str, value: object) -> None:
    schema = base_job_template()["variables"]
    jsonschema.validate({variable: schema["properties"][variable]["default"]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({variable: value}, schema)


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(UserError, match="no such variable"):
        base_job_template({"enviroment": "ft"})


def test_deployments_of_another_pool_have_its_name() -> None:
    first = describe_deployments(Settings())
    other = describe_deployments(Settings(), "gpu-a100")
    assert [f"{item.title}@gpu-a100" for item in first] == [item.title for item in other]
    assert {item.pool for item in first} == {WORK_POOL}
    assert {item.pool for item in other} == {"gpu-a100"}


def test_a_name_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(UserError, match="no name of a work pool"):
        ensure_pool(cast(Any, None), "gpu/a100")
