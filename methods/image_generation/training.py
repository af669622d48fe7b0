"""Fine-tunes a model that makes images, LoRA or full, with SimpleTuner as a program of its own.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from methods import contract
from methods.image_generation import configuration, pictures
from methods.image_generation.configuration import Place
from methods.image_generation.engine import Engine, training_program
from methods.toolkit import hardware
from methods.toolkit.checkpoints import remove_torn_checkpoints


class Rows(NamedTuple):
    """What is trained on: how many images, the caption of the first, and whether others are held back."""

    images: int
    first_caption: str
    validation: bool


def prepare_data(job: contract.Job, place: Place) -> Rows:
    """Copy the images into the train's own folder, each with its caption; SimpleTuner writes files beside them.

    Raises Refused if there are fewer than one batch, which SimpleTuner would leave out.
    """
    p = job.parameters
    if p["use_ema"] and p["tuning"] == "lora":
        raise contract.Refused("use_ema: SimpleTuner saves the average of whole weights only; set tuning: full")
    captions = _copy_images(Path(job.inputs["train_rows"]), place.images, p["max_samples"])
    validation = job.inputs.get("validation_rows")
    if validation:
        _copy_images(Path(validation), place.held_back, -1)
    shown = len(captions) * p["repeats"]
    if shown < p["batch_size"] * p["grad_accum_steps"]:
        raise contract.Refused(
            f"{len(captions)} images, {p['repeats']} times each, are no whole batch of {p['batch_size']} × "
            f"{p['grad_accum_steps']} (batch_size × grad_accum_steps): raise repeats, or lower the batch"
        )
    return Rows(len(captions), captions[0], bool(validation))


def prepare_model(job: contract.Job) -> Path:
    """The folder of the base model. Raises Refused if it is no pipeline of the family."""
    base = Path(job.inputs["base_model"])
    pictures.require_family(base, job.parameters["model_family"])
    return base


def build_trainer(job: contract.Job, place: Place, rows: Rows) -> Engine:
    """Write what SimpleTuner is told, and make what runs it."""
    on_gpu = pictures.on_gpu()
    parameters = {**job.parameters, "dtype": pictures.training_dtype(job.parameters["dtype"])}
    resume = job.resume_from.name if job.resume_from else None
    if resume:
        _name_these_images(place.checkpoints / resume / configuration.SAMPLER, place.images)
    told = configuration.training_configuration(
        place, parameters, rows.images, rows.first_caption, validation=rows.validation, resume=resume
    )
    data = configuration.data_configuration(place, parameters, validation=rows.validation, on_gpu=on_gpu)
    (place.work / configuration.CONFIGURATION).write_text(json.dumps(told, indent=1), encoding="utf-8")
    (place.work / configuration.DATA).write_text(json.dumps(data, indent=1), encoding="utf-8")
    for name in (configuration.CONFIGURATION, configuration.DATA):
        job.artifact(Path(shutil.copy2(place.work / name, job.folder / f"simpletuner_{name}")))
    return Engine(job, place, told["max_train_steps"], training_program())


def save(job: contract.Job, engine: Engine, rows: Rows) -> dict[str, object]:
    """Keep the adapter, or the whole pipeline, and how its pictures are made."""
    lora = job.parameters["tuning"] == "lora"
    place = engine.place
    if lora:
        weights = place.checkpoints / configuration.LORA_WEIGHTS
        if not weights.is_file():
            raise RuntimeError(f"SimpleTuner says that it is done, and has left no {weights.name}")
        rank, alpha = job.parameters["lora_rank"], job.parameters["lora_alpha"]
        pictures.keep_lora(weights, job.output / weights.name, pictures.trained_part(place.base_model), rank, alpha)
    else:
        # What it saves may lack the parts that were not trained: they are the base model's.
        part = pictures.trained_part(place.base_model)
        shutil.copytree(place.base_model, job.output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(part))
        shutil.copytree(place.checkpoints / "pipeline" / part, job.output / part)
    pictures.save_settings(job.output, pictures.settings_of(job.parameters), rows.first_caption)
    return {
        "model": str(job.output),
        "adapter": lora,
        "steps": engine.steps,
        "seconds": engine.seconds,
        "loss": engine.loss,
    }


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    hardware.settle_dtype(job, hardware.inference_device())
    job.phase("reading the data")
    place = Place(job.folder / "work", job.checkpoints, Path(job.inputs["base_model"]))
    job.checkpoints.mkdir(exist_ok=True)
    remove_torn_checkpoints(job.checkpoints)
    rows = prepare_data(job, place)
    job.phase("looking at the model")
    prepare_model(job)
    engine = build_trainer(job, place, rows)
    job.phase("training")
    engine.run()
    job.phase("saving")
    return save(job, engine, rows)


def _name_these_images(sampler: Path, images: Path) -> None:
    """Have a checkpoint name the images by where they lie now: a train's folder may have been moved or copied."""
    text = sampler.read_text(encoding="utf-8")
    seen: dict[str, list[str]] = json.loads(text)["aspect_ratio_bucket_indices"]
    for folder in {Path(path).parent for paths in seen.values() for path in paths} - {images}:
        before, after = (json.dumps(f"{each}/")[:-1] for each in (folder, images))
        text = text.replace(before, after)
    contract.write_json(sampler, json.loads(text))


def _copy_images(rows: Path, target: Path, limit: int) -> list[str]:
    """Copy the images of stored rows, the first `limit` of them (-1: all), and return their captions."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    captions = []
    with rows.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines):
            if number == limit:
                break
            row: dict[str, Any] = json.loads(line)
            image = rows.parent / row["image"]
            shutil.copyfile(image, target / f"{number:06}{image.suffix}")
            (target / f"{number:06}.txt").write_text(row["caption"], encoding="utf-8")
            captions.append(row["caption"])
    if not captions:
        raise contract.Refused(f"{rows.name} has no rows to train on")
    return captions


if __name__ == "__main__":
    contract.run(main)
