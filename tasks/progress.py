"""Shows how a stage is doing: a live line in the terminal, a progress artifact and log lines in Prefect."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ARTIFACT_SECONDS = 5.0
LOG_SECONDS = 10.0


class TerminalLine:
    """One line that is rewritten in place while a stage runs. Off until `TerminalLine.on` is set by the CLI."""

    on = False

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        self.live = console.is_terminal
        self.console = console
        self.title = title
        self.bar = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task(title, total=None, note="")

    def show(self, step: int, total: int, note: str) -> None:
        """Redraw the line."""
        self.bar.update(self.task, completed=step, total=total or None, note=note)


class StageProgress:
    """Follows the events of one stage: step, total, loss, tokens/s, time left."""

    def __init__(self, title: str, line: TerminalLine | None, logger: Any, artifact: Any | None) -> None:
        self.title, self.line, self.logger, self.artifact = title, line, logger, artifact
        self.step, self.total = 0, 0
        self.values: dict[str, float] = {}
        self._first: tuple[float, int] | None = None
        self._artifact_due = self._log_due = 0.0

    def follow(self, events: list[dict[str, Any]]) -> None:
        """Take in new events and show where the stage is."""
        for event in events:
            kind = event.get("type")
            if kind == "progress":
                self.step, self.total = int(event["step"]), int(event["total"])
                self._first = self._first or (float(event["time"]), self.step)
            elif kind == "metrics":
                self.values.update({k: float(v) for k, v in event["values"].items()})
            elif kind == "phase":
                self.logger.info("%s: %s", self.title, event["name"])
                self._show_phase(event["name"])
            elif kind == "warning":
                self.logger.warning("%s: %s", self.title, event["text"])
                if self.line is not None:
                    self.line.console.print(
                        f"  {self.title}: {event['text']}", style="yellow", markup=False, highlight=False
                    )
        if events:
            self._show()

    def wait(self, text: str) -> None:
        """Say what is waited for before a stage can run."""
        self.logger.info("%s", text)
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
        if self.line is not None:
            self.line.show(self.total, self.total, self.note())
        self.logger.info("%s: %s, done", self.title, self.note())
        if self.artifact is not None:
            self.artifact.update(100.0, self.note())

    def note(self) -> str:
        """Step, loss, speed and time left as one line."""
        parts = [f"{self.step}/{self.total}"] if self.total else []
        if "loss" in self.values:
            parts.append(f"loss {self.values['loss']:.4f}")
        if "tokens_per_second" in self.values:
            parts.append(f"{self.values['tokens_per_second']:.0f} tokens/s")
        if (left := self.seconds_left()) is not None:
            minutes, seconds = divmod(round(left), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return "  ".join(parts)

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None until a step was seen."""
        if self._first is None or self.step <= self._first[1] or not self.total:
            return None
        started, first = self._first
        return (time.time() - started) / (self.step - first) * (self.total - self.step)

    def _show_phase(self, name: str) -> None:
        if self.line is not None and self.line.live:
            self.line.bar.update(self.line.task, note=name)

    def _show(self) -> None:
        now = time.monotonic()
        if self.line is not None and self.total:
            self.line.show(self.step, self.total, self.note())
        if self.total and now >= self._log_due:
            self._log_due = now + LOG_SECONDS
            self.logger.info("%s: %s", self.title, self.note())
            if self.line is not None and not self.line.live:
                self.line.console.print(f"  {self.title}: {self.note()}", highlight=False)
        if self.total and self.artifact is not None and now >= self._artifact_due:
            self._artifact_due = now + ARTIFACT_SECONDS
            self.artifact.update(100 * self.step / self.total, self.note())


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
    if line is None:
        yield progress
        progress.finish()
        return
    with line.bar:
        yield progress
        progress.finish()
