"""The stage contract, with real stage files in real processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from methods import contract
from tasks.stages import EventTail, prepare_folder, stage_environment
from tests.methods.stage_jobs import open_job, small_job, wait_for, write_stage


def run_alone(
    folder: Path, file: Path, *options: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a stage file the way an environment does that has nothing but Python."""
    if environment is None:
        prepare_folder(folder, small_job(folder))
    command = [sys.executable, *options, str(file), str(folder)]
    variables = stage_environment(environment)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def result_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / contract.RESULT_FILE).read_text())
    return content


def test_the_example_of_the_docstring_runs_without_any_installed_package(tmp_path: Path) -> None:
    lines = str(contract.__doc__).split("\n\n    from methods import contract", 1)[1].split("The system starts")[0]
    file = tmp_path / "example.py"
    file.write_text(textwrap.dedent("    from methods import contract" + lines))
    done = run_alone(tmp_path / "job", file, "-S")
    assert done.returncode == 0, done.stderr
    product = str(tmp_path / "job" / "output")
    assert result_of(tmp_path / "job") == {"status": "completed", "model": product, "adapter": True}
    events = EventTail(tmp_path / "job" / contract.EVENTS_FILE).read()
    assert [event["values"]["loss"] for event in events if event["type"] == "metrics"] == [1 / s for s in range(1, 101)]
    assert events[-1]["step"] == events[-1]["total"] == 100


def test_a_reader_only_ever_sees_whole_events_in_order(tmp_path: Path) -> None:
    job = open_job(tmp_path, small_job(tmp_path))
    written = 3000

    def write() -> None:
        for step in range(written):
            job.metrics(step, loss=step / 7, note=step)

    writer = threading.Thread(target=write)
    tail = EventTail(tmp_path / contract.EVENTS_FILE)
    writer.start()
    seen = []
    while writer.is_alive():
        seen += tail.read()
    writer.join()
    seen += tail.read()
    assert [event["type"] for event in seen] == ["metrics"] * written
    assert [event["step"] for event in seen] == list(range(written))


def test_the_torn_last_line_of_a_killed_stage_is_repaired(tmp_path: Path) -> None:
    events = tmp_path / contract.EVENTS_FILE
    open_job(tmp_path, small_job(tmp_path)).phase("first")
    with events.open("ab") as file:
        file.write(b'{"time": 1, "type": "metr')
    open_job(tmp_path, small_job(tmp_path)).phase("second")
    assert [event["name"] for event in EventTail(events).read()] == ["first", "second"]


def test_an_events_file_of_a_torn_line_only_is_emptied(tmp_path: Path) -> None:
    (tmp_path / contract.EVENTS_FILE).write_bytes(b'{"time"')
    open_job(tmp_path, small_job(tmp_path)).phase("first")
    assert [event["type"] for event in EventTail(tmp_path / contract.EVENTS_FILE).read()] == ["phase"]


def test_nan_and_infinity_are_written_as_json_that_every_reader_takes(tmp_path: Path) -> None:
    job = open_job(tmp_path, small_job(tmp_path))
    job.metrics(1, loss=math.nan, high=math.inf, low=-math.inf)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / contract.EVENTS_FILE).read_text(), parse_constant=refuse)
    values = EventTail(tmp_path / contract.EVENTS_FILE).read()[0]["values"]
    assert math.isnan(values["loss"])
    assert (values["high"], values["low"]) == (math.inf, -math.inf)
    contract.write_json(tmp_path / "x.json", {"nested": [{"loss": math.nan}]})
    json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)


def test_text_that_is_no_unicode_does_not_end_the_stage(tmp_path: Path) -> None:
    open_job(tmp_path, small_job(tmp_path)).warning(os.fsdecode(b"file \xff"))
    assert EventTail(tmp_path / contract.EVENTS_FILE).read()[0]["text"] == "file ?"


def test_a_result_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / contract.RESULT_FILE
    contents: list[dict[str, object]] = [{"status": "completed", "filler": str(i) * 200_000} for i in range(10)]
    contract.write_json(path, contents[0])

    def write() -> None:
        for content in contents * 5:
            contract.write_json(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert json.loads(path.read_text())["status"] == "completed"
    writer.join()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ("return {'a': 1}", 0, {"status": "completed", "a": 1}),
        ("raise contract.Cancelled", 3, {"status": "cancelled"}),
        ("raise contract.Refused('no rows')", 1, {"status": "failed", "refused": True, "error": "no rows"}),
        ("raise ValueError('odd')", 1, {"status": "failed", "error": "ValueError: odd"}),
        ("raise MemoryError()", 1, {"status": "failed", "error": "MemoryError: "}),
    ],
)
def test_each_end_of_a_stage_has_its_result_and_exit_code(
    tmp_path: Path, body: str, code: int, expected: dict[str, object]
) -> None:
    done = run_alone(tmp_path / "job", write_stage(tmp_path, body))
    assert (done.returncode, result_of(tmp_path / "job")) == (code, expected)
    assert ("Traceback" in done.stderr) == ("refused" not in expected and code == 1)


@pytest.mark.parametrize("body", ["return {'model': job.output}", "return 5"])
def test_a_result_that_is_no_json_is_told_and_leaves_no_half_file(tmp_path: Path, body: str) -> None:
    folder = tmp_path / "job"
    done = run_alone(folder, write_stage(tmp_path, body))
    assert done.returncode == contract.EXIT_FAILED
    assert result_of(folder)["status"] == "failed"
    assert result_of(folder)["error"].startswith("TypeError: ")
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "job.json", "output", "result.json"]


def test_a_stage_that_leaves_by_itself_has_no_result(tmp_path: Path) -> None:
    done = run_alone(tmp_path / "job", write_stage(tmp_path, "sys.exit(7)"))
    assert done.returncode == 7
    assert not (tmp_path / "job" / contract.RESULT_FILE).exists()


def test_sigterm_sets_cancelled_and_nothing_else(tmp_path: Path) -> None:
    body = """
    job.phase("waiting")
    while not job.cancelled:
        time.sleep(0.01)
    raise contract.Cancelled
    """
    folder, file = tmp_path / "job", write_stage(tmp_path, body)
    prepare_folder(folder, small_job(folder))
    process = subprocess.Popen([sys.executable, str(file), str(folder)], env=stage_environment())
    tail = EventTail(folder / contract.EVENTS_FILE)
    assert wait_for(lambda: bool(tail.read()), 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == contract.EXIT_CANCELLED
    assert result_of(folder) == {"status": "cancelled"}


def test_only_marked_checkpoints_count_and_the_newest_is_last(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-best", "checkpoint-11"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":
            contract.mark_complete(tmp_path / name)
    found = [path.name for path in contract.complete_checkpoints(tmp_path)]
    assert found == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_of_several_processes_one_speaks_and_any_tells_why_it_failed(tmp_path: Path) -> None:
    body = """
        print("said by", os.environ["RANK"], flush=True)
        job.metrics(1, loss=float(os.environ["RANK"]))
        if "FAIL" in os.environ:
            raise KeyError("rows of this one")
        if "STOP" in os.environ:
            raise contract.Cancelled
        return {"rank": os.environ["RANK"]}
    """
    file, folder = write_stage(tmp_path, body), tmp_path / "job"
    prepare_folder(folder, small_job(folder))
    done = [run_alone(folder, file, environment={"RANK": rank}) for rank in ("1", "0", "1")]
    assert [each.returncode for each in done] == [0, 0, 0]
    assert [each.stdout for each in done] == ["", "said by 0\n", ""]
    assert result_of(folder) == {"status": "completed", "rank": "0"}
    losses = [event["values"]["loss"] for event in EventTail(folder / contract.EVENTS_FILE).read()]
    assert losses == [0.0]

    prepare_folder(folder, small_job(folder))
    failed = run_alone(folder, file, environment={"RANK": "1", "FAIL": "1"})
    assert failed.returncode == contract.EXIT_FAILED
    assert "rows of this one" in failed.stderr
    # The failure of one ends the others, which is no cancellation.
    assert run_alone(folder, file, environment={"RANK": "0", "STOP": "1"}).returncode == contract.EXIT_CANCELLED
    assert result_of(folder) == {"status": "failed", "error": "KeyError: 'rows of this one'"}
