"""The stage contract: what a stage file and the system that runs it say to each other.

Standard library only, so that it works in any environment. A stage file needs ten lines:

    from methods import contract

    def main(job: contract.Job) -> dict[str, object]:
        for step in range(1, 101):
            loss = 1 / step  # train
            job.metrics(step, loss=loss)
            job.progress(step, 100)
            if job.cancelled:
                ...  # save a checkpoint below job.checkpoints
                raise contract.Cancelled
        return {"model": str(job.output), "adapter": True}

    if __name__ == "__main__":
        contract.run(main)

The system starts `PYTHON FILE JOB_DIR`. The stage reads `JOB_DIR/job.json`, appends one JSON line per event to
`JOB_DIR/events.jsonl` and ends by writing `JOB_DIR/result.json`. Standard output and error are the log.
SIGTERM asks it to save a checkpoint and to leave within the grace period.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

JOB_FILE = "job.json"
EVENTS_FILE = "events.jsonl"
RESULT_FILE = "result.json"
LOG_FILE = "train.log"

COMPLETE_MARK = "complete"

EXIT_FAILED = 1
EXIT_CANCELLED = 3


class Cancelled(Exception):
    """Raised by a stage that has saved what it could after it was asked to stop."""


class Refused(Exception):
    """Raised by a stage for what the user can mend; the message is shown without a traceback."""


class Job:
    """One run of one stage: its inputs, and the voice it reports with.

    Attributes:
        folder: the job folder.
        stage: `training`, `saving`, `inference-customized`, `inference-complete` or `deploying`.
        parameters: hyper-parameters and method parameters, by canonical name.
        inputs: resolved absolute paths and values the stage works on, by name.
        output: folder the stage leaves its product in.
        checkpoints: folder of the checkpoints.
        resume_from: the checkpoint folder to go on from, or None.
        seed: the seed of every random number generator.
        is_main: whether this process speaks for the stage; false in all others of a training in several processes
            (torchrun's RANK), whose reports are dropped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content: dict[str, Any] = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        self.stage: str = content["stage"]
        self.parameters: dict[str, Any] = content["parameters"]
        self.inputs: dict[str, Any] = content["inputs"]
        self.output = Path(content["output"])
        self.checkpoints = folder / "checkpoints"
        self.resume_from: Path | None = Path(content["resume_from"]) if content.get("resume_from") else None
        self.seed: int = content["seed"]
        self.cancelled = False
        self.is_main = os.environ.get("RANK", "0") == "0"
        self._events = _open_events(folder / EVENTS_FILE) if self.is_main else None

    def metrics(self, step: int, **values: float) -> None:
        """Report values measured at `step`; they become curves of the same names."""
        self._emit("metrics", step=int(step), values={name: float(value) for name, value in values.items()})

    def progress(self, step: int, total: int, part: float = 0.0, note: str = "") -> None:
        """Report that `step` of `total` steps are done, and `part` (0 to 1) of the next one; `note` says of what."""
        self._emit("progress", step=int(step), total=int(total), part=float(part), note=note)

    def phase(self, name: str) -> None:
        """Report what the stage is about to do."""
        self._emit("phase", name=name)

    def resolved(self, name: str, value: str, origin: str, reason: str) -> None:
        """Report what the parameter `name`, given as `auto`, became; `origin` decided it, such as `hardware`."""
        self._emit("resolved", name=name, value=value, origin=origin, reason=reason)

    def warning(self, text: str) -> None:
        """Report something the user ought to know although the stage goes on."""
        self._emit("warning", text=text)

    def artifact(self, path: Path) -> None:
        """Report a file to be kept in the record of the train."""
        self._emit("artifact", path=str(path))

    def _emit(self, kind: str, **content: object) -> None:
        if self._events is None:
            return
        event = {"time": time.time(), "type": kind, **content}
        # One write of one line: a reader never sees half an event, a kill leaves at most one torn line at the end.
        # A name of a file may hold bytes that are no UTF-8: they are shown as `?`, they do not end the stage.
        os.write(self._events, (json.dumps(_finite(event), ensure_ascii=False) + "\n").encode(errors="replace"))


def run(main: Callable[[Job], Mapping[str, object]]) -> None:
    """Run `main` on the job folder named on the command line, write `result.json`, exit with its code."""
    job = Job(Path(sys.argv[1]))
    signal.signal(signal.SIGTERM, _remember_cancel(job))
    if not job.is_main:  # what all of them print, the main one prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        result = {**main(job), "status": "completed"}
        _write_result(job, result)
        sys.exit(0)
    except Cancelled:
        result = {"status": "cancelled"}
        code = EXIT_CANCELLED
    except Refused as refusal:
        result = {"status": "failed", "refused": True, "error": str(refusal)}
        code = EXIT_FAILED
    except Exception as error:  # whatever happened is told in the result, and in full in the log
        traceback.print_exc()
        result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        code = EXIT_FAILED
    _write_result(job, result)
    sys.exit(code)


def _write_result(job: Job, result: Mapping[str, object]) -> None:
    """Write the result of the stage. Of several processes the main one does; another one only what made it fail.

    A process that fails ends the others: that they were asked to stop then is no cancellation.
    """
    path, failed = job.folder / RESULT_FILE, result["status"] == "failed"
    if (job.is_main or failed) and (result["status"] == "completed" or not path.exists()):
        write_json(path, result)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write `content` so that a reader sees the old file or the new one, never a part.

    Raises TypeError, and writes nothing, if a value has no form in JSON (a path, a tensor).
    """
    text = json.dumps(_finite(content), ensure_ascii=False, indent=1)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def mark_complete(checkpoint: Path) -> None:
    """Say that everything in `checkpoint` is written: one without the mark was cut off and is never resumed."""
    with (checkpoint / COMPLETE_MARK).open("w") as file:
        file.flush()
        os.fsync(file.fileno())


def keep_newest(checkpoints: Path, count: int, best: int | None = None) -> None:
    """Remove all whole checkpoints below `checkpoints` but the newest `count` and that of the step `best`."""
    for old in complete_checkpoints(checkpoints)[:-count]:
        if old.name == f"checkpoint-{best}":
            continue
        # The mark goes first: a kill in between leaves a folder that nobody resumes from.
        (old / COMPLETE_MARK).unlink()
        shutil.rmtree(old)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The whole checkpoints (folders named `checkpoint-STEP`) below `checkpoints`, oldest first."""
    found = [path.parent for path in checkpoints.glob(f"checkpoint-*/{COMPLETE_MARK}")]
    numbered = [path for path in found if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _remember_cancel(job: Job) -> Callable[[int, FrameType | None], None]:
    def handler(_signal: int, _frame: FrameType | None) -> None:
        job.cancelled = True

    return handler


def _open_events(path: Path) -> int:
    """Open the events file for appending, without the torn last line a kill may have left."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(descriptor, content.rfind(b"\n") + 1)
    return descriptor


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings: JSON has no word for them, and readers break on them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
