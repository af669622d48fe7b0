"""What a stage's events look like to whoever watches."""

from __future__ import annotations

import logging
import time

import pytest

from tasks.progress import StageProgress


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
