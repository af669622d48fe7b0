"""Shows how a stage is doing: a live line in the terminal, a progress artifact and log lines in Prefect."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ARTIFACT_SECONDS = 5.0
LOG_SECONDS = 10.0
STILL_SECONDS = 9.0  # after this long without a line, a terminal that is not live gets one with the elapsed time
_TICK_SECONDS = 1.0


class TerminalLine:
    """One line that is rewritten in place while a stage runs. Off until `TerminalLine.on` is set by the CLI."""

    on = False

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self.live = console.is_terminal
        self.console = console
        self.title = title
        # rich redraws the line ten times a second: spinner and elapsed time move while a stage reports nothing.
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task(title, total=None, note="")

    def show(self, step: float, total: int, note: str) -> None:
        """Redraw the line."""
        self.bar.update(self.task, completed=step, total=total or None, note=note)


class StageProgress:
    """Follows the events of one stage: phase, step, total, loss, tokens/s, time left.

    `follow` and `tick` are called by different threads.
    """

    def __init__(self, title: str, line: TerminalLine | None, logger: Any, artifact: Any | None) -> None:
        self.title, self.line, self.logger, self.artifact = title, line, logger, artifact
        self.step, self.total = 0, 0
        self.part, self.detail, self.phase = 0.0, "", ""
        self.values: dict[str, float] = {}
        self._started = self._shown = time.monotonic()
        self._first: tuple[float, float] | None = None
        self._last: tuple[float, float] = (0.0, 0.0)
        self._artifact_due = self._log_due = 0.0
        self._told_step = False
        self._lock = threading.Lock()

    def follow(self, events: list[dict[str, Any]]) -> None:
        """Take in new events and show where the stage is."""
        with self._lock:
            for event in events:
                self._take_in(event)
            if events:
                self._show()

    def tick(self) -> None:
        """Show that time passes: the elapsed time and the time left, in a terminal that has had no line for long."""
        with self._lock:
            if self.line is None:
                return
            if self.line.live:
                self.line.show(self.step + self.part, self.total, self.note())
            elif time.monotonic() - self._shown >= STILL_SECONDS:
                elapsed = round(time.monotonic() - self._started)
                self._print(f"{self.note() or 'starting'}  ({elapsed // 60}:{elapsed % 60:02d} elapsed)")

    def _take_in(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind == "progress":
            self._advance(event)
        elif kind == "metrics":
            self.values.update({k: float(v) for k, v in event["values"].items()})
        elif kind == "phase":
            self.phase = event["name"]
            self._say(event["name"])
        elif kind == "resolved":
            self._say(f"{event['name']} auto is {event['value']} ({event['origin']}: {event['reason']})")
        elif kind == "warning":
            self.logger.warning("%s: %s", self.title, event["text"])
            if self.line is not None:
                self.line.console.print(
                    f"  {self.title}: {event['text']}", style="yellow", markup=False, highlight=False
                )

    def _advance(self, event: dict[str, Any]) -> None:
        if int(event["total"]) != self.total:
            self._first = None  # other steps than before, which take another time
        self.step, self.total, self.phase = int(event["step"]), int(event["total"]), ""
        self.part, self.detail = float(event.get("part", 0.0)), str(event.get("note", ""))
        self._last = (float(event["time"]), self.step + self.part)
        self._first = self._first or self._last

    def _say(self, text: str) -> None:
        """One line in the log, and in the terminal, where it stays."""
        self.logger.info("%s: %s", self.title, text)
        if self.line is not None:
            self._print(text)

    def _print(self, text: str) -> None:
        if self.line is not None:
            self._shown = time.monotonic()
            # A line that is piped is not wrapped at a guessed width.
            self.line.console.print(f"  {self.title}: {text}", markup=False, highlight=False, soft_wrap=True)

    def wait(self, text: str) -> None:
        """Say what is waited for before a stage can run."""
        self.logger.info("%s", text)
        self.phase = text
        if self.line is not None and self.line.live:
            self.line.bar.update(self.line.task, note=text)
        elif self.line is not None:
            self.line.console.print(f"  {text}", highlight=False)
        if self.artifact is not None:
            self.artifact.update(0.0, text)

    def wait_over(self, text: str) -> None:
        """Say how the waiting has ended, if there was any."""
        self.logger.info("%s", text)
        if self.artifact is not None and self.artifact.id is not None:
            self.artifact.update(100.0, text)

    def finish(self) -> None:
        """Show the end of a stage that has ended well: the last steps may have come in its pause."""
        if not self.total:
            return
        self.phase, self.detail = "", ""
        if self.line is not None:
            self.line.show(self.total, self.total, self.note())
        self.logger.info("%s: %s, done", self.title, self.note())
        if self.artifact is not None:
            self.artifact.update(100.0, self.note())

    def note(self) -> str:
        """Step, loss, speed and time left as one line; only the phase, where one has begun since the last step."""
        if self.phase:
            return self.phase
        parts = [f"{self.step}/{self.total}"] if self.total else []
        if self.detail:
            parts.append(self.detail)
        if "loss" in self.values:
            parts.append(f"loss {self.values['loss']:.4f}")
        if "tokens_per_second" in self.values:
            parts.append(f"{self.values['tokens_per_second']:.0f} tokens/s")
        if (left := self.seconds_left()) is not None:
            minutes, seconds = divmod(round(left), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return "  ".join(parts)

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None until some of a step was seen.

        The time since the last report counts as work on the next step, and at most as all of it.
        """
        if self._first is None or self._last[1] <= self._first[1] or not self.total:
            return None
        started, first = self._first
        reported, done = self._last
        step_seconds = (reported - started) / (done - first)
        return max(0.0, step_seconds * (self.total - done) - min(time.time() - reported, step_seconds))

    def _show(self) -> None:
        now = time.monotonic()
        if self.line is not None and self.total:
            self.line.show(self.step + self.part, self.total, self.note())
        if self.total and now >= self._log_due:
            self._log_due = now + LOG_SECONDS
            self.logger.info("%s: %s", self.title, self.note())
        still = now - self._shown >= STILL_SECONDS or not self._told_step
        if self.total and self.line is not None and not self.line.live and still:
            self._told_step = True
            self._print(self.note())
        if self.total and self.artifact is not None and now >= self._artifact_due:
            self._artifact_due = now + ARTIFACT_SECONDS
            self.artifact.update(100 * (self.step + self.part) / self.total, self.note())


class ProgressArtifact:
    """A Prefect progress artifact of the running task. What Prefect refuses is logged and does no harm."""

    def __init__(self, key: str, logger: Any) -> None:
        self.key, self.logger = key, logger
        self.id: Any = None

    def update(self, percent: float, description: str) -> None:
        """Set the progress (0 to 100) and its description; made on first use."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        try:
            if self.id is None:
                self.id = create_progress_artifact(percent, key=self.key, description=description)
            else:
                update_progress_artifact(self.id, percent, description)
        except Exception as error:  # the Prefect server is away: the stage goes on
            self.logger.warning("progress artifact not updated: %s", error)


@contextmanager
def showing(title: str, key: str) -> Iterator[StageProgress]:
    """Follow a stage inside a Prefect task."""
    from prefect.logging import get_run_logger

    logger = get_run_logger()
    line = TerminalLine(title) if TerminalLine.on else None
    progress = StageProgress(title, line, logger, ProgressArtifact(key, logger))
    with ticking(progress):
        yield progress
        progress.finish()


@contextmanager
def in_terminal(title: str) -> Iterator[StageProgress]:
    """Follow what runs outside of a flow: a live line, or a line every few seconds where the terminal is not live."""
    progress = StageProgress(title, TerminalLine(title), logging.getLogger("tuneline"), None)
    with ticking(progress):
        yield progress


@contextmanager
def ticking(progress: StageProgress) -> Iterator[None]:
    """Call `progress.tick` once a second, as long as the block runs; the terminal shows the line as long."""
    if progress.line is None:
        yield
        return
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(_TICK_SECONDS):
            progress.tick()

    thread = threading.Thread(target=tick, name=f"progress of {progress.title}", daemon=True)
    with progress.line.bar:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
