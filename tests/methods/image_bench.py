"""A bench for the image-generation method: jobs as the system makes them, and a program that behaves as SimpleTuner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.train import TrainConfig
from methods import contract
from methods.image_generation import configuration
from methods.registry import find_method
from tasks.stages import StageJob
from tests.methods.stage_jobs import open_job

METHOD = find_method("image-generation")

# What SimpleTuner does that the method relies on, as seen in 4.10.1: one JSON line a step, a checkpoint under another
# name until it is whole, `.guard` last, one more when the file of SIMPLETUNER_ACCELERATE_SIGNAL_FILE asks, SIGINT with
# exit code 0 and nothing saved, `status` in training_metrics.json.
PROGRAM = """
import json, os, pathlib, signal, sys, time
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

told = json.loads(pathlib.Path(os.environ["CONFIG_PATH"] + ".json").read_text())
out = pathlib.Path(told["output_dir"])
asking = pathlib.Path(os.environ["SIMPLETUNER_ACCELERATE_SIGNAL_FILE"])
how = json.loads(sys.argv[1])
signal.signal(signal.SIGINT, signal.SIG_IGN if how.get("deaf") else lambda *_: sys.exit(0))


def status(word):
    (out / "training_metrics.json").write_text(json.dumps({"status": word}))


def save(step):
    part = out / f"checkpoint-{step}-tmp"
    part.mkdir()
    (part / "optimizer.bin").write_text(str(step))
    seen = sorted(str(path) for path in pathlib.Path("images").absolute().glob("*.png"))
    (part / "training_state-images.json").write_text(json.dumps({"aspect_ratio_bucket_indices": {"1.0": seen}}))
    (part / ".guard").write_text("")
    part.rename(out / f"checkpoint-{step}")


status("running")
first = int((told.get("resume_from_checkpoint") or "checkpoint-0").split("-")[1]) + 1
(out / "validation_images").mkdir(exist_ok=True)
asked = 0
with (out / "training_metrics.jsonl").open("a") as metrics:
    for step in range(first, told["max_train_steps"] + 1):
        values = {"train_loss": 1 / step, "learning_rate": 0.1, "grad_norm": 2.0, "seconds_per_step": 1}
        if how.get("diverges") and step > 2:
            del values["train_loss"]  # what is no number is left out
        metrics.write(json.dumps({"step": step, "metrics": values}) + "\\n")
        metrics.write(json.dumps({"step": step, "metrics": {"system/cpu_percent": 50.0}}) + "\\n")
        metrics.flush()
        wanted = json.loads(asking.read_text()).get("manual_checkpoint", 0)
        if step % told["checkpoint_step_interval"] == 0 or wanted > asked:
            asked = wanted
            save(step)
        if step % told["validation_step_interval"] == 0:
            Image.new("RGB", (4, 4)).save(out / "validation_images" / f"step_{step}.png")
        if step == how.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if how.get("seconds"):
            time.sleep(how["seconds"])
if told["model_type"] == "lora" and not how.get("no_weights"):
    weights = {f"unet.mid.{part}.lora_{side}.weight": np.ones((2, 2)) for part in ("to_k", "to_out.0") for side in "AB"}
    save_file(weights, out / "pytorch_lora_weights.safetensors", {"format": "pt"})
status(how.get("status", "completed"))
sys.exit(how.get("code", 0))
"""


def parameters(**given: Any) -> dict[str, Any]:
    """Parameters of a job; `given` are common and own ones."""
    own = {name: value for name, value in given.items() if name in METHOD.parameters}
    hyper = {**METHOD.hyperparameter_defaults, **{name: value for name, value in given.items() if name not in own}}
    values = {"name": "t", "method": METHOD.name, "base_model": "tiny", "dataset": "rows", "hyperparameters": hyper}
    return METHOD.job_parameters(TrainConfig.model_validate({**values, "method_params": own}))


def image_job(
    folder: Path, base: Path, rows: Path, *, validation: Path | None = None, resume: Path | None = None, **given: Any
) -> StageJob:
    """A training job."""
    values = parameters(**given)
    return StageJob(
        stage="training",
        parameters=values,
        inputs={
            "base_model": str(base),
            "train_rows": str(rows),
            "validation_rows": str(validation) if validation else None,
        },
        output=folder / "output",
        resume_from=resume,
        seed=values["seed"],
    )


def opened(folder: Path, job: StageJob) -> contract.Job:
    """The job as the stage sees it."""
    return open_job(folder, job)


def told(folder: Path) -> dict[str, Any]:
    """What SimpleTuner was told in a job folder."""
    file = folder / "work" / configuration.CONFIGURATION
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
