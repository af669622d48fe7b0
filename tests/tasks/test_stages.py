"""What the runner hands on of a stage: its events, its result, its failure."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from methods import contract
from tasks.stages import EventTail, StageFailed, StageKilled, run_stage
from tests.methods.stage_jobs import small_job, write_stage


def run(folder: Path, body: str, on_events: Any = lambda events: None) -> dict[str, Any]:
    return run_stage(folder, small_job(folder), Path(sys.executable), write_stage(folder, body), 5, on_events)


def test_events_come_in_order_once_and_all_of_them_before_the_result(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    body = """
    for step in range(500):
        job.metrics(step, loss=1 / (step + 1))
        if step % 100 == 0:
            time.sleep(0.2)
    job.progress(500, 500)
    job.artifact(job.output / "x")
    return {"steps": 500}
    """
    assert run(tmp_path, body, events.extend) == {"status": "completed", "steps": 500}
    assert [event["step"] for event in events if event["type"] == "metrics"] == list(range(500))
    assert [event["type"] for event in events[-2:]] == ["progress", "artifact"]


def test_garbage_in_the_events_becomes_a_warning_and_the_rest_is_read(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    body = r"""
    job.phase("before")
    with open(job.folder / "events.jsonl", "ab") as file:
        for line in (b"not json", b"5", b"[]", b'{"type": "metrics"}', b'{"no": "type"}', b"\xff\xfe", b"",
                     b'{"time": 1, "type": "metrics", "step": 1, "values": {"loss": "high"}}',
                     b'{"time": 1, "type": "progress", "step": null, "total": 2}',
                     b'{"time": 1, "type": "unheard of"}', b"a\rb"):
            file.write(line + b"\n")
    job.phase("after")
    return {}
    """
    run(tmp_path, body, events.extend)
    assert [event["type"] for event in events] == ["phase", *["warning"] * 11, "phase"]
    assert all("not an event" in event["text"] for event in events[1:-1])
    assert "high" in events[8]["text"]


def test_what_looks_on_may_fail_without_ending_the_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(events: list[dict[str, Any]]) -> None:
        raise ConnectionError("the server is away")

    assert run(tmp_path, "time.sleep(0.6)\nreturn {'a': 1}", fail) == {"status": "completed", "a": 1}
    assert "the server is away" in caplog.text


def test_events_of_an_earlier_attempt_are_not_told_again(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    run(tmp_path, "job.phase('first')\nreturn {}")
    run(tmp_path, "job.phase('second')\nreturn {}", events.extend)
    assert [event["name"] for event in events] == ["second"]
    assert len(EventTail(tmp_path / contract.EVENTS_FILE).read()) == 2


def test_the_result_of_an_earlier_attempt_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run(tmp_path, "return {}")
    with pytest.raises(StageKilled):
        run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")


def test_a_refusal_is_a_user_error_with_its_words_only(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, "raise contract.Refused('lora_targets do not fit')")
    assert str(caught.value) == "lora_targets do not fit"


def test_a_failure_names_error_and_log_and_shows_its_end(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="ZeroDivisionError: division by zero") as caught:
        run(tmp_path, "print('last words', flush=True)\n1 / 0")
    assert not isinstance(caught.value, StageKilled)
    assert str(tmp_path / contract.LOG_FILE) in str(caught.value)
    assert "last words" in str(caught.value)


def test_an_end_without_result_is_a_failure_even_with_exit_code_0(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="exit code 0 and left no result"):
        run(tmp_path, "os._exit(0)")


def test_an_interpreter_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(StageFailed):
        run_stage(tmp_path, small_job(tmp_path), tmp_path / "no_python", tmp_path / "x.py", 5, lambda events: None)


def test_a_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert tail.read() == []
    line = json.dumps({"time": 1.0, "type": "metrics", "step": 3, "values": {"loss": "nan"}}).encode() + b"\n"
    path.write_bytes(line[:20])
    assert tail.read() == []
    with path.open("ab") as file:
        file.write(line[20:])
    assert math.isnan(tail.read()[0]["values"]["loss"])
    assert tail.read() == []


def test_a_tail_reads_up_to_an_offset_and_goes_on_there(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [json.dumps({"time": 1.0, "type": "phase", "name": name}).encode() + b"\n" for name in "abc"]
    path.write_bytes(b"".join(lines))
    tail = EventTail(path)
    assert [event["name"] for event in tail.read(until=len(lines[0]) * 2)] == ["a", "b"]
    assert [event["name"] for event in tail.read()] == ["c"]
