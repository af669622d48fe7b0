"""What a stage's events look like to whoever watches."""

from __future__ import annotations

import logging
import time

import pytest

from tasks.progress import StageProgress, in_terminal


@pytest.fixture
def progress() -> StageProgress:
    return StageProgress("training", None, logging.getLogger("tests.progress"), None)


def test_note_tells_step_loss_speed_and_time_left(progress: StageProgress) -> None:
    now = time.time()
    progress.follow([{"type": "progress", "time": now - 10, "step": 0, "total": 40}])
    assert progress.note() == "0/40"
    progress.follow(
        [
            {"type": "metrics", "time": now, "step": 10, "values": {"loss": 1.5, "tokens_per_second": 320.4}},
            {"type": "progress", "time": now, "step": 10, "total": 40},
        ]
    )
    assert progress.seconds_left() == pytest.approx(30, abs=1)
    assert progress.note().startswith("10/40  loss 1.5000  320 tokens/s  0:")


def test_time_left_of_a_resumed_stage_counts_its_own_steps_only(progress: StageProgress) -> None:
    now = time.time()
    progress.follow([{"type": "progress", "time": now - 10, "step": 30, "total": 40}])
    assert progress.seconds_left() is None
    progress.follow([{"type": "progress", "time": now, "step": 35, "total": 40}])
    assert progress.seconds_left() == pytest.approx(10, abs=1)


def test_time_left_carries_sixty_seconds_into_the_minutes(
    progress: StageProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.follow([{"type": "progress", "time": time.time(), "step": 1, "total": 2}])
    monkeypatch.setattr(progress, "seconds_left", lambda: 119.7)
    assert progress.note() == "1/2  2:00 left"


def test_warnings_and_phases_are_logged(progress: StageProgress, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tests.progress"):
        progress.follow(
            [
                {"type": "phase", "time": 1.0, "name": "merging"},
                {"type": "warning", "time": 1.0, "text": "3 rows left out"},
            ]
        )
    told = [(record.levelname, record.message) for record in caplog.records]
    assert told == [("INFO", "training: merging"), ("WARNING", "training: 3 rows left out")]


def test_a_part_of_a_step_counts_for_the_time_left(progress: StageProgress) -> None:
    now = time.time()
    progress.follow(
        [
            {"type": "progress", "time": now - 10, "step": 0, "total": 4},
            {"type": "progress", "time": now, "step": 0, "total": 4, "part": 0.5, "note": "30 of 64 tokens"},
        ]
    )
    assert progress.seconds_left() == pytest.approx(70, abs=1)
    assert progress.note().startswith("0/4  30 of 64 tokens  1:")


def test_the_time_left_goes_down_between_two_reports_but_not_below_the_next_step(progress: StageProgress) -> None:
    now = time.time()
    progress.follow(
        [
            {"type": "progress", "time": now - 25, "step": 0, "total": 4},
            {"type": "progress", "time": now - 5, "step": 1, "total": 4},
        ]
    )
    assert progress.seconds_left() == pytest.approx(55, abs=1)
    progress.follow([{"type": "progress", "time": now - 1000, "step": 1, "total": 4}])
    assert progress.seconds_left() is not None


def test_a_phase_is_shown_instead_of_the_steps_before_it(progress: StageProgress) -> None:
    progress.follow([{"type": "progress", "time": 1.0, "step": 4, "total": 4}, {"type": "phase", "name": "saving"}])
    assert progress.note() == "saving"
    progress.finish()
    assert progress.note().startswith("4/4")


def test_what_auto_became_is_logged_with_its_origin(progress: StageProgress, caplog: pytest.LogCaptureFixture) -> None:
    event = {"type": "resolved", "name": "dtype", "value": "float32", "origin": "hardware", "reason": "an old CPU"}
    with caplog.at_level(logging.INFO, logger="tests.progress"):
        progress.follow([event])
    assert [record.message for record in caplog.records] == ["training: dtype auto is float32 (hardware: an old CPU)"]


def test_a_terminal_that_is_not_live_gets_a_line_while_a_stage_reports_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tasks.progress.STILL_SECONDS", 0.2)
    monkeypatch.setattr("tasks.progress._TICK_SECONDS", 0.05)
    with in_terminal("saving") as progress:
        progress.follow([{"type": "phase", "time": 1.0, "name": "merging"}])
        time.sleep(1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  saving: merging"
    assert len([line for line in lines if line.startswith("  saving: merging  (0:0")]) >= 2


def test_lines_of_a_terminal_that_is_not_live_come_one_at_a_time_and_are_not_wrapped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with in_terminal("evaluating the base") as progress:
        for step in range(5):
            event = {"type": "progress", "time": time.time(), "step": step, "total": 48, "note": "token " * 30}
            progress.follow([event])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("  evaluating the base: 0/48  token")
