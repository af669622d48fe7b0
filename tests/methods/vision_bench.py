"""A bench for the vision-language method: its tiny model and the sample images, and jobs as the system makes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.settings import PROJECT_ROOT
from configs.train import Hyperparameters
from methods import contract
from methods.toolkit.vision_rows import Renderer
from methods.vision_language import inference_complete, inference_customized, saving, training
from tasks.stages import StageJob
from tests.methods.stage_jobs import open_job

FOLDER = PROJECT_ROOT / "methods" / "vision_language"
MANIFEST: dict[str, Any] = yaml.safe_load((FOLDER / "method.yaml").read_text(encoding="utf-8"))
OWN = {name: schema["default"] for name, schema in MANIFEST["parameters"].items()}
GENERATION = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "top_k": 50, "batch_size": 4}


def training_job(folder: Path, data: Path, *, validation: bool, resume: Path | None, **given: Any) -> StageJob:
    """A training job on what `check.py` left in the folder `data`; `given` are parameters, common and own."""
    common = {name: value for name, value in given.items() if name in Hyperparameters.model_fields}
    values = Hyperparameters(**{**MANIFEST["hyperparameters"]["defaults"], **common}).model_dump(mode="json")
    values["lora_alpha"] = values["lora_alpha"] or 2 * values["lora_rank"]
    own = {name: given.get(name, default) for name, default in OWN.items()}
    return StageJob(
        stage="training",
        parameters={**values, **own, "max_new_tokens": given.get("max_new_tokens", 8)},
        inputs={
            "base_model": str(data / "base_model"),
            "train_rows": str(data / "train_rows.jsonl"),
            "validation_rows": str(data / "validation_rows.jsonl") if validation else None,
        },
        output=folder / "output",
        resume_from=resume,
        seed=values["seed"],
    )


@dataclass
class VisionBench:
    """Runs the stages in this process, each time in a new folder."""

    data: Path
    root: Path
    count: int = 0

    def folder(self) -> Path:
        self.count += 1
        return self.root / str(self.count)

    def job(
        self, *, folder: Path | None = None, validation: bool = False, resume: Path | None = None, **given: Any
    ) -> contract.Job:
        folder = folder or self.folder()
        return open_job(folder, training_job(folder, self.data, validation=validation, resume=resume, **given))

    def build(self, **given: Any) -> training.Trainer:
        """The trainer of a job, before its first step."""
        job = self.job(**given)
        renderer = training.prepare_processor(job)
        rows, held_back = training.prepare_data(job, renderer)
        return training.build_trainer(job, training.prepare_model(job), renderer, rows, held_back)

    def train(self, **given: Any) -> Path:
        """Run the whole training stage; returns its job folder, with the result in it."""
        job = self.job(**given)
        contract.write_json(job.folder / contract.RESULT_FILE, training.main(job))
        return job.folder

    def save(self, trained: Path, *, dtype: str = "auto") -> dict[str, Any]:
        """Run the saving stage on what a training stage left in its job folder."""
        result = json.loads((trained / contract.RESULT_FILE).read_text())
        inputs = {"base_model": str(self.data / "base_model"), "trained": result["model"], "adapter": result["adapter"]}
        folder = self.folder()
        job = StageJob(stage="saving", parameters={"dtype": dtype}, inputs=inputs, output=folder / "output", seed=0)
        return dict(saving.main(open_job(folder, job)))

    def answer(self, requests: Path | list[dict[str, Any]], **model: Any) -> list[dict[str, Any]]:
        """The predictions for requests, a file or themselves, by `model`, or by `adapter` on the base model."""
        folder = self.folder()
        if not isinstance(requests, Path):
            folder.mkdir()
            text = "".join(json.dumps(each) + "\n" for each in requests)
            requests = folder / "requests.jsonl"
            requests.write_text(text, encoding="utf-8")
        generation = {name: model.pop(name, value) for name, value in GENERATION.items()}
        base = {"base_model": str(self.data / "base_model")} if "adapter" in model else {}
        job = StageJob(
            stage="inference-customized" if base else "inference-complete",
            parameters={**generation, "dtype": "float32"},
            inputs={"requests": str(requests), **base, **{name: str(path) for name, path in model.items()}},
            output=folder / "output",
            seed=0,
        )
        stage = inference_customized if base else inference_complete
        result = stage.main(open_job(folder, job))
        lines = Path(str(result["predictions"])).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def ids_of(renderer: Renderer, conversation: list[dict[str, Any]]) -> list[int]:
    """Token ids of a whole conversation, images included."""
    ids: list[int] = renderer.encode([conversation], prompt=False)["input_ids"][0].tolist()
    return ids


def stored_rows(data: Path, name: str = "train_rows.jsonl") -> list[dict[str, Any]]:
    """The stored rows of a file of the bench, images as absolute paths."""
    lines = (data / name).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "images": [str(data / image) for image in row["images"]]} for row in rows]
