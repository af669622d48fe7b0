"""Runs SimpleTuner's training program and follows it: curves, pictures, checkpoints, and how it ended.

It is never imported: its licence is the AGPL. It tells its losses in `training_metrics.jsonl`, one JSON line a step,
writes `.guard` last of all into a checkpoint, and saves one when the file that SIMPLETUNER_ACCELERATE_SIGNAL_FILE names
asks for it. SIGINT ends it without saving anything, and with exit code 0; now and then it trains on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from methods import contract
from methods.image_generation.configuration import CONFIGURATION, LORA_WEIGHTS, METRICS, SAMPLES, STATUS, Place

CURVES = {
    "train_loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "epoch": "epoch",
    "ema_decay_value": "ema_decay",
}
"""SimpleTuner's names and ours: the same curve has the same name for every method."""

_WHOLE = ".guard"
_POLL_SECONDS = 0.25
_SIGINT_SECONDS = 5.0
_ASKED = {"manual_checkpoint": 1}


def training_program() -> list[str]:
    """The command that trains. Raises Refused where this environment has no SimpleTuner."""
    found = find_spec("simpletuner")
    if found is None or found.origin is None:
        raise contract.Refused(
            f"SimpleTuner is not in {sys.prefix}: make the environment with `tuneline envs create image-generation`"
        )
    return [sys.executable, str(Path(found.origin).with_name("train.py"))]


class Engine:
    """One run of the program, in the folder `place.work`."""

    def __init__(self, job: contract.Job, place: Place, steps: int, command: list[str]) -> None:
        self.job, self.place, self.steps, self.command = job, place, steps, command
        self.metrics = MetricsTail(place.checkpoints / METRICS)
        self.curves = CurveWriter(job, steps)
        self.told: set[Path] = set(self._pictures())
        self.seconds = 0.0

    def run(self) -> None:
        """Train to the end. Raises Cancelled once a checkpoint is saved, RuntimeError, Refused."""
        self.metrics.skip()  # those of the attempts before were told then
        for name in (STATUS, LORA_WEIGHTS):  # what an earlier attempt said or left is none of this one's
            (self.place.checkpoints / name).unlink(missing_ok=True)
        started = time.monotonic()
        asking = self.place.work / "ask.json"
        contract.write_json(asking, {})
        process = subprocess.Popen(
            self.command,
            cwd=self.place.work,
            env=self._environment(asking),
            stdin=subprocess.DEVNULL,
            # SIGTERM reaches the whole group of this stage, and would end the program unsaved.
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                self.follow()
                if self.job.cancelled:
                    self._stop(process, asking)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.follow()
        self.seconds = time.monotonic() - started
        self._judge(process.returncode)

    def follow(self) -> None:
        """Report what is new."""
        for step, values in self.metrics.read():
            self.curves.write(step, values)
        keep_whole_checkpoints(self.place.checkpoints, self.job.parameters["keep_checkpoints"])
        for picture in self._pictures():
            if picture not in self.told and whole_picture(picture):
                self.told.add(picture)
                self.job.artifact(self._kept(picture))

    @property
    def loss(self) -> float:
        """Mean loss of all steps that are on record; not a number if it was none at the last: such are not written."""
        told = MetricsTail(self.metrics.path).read()
        losses = {step: values["train_loss"] for step, values in told if "train_loss" in values}  # the newest of each
        return sum(losses.values()) / len(losses) if self.steps in losses else math.nan

    def _stop(self, process: subprocess.Popen[bytes], asking: Path) -> None:
        """Have a checkpoint saved, then end the program; one that does not train yet is ended at once."""
        before = contract.complete_checkpoints(self.place.checkpoints)[-1:]
        if self.metrics.any:
            contract.write_json(asking, _ASKED)
            while process.poll() is None and contract.complete_checkpoints(self.place.checkpoints)[-1:] == before:
                time.sleep(_POLL_SECONDS)
                self.follow()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_SIGINT_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what it was asked to keep is whole

    def _judge(self, code: int) -> None:
        """Raise Cancelled, Refused or RuntimeError unless the train is completed."""
        status = self.place.checkpoints / STATUS
        told = json.loads(status.read_text(encoding="utf-8")).get("status") if status.exists() else None
        if self.job.cancelled and told != "completed":
            raise contract.Cancelled
        if code != 0 or told != "completed":
            raise RuntimeError(f"SimpleTuner ended with exit code {code} and the status {told}: see the log")
        if not math.isfinite(self.loss):
            raise contract.Refused(
                f"the loss became {self.loss}: the weights are of no use. Lower learning_rate or max_grad_norm."
            )

    def _environment(self, asking: Path) -> dict[str, str]:
        here = str(Path(__file__).resolve().parents[2])
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != here]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),  # nothing of ours is to be found by its imports
            "CONFIG_BACKEND": "json",
            "CONFIG_PATH": str((self.place.work / CONFIGURATION).with_suffix("")),
            "SIMPLETUNER_ACCELERATE_SIGNAL_FILE": str(asking),
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
        }

    def _pictures(self) -> list[Path]:
        return sorted((self.place.checkpoints / SAMPLES).glob("*.png"))

    def _kept(self, picture: Path) -> Path:
        """A copy beside the job's events: checkpoints and what goes with them are removed in the end."""
        folder = self.job.folder / "samples"
        folder.mkdir(exist_ok=True)
        return Path(shutil.copy2(picture, folder / picture.name))


class MetricsTail:
    """Reads the whole lines that were appended to a metrics file since the last look: (step, values by name)."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.any = path, 0, False

    def skip(self) -> None:
        """Leave out what is there."""
        self.offset = self.path.stat().st_size if self.path.exists() else 0

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """What is new. Lines without a step, and values that are no numbers, are left out."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        found = []
        for line in whole.split(b"\n") if newline else []:
            content: dict[str, Any] = json.loads(line)
            numbers = {
                name: float(value)
                for name, value in content.get("metrics", {}).items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            if isinstance(content.get("step"), int) and numbers:
                found.append((content["step"], numbers))
        self.any = self.any or bool(found)
        return found


class CurveWriter:
    """Reports the points of the curves, and how far the train is; a loss is the mean since the point before."""

    def __init__(self, job: contract.Job, steps: int) -> None:
        self.job, self.steps, self.every = job, steps, job.parameters["logging_steps"]
        self.losses: list[float] = []

    def write(self, step: int, values: dict[str, float]) -> None:
        """Report one line of the metrics file."""
        if "train_loss" in values:
            self.losses.append(values["train_loss"])
            self.job.progress(min(step, self.steps), self.steps)
            if step == 1 or step % self.every == 0 or step == self.steps:
                point = {CURVES[name]: value for name, value in values.items() if name in CURVES}
                point["loss"] = sum(self.losses) / len(self.losses)
                self.losses = []
                self._tell(step, point)
        held_back = [value for name, value in values.items() if name.startswith("loss/val")]
        if held_back:
            self._tell(step, {"eval_loss": sum(held_back) / len(held_back)})

    def _tell(self, step: int, point: dict[str, float]) -> None:
        self.job.metrics(step, **point)
        shown = "  ".join(f"{name} {value:.6g}" for name, value in point.items())
        print(f"step {step}/{self.steps}  {shown}", flush=True)


def keep_whole_checkpoints(checkpoints: Path, count: int) -> None:
    """Mark the checkpoints that are written to their end, and remove all but the newest `count` of these."""
    for guard in checkpoints.glob(f"checkpoint-*/{_WHOLE}"):
        # While it is written it is called `checkpoint-N-tmp`.
        whole = guard.parent.name.removeprefix("checkpoint-").isdecimal()
        if whole and not (guard.parent / contract.COMPLETE_MARK).exists():
            contract.mark_complete(guard.parent)
    for old in contract.complete_checkpoints(checkpoints)[:-count]:
        (old / contract.COMPLETE_MARK).unlink()
        (old / _WHOLE).unlink(missing_ok=True)
        shutil.rmtree(old)


def whole_picture(path: Path) -> bool:
    """Whether a PNG is written to its end."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 12))
        return file.read().endswith(b"IEND\xaeB`\x82")
