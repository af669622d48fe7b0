"""The image-generation method around SimpleTuner, which is not here: what it is told, and how it is followed.

The real one trains in test_image_generation_training.py.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from configs.settings import PROJECT_ROOT
from methods import contract
from methods.image_generation import answering, configuration, deploying, engine, pictures, training
from methods.image_generation.pictures import Order, Settings
from tasks.stages import EventTail, StageJob
from tests.methods.image_bench import METHOD, PROGRAM, image_job, opened, parameters, told
from tests.methods.stage_jobs import curve, wait_for

SHAPES = PROJECT_ROOT / "configs" / "samples" / "shapes"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a pipeline, as far as it is looked at here."""
    folder = tmp_path / "base_model"
    (folder / "unet").mkdir(parents=True)
    (folder / "vae").mkdir()
    (folder / pictures.INDEX).write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    (folder / "unet" / "weights").write_text("base")
    (folder / "vae" / "weights").write_text("base")
    return folder


def write_rows(file: Path, count: int) -> Path:
    """Stored rows of the sample images, which lie in a folder of their own."""
    lines = (SHAPES / "captions.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [{"line": number, **json.loads(line)} for number, line in enumerate(lines, start=1)]
    for row in rows:
        row["image"] = str(SHAPES / row["image"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 6)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A program in SimpleTuner's place; what is put into the dictionary changes how it behaves."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM, encoding="utf-8")
    how: dict[str, Any] = {}
    monkeypatch.setattr(training, "training_program", lambda: [sys.executable, str(file), json.dumps(how)])
    monkeypatch.setattr(engine, "_POLL_SECONDS", 0.02)
    return how


def train(folder: Path, base: Path, rows: Path, **given: Any) -> dict[str, Any]:
    return dict(training.main(opened(folder, image_job(folder, base, rows, **given))))


def artifacts(folder: Path) -> list[str]:
    events = EventTail(folder / contract.EVENTS_FILE).read()
    return [Path(event["path"]).name for event in events if event["type"] == "artifact"]


# --- what SimpleTuner is told ---------------------------------------------------------------------------------------

# Each parameter, another value than its default, and what of the two files it changes, with the value there.
TOLD: dict[str, tuple[Any, dict[str, Any]]] = {
    "tuning": ("full", {"model_type": "full"}),
    "lora_rank": (3, {"lora_rank": 3}),
    "lora_alpha": (5, {"lora_alpha": 5}),
    "lora_dropout": (0.4, {"lora_dropout": 0.4}),
    "num_generations": (3, {"num_validation_images": 3}),
    "max_grad_norm": (0.7, {"max_grad_norm": 0.7, "grad_clip_method": "norm"}),
    "epochs": (3, {"max_train_steps": 18}),
    "max_steps": (5, {"max_train_steps": 5}),
    "batch_size": (2, {"train_batch_size": 2, "max_train_steps": 3}),
    "grad_accum_steps": (3, {"gradient_accumulation_steps": 3, "max_train_steps": 2}),
    "learning_rate": (3e-4, {"learning_rate": 3e-4}),
    "lr_scheduler": ("linear", {"lr_power": 1.0}),
    "lr_decay_ratio": (0.5, {"lr_end": 5e-5}),
    "warmup_steps": (4, {"lr_warmup_steps": 4}),
    "warmup_ratio": (0.5, {"lr_warmup_steps": 3}),
    "weight_decay": (0.3, {"optimizer_config": "weight_decay=0.3"}),
    "optimizer": ("sgd", {"optimizer": "torch-sgd"}),
    "checkpoint_steps": (7, {"checkpoint_step_interval": 7}),
    "keep_checkpoints": (3, {"checkpoints_total_limit": 4}),
    "evaluation_steps": (4, {"validation_step_interval": 4, "eval_steps_interval": 4}),
    "gradient_checkpointing": (False, {"gradient_checkpointing": False}),
    "seed": (5, {"seed": 5, "validation_seed": 5}),
    "dtype": ("bfloat16", {"mixed_precision": "bf16", "base_model_default_dtype": "bf16", "optimizer": "adamw_bf16"}),
    "resolution": (512, {"resolution": 512, "validation_resolution": "512x512", "images.resolution": 512}),
    "crop": ("center", {"images.crop": True, "images.crop_style": "center", "images.crop_aspect": "square"}),
    "minimum_image_size": (32, {"minimum_image_size": 32, "images.minimum_image_size": 32}),
    "repeats": (10, {"images.repeats": 9, "max_train_steps": 60}),
    "caption_dropout": (0.2, {"caption_dropout_probability": 0.2}),
    "ema_decay": (0.9, {"ema_decay": 0.9}),
    "validation_prompt": ("a boat", {"validation_prompt": "a boat"}),
    "validation_negative_prompt": ("fog", {"validation_negative_prompt": "fog"}),
    "validation_steps": (7, {"validation_num_inference_steps": 7}),
    "validation_guidance": (2.5, {"validation_guidance": 2.5}),
    "validation_resolution": ("96x64", {"validation_resolution": "96x64"}),
}
ELSEWHERE = {
    "max_samples",  # how many images are copied
    "logging_steps",  # which of SimpleTuner's points become ours
    "use_ema",  # with full tuning only
    "model_family",  # what the base model has to be
}


def files_of(base: Path, rows: Path, folder: Path, **given: Any) -> dict[str, Any]:
    """Both files as one: the data's entries by their id."""
    job = opened(folder, image_job(folder, base, rows, validation=rows, **given))
    place = configuration.Place(folder / "work", job.checkpoints, base)
    found = training.prepare_data(job, place)
    training.build_trainer(job, place, found)
    data = json.loads((folder / "work" / configuration.DATA).read_text())
    return told(folder) | {f"{entry['id']}.{name}": value for entry in data for name, value in entry.items()}


def test_every_parameter_is_accounted_for() -> None:
    assert TOLD.keys() | ELSEWHERE == {*METHOD.hyperparameter_names, *METHOD.parameters}


@pytest.mark.parametrize("name", TOLD)
def test_every_parameter_is_told_to_simpletuner(
    name: str, base: Path, rows: Path, tmp_path: Path, program: dict[str, Any]
) -> None:
    value, expected = TOLD[name]
    usual = files_of(base, rows, tmp_path / "usual")
    other = files_of(base, rows, tmp_path / "other", **{name: value})
    assert {key: other.get(key) for key in expected} == expected
    assert all(usual.get(key) != other.get(key) for key in expected if key != "grad_clip_method")


def test_what_is_not_told_is_done(base: Path, rows: Path, tmp_path: Path, program: dict[str, Any]) -> None:
    assert files_of(base, rows, tmp_path / "few", max_samples=2)["max_train_steps"] == 2
    assert len(list((tmp_path / "few" / "work" / "images").glob("*.png"))) == 2
    assert files_of(base, rows, tmp_path / "ema", use_ema=True, tuning="full")["use_ema"] is True
    with pytest.raises(contract.Refused, match="average of whole weights only"):
        train(tmp_path / "lora", base, rows, use_ema=True)
    with pytest.raises(contract.Refused, match="set model_family to sdxl"):
        train(tmp_path / "flux", base, rows, model_family="flux")
    train(tmp_path / "thin", base, rows, max_steps=7, logging_steps=3)
    assert curve(tmp_path / "thin", "loss") == {
        1: [1.0],
        3: [pytest.approx((1 / 2 + 1 / 3) / 2)],
        6: [pytest.approx((1 / 4 + 1 / 5 + 1 / 6) / 3)],
        7: [pytest.approx(1 / 7)],
    }


def test_nothing_is_looked_for_on_the_hub_and_nothing_is_written_beside_the_dataset(
    base: Path, rows: Path, tmp_path: Path, program: dict[str, Any]
) -> None:
    found = files_of(base, rows, tmp_path / "job")
    assert found["pretrained_model_name_or_path"] == found["pretrained_vae_model_name_or_path"] == str(base)
    inside = [found["cache_dir"], found["data_backend_config"], found["output_dir"], found["logging_dir"]]
    inside += [value for name, value in found.items() if name.endswith(("_dir", "cache_dir_vae"))]
    assert all(Path(path).is_relative_to(tmp_path / "job") for path in inside)
    images = sorted((tmp_path / "job" / "work" / "images").iterdir())
    assert [path.name for path in images[:2]] == ["000000.png", "000000.txt"]
    first = json.loads(rows.read_text().splitlines()[0])
    assert images[1].read_text() == first["caption"] == found["validation_prompt"]
    assert images[0].read_bytes() == Path(first["image"]).read_bytes()


def test_a_gpu_is_told_otherwise_than_a_cpu(base: Path, tmp_path: Path) -> None:
    place = configuration.Place(tmp_path, tmp_path, base)
    data = [
        configuration.data_configuration(place, parameters(), validation=True, on_gpu=on_gpu)
        for on_gpu in (True, False)
    ]
    assert ["vae_cache_ondemand" in entry for entry in data[0]] == [False, False, False]
    assert ["vae_cache_ondemand" in entry for entry in data[1]] == [True, True, False]
    alone = configuration.data_configuration(place, parameters(), validation=False, on_gpu=True)
    assert [entry["dataset_type"] for entry in alone] == ["image", "text_embeds"]
    quiet = configuration.training_configuration(
        place, parameters(dtype="float32"), 6, "a", validation=False, resume="checkpoint-4"
    )
    assert "eval_steps_interval" not in quiet
    assert quiet["resume_from_checkpoint"] == "checkpoint-4"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"lr_scheduler": "polynomial", "lr_power": 2.0, "lr_end": 0.0}),
        ({"lr_scheduler": "linear"}, {"lr_scheduler": "polynomial", "lr_power": 1.0, "lr_end": 0.0}),
        ({"lr_scheduler": "constant"}, {"lr_scheduler": "constant"}),
        ({"lr_scheduler": "constant_with_warmup"}, {"lr_scheduler": "constant_with_warmup"}),
        ({"lr_decay_ratio": 1}, {"lr_scheduler": "constant_with_warmup"}),
    ],
)
def test_the_schedule_ends_where_it_is_to(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = configuration.schedule(parameters(**given), 100)
    assert found.pop("lr_warmup_steps") == 3
    assert found == expected


def test_a_batch_that_is_never_whole_is_refused(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(contract.Refused, match=r"6 images, 1 times each, are no whole batch of 4 × 2.*raise repeats"):
        train(tmp_path / "job", base, rows, batch_size=4, grad_accum_steps=2)


# --- how it is followed ---------------------------------------------------------------------------------------------


def test_curves_pictures_and_checkpoints_are_told_and_the_adapter_is_kept(
    base: Path, rows: Path, tmp_path: Path, program: dict[str, Any]
) -> None:
    folder = tmp_path / "job"
    result = train(folder, base, rows, max_steps=7, checkpoint_steps=2, keep_checkpoints=2, evaluation_steps=3)
    assert {name: result[name] for name in ("model", "adapter", "steps")} == {
        "model": str(folder / "output"),
        "adapter": True,
        "steps": 7,
    }
    assert result["loss"] == pytest.approx(sum(1 / step for step in range(1, 8)) / 7)
    assert curve(folder, "loss") == {step: [pytest.approx(1 / step)] for step in range(1, 8)}
    assert curve(folder, "grad_norm").keys() == curve(folder, "learning_rate").keys() == set(range(1, 8))
    assert not curve(folder, "seconds_per_step")
    progress = [event for event in EventTail(folder / contract.EVENTS_FILE).read() if event["type"] == "progress"]
    assert [(event["step"], event["total"]) for event in progress] == [(step, 7) for step in range(1, 8)]
    assert [path.name for path in contract.complete_checkpoints(job_checkpoints(folder))] == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert {"step_3.png", "step_6.png", "simpletuner_config.json"} <= set(artifacts(folder))
    assert all((folder / "samples" / name).is_file() for name in ("step_3.png", "step_6.png"))
    assert sorted(path.name for path in (folder / "output").iterdir()) == [
        "pictures.json",
        "probes.json",
        "pytorch_lora_weights.safetensors",
    ]


def job_checkpoints(folder: Path) -> Path:
    return folder / "checkpoints"


def cancel_after_three_steps(folder: Path, job: contract.Job) -> None:
    """Train until the third step is told; then it is to stop."""

    def cancel() -> None:
        wait_for(lambda: 3 in curve(folder, "loss"), 20)
        job.cancelled = True

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(contract.Cancelled):
        training.main(job)
    canceller.join()


def test_a_cancelled_train_has_a_checkpoint_saved_and_goes_on_from_it(
    base: Path, rows: Path, tmp_path: Path, program: dict[str, Any]
) -> None:
    program["seconds"] = 0.05
    folder = tmp_path / "job"
    given: dict[str, Any] = {"max_steps": 60, "checkpoint_steps": 1000}
    job = opened(folder, image_job(folder, base, rows, **given))
    cancel_after_three_steps(folder, job)
    (newest,) = contract.complete_checkpoints(job_checkpoints(folder))
    step = int(newest.name.removeprefix("checkpoint-"))
    assert 3 <= step < 60
    program["seconds"] = 0
    assert train(folder, base, rows, resume=newest, **given)["steps"] == 60
    assert told(folder)["resume_from_checkpoint"] == newest.name
    losses = curve(folder, "loss")
    assert set(losses) == set(range(1, 61))
    assert all(len(values) == 1 for at, values in losses.items() if at > step + 1)


def test_a_program_that_trains_on_after_sigint_is_ended(
    base: Path, rows: Path, tmp_path: Path, program: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_SIGINT_SECONDS", 0.2)
    program |= {"seconds": 0.05, "deaf": True}
    folder = tmp_path / "job"
    job = opened(folder, image_job(folder, base, rows, max_steps=10**6, checkpoint_steps=10**6))
    cancel_after_three_steps(folder, job)
    assert len(contract.complete_checkpoints(job_checkpoints(folder))) == 1


def test_a_train_whose_folder_was_moved_goes_on_with_its_images(
    base: Path, rows: Path, tmp_path: Path, program: dict[str, Any]
) -> None:
    """SimpleTuner's checkpoint names its images by their absolute paths, and refuses others."""
    train(tmp_path / "before", base, rows, max_steps=4, checkpoint_steps=2)
    moved = tmp_path / "after"
    shutil.copytree(job_checkpoints(tmp_path / "before") / "checkpoint-2", job_checkpoints(moved) / "checkpoint-2")
    resume = job_checkpoints(moved) / "checkpoint-2"
    train(moved, base, rows, max_steps=4, checkpoint_steps=1000, resume=resume)
    told_of = json.loads((resume / configuration.SAMPLER).read_text())["aspect_ratio_bucket_indices"]["1.0"]
    assert len(told_of) == 6
    assert all(Path(path).parent == moved / "work" / "images" and Path(path).is_file() for path in told_of)


def test_a_train_that_is_cancelled_before_its_first_step_ends_at_once(
    base: Path, rows: Path, tmp_path: Path, program: dict[str, Any]
) -> None:
    folder = tmp_path / "job"
    job = opened(folder, image_job(folder, base, rows, max_steps=10**6))
    job.cancelled = True
    program["seconds"] = 10
    with pytest.raises(contract.Cancelled):
        training.main(job)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"die_at": 2}, RuntimeError, "exit code -9 and the status running"),
        ({"code": 1}, RuntimeError, "exit code 1"),
        ({"status": "running"}, RuntimeError, "exit code 0 and the status running"),  # as after SIGINT
        ({"no_weights": True}, RuntimeError, "has left no pytorch_lora_weights"),
        ({"diverges": True}, contract.Refused, "the loss became nan"),
    ],
)
def test_what_is_no_success_is_none(
    how: dict[str, Any],
    error: type[Exception],
    said: str,
    base: Path,
    rows: Path,
    tmp_path: Path,
    program: dict[str, Any],
) -> None:
    program |= how
    with pytest.raises(error, match=said):
        train(tmp_path / "job", base, rows, max_steps=4)


@pytest.mark.parametrize(("given", "alpha"), [({"lora_rank": 4, "lora_alpha": 12}, 12), ({"lora_rank": 4}, 8)])
def test_the_kept_lora_says_how_strong_it_is(
    given: dict[str, Any], alpha: float, base: Path, rows: Path, program: dict[str, Any], tmp_path: Path
) -> None:
    """As diffusers reads it; SimpleTuner does not say it in the file that it leaves at the end."""
    train(tmp_path / "t", base, rows, max_steps=2, **given)
    with safe_open(tmp_path / "t" / "output" / configuration.LORA_WEIGHTS, framework="numpy") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        assert len(file.keys()) == 4
    assert said == {"unet.r": 4, "unet.lora_alpha": alpha, "unet.target_modules": ["mid.to_k", "mid.to_out.0"]}


def test_weights_and_words_of_an_earlier_attempt_are_not_taken_for_this_ones(
    base: Path, rows: Path, tmp_path: Path, program: dict[str, Any]
) -> None:
    folder = tmp_path / "job"
    train(folder, base, rows, max_steps=4)
    program["no_weights"] = True
    with pytest.raises(RuntimeError, match="has left no"):
        train(folder, base, rows, max_steps=4)


def test_a_half_written_checkpoint_is_removed_and_never_marked(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-4-tmp").mkdir()
    (tmp_path / "checkpoint-4-tmp" / ".guard").write_text("")
    engine.keep_whole_checkpoints(tmp_path, 5)
    assert contract.complete_checkpoints(tmp_path) == []
    (tmp_path / "checkpoint-2" / ".guard").write_text("")
    engine.keep_whole_checkpoints(tmp_path, 5)
    assert [path.name for path in contract.complete_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_torn_line_of_the_metrics_waits_for_its_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = engine.MetricsTail(file)
    assert tail.read() == []
    file.write_text('{"step": 1, "metrics": {"train_loss": 0.5, "note": "x", "flag": true}}\n{"step": 2, "met')
    assert tail.read() == [(1, {"train_loss": 0.5})]
    with file.open("a") as more:
        more.write('rics": {"train_loss": 0.25}}\n')
    assert tail.read() == [(2, {"train_loss": 0.25})]
    whole = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(whole)
    assert engine.whole_picture(whole)
    whole.write_bytes(whole.read_bytes()[:-3])
    assert not engine.whole_picture(whole)


def test_full_tuning_keeps_the_whole_pipeline_with_the_trained_part(
    base: Path, rows: Path, tmp_path: Path, program: dict[str, Any]
) -> None:
    folder = tmp_path / "job"
    trained = folder / "checkpoints" / "pipeline" / "unet"
    trained.mkdir(parents=True)
    (trained / "weights").write_text("trained")
    result = train(folder, base, rows, tuning="full", max_steps=2)
    assert result["adapter"] is False
    assert (folder / "output" / "unet" / "weights").read_text() == "trained"
    assert (folder / "output" / "vae" / "weights").read_text() == "base"
    assert (folder / "output" / pictures.INDEX).is_file()


# --- pictures -------------------------------------------------------------------------------------------------------


class Pipeline:
    """Paints the colour of the seed."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **asked: Any) -> Any:
        self.asked.append(asked)
        seed = asked["generator"].initial_seed()
        picture = Image.new("RGB", (asked["width"], asked["height"]), (seed % 256, 100, 50))
        return type("Made", (), {"images": [picture]})


def test_a_request_says_what_differs_from_the_model_s_usual_way() -> None:
    usual = Settings(width=64, height=64, steps=7, guidance=2.0, negative_prompt="fog")
    assert pictures.order_of({"caption": "a"}, usual, 5) == Order("a", 5, usual)
    asked = {"caption": "a", "seed": 9, "steps": 3, "guidance": 0, "negative_prompt": "", "size": "96x48"}
    assert pictures.order_of(asked, usual, 5) == Order("a", 9, Settings(96, 48, 3, 0, ""))
    for ratio, size in {"1:1": (64, 64), "16:9": (80, 48), "9:16": (48, 80), "2:1": (96, 48)}.items():
        found = pictures.order_of({"caption": "a", "aspect_ratio": ratio}, usual, 5).settings
        assert (found.width, found.height) == size
    wide = pictures.order_of({"caption": "a", "aspect_ratio": "16:9"}, Settings(), 5).settings
    assert (wide.width, wide.height) == (1360, 768)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({}, "holds a caption"),
        ({"caption": 5}, "holds a caption"),
        ({"caption": "a", "steps": 0}, "steps is a number from 1"),
        ({"caption": "a", "steps": True}, "steps is a number"),
        ({"caption": "a", "seed": -1}, "seed is a number from 0"),
        ({"caption": "a", "size": "wide"}, "no size or aspect ratio"),
        ({"caption": "a", "size": "0x64"}, "no size or aspect ratio"),
        ({"caption": "a", "size": "9000x9000"}, "too large"),
        ({"caption": "a", "guidance": "much"}, "guidance is a number"),
    ],
)
def test_a_request_that_cannot_be_is_refused(request_: dict[str, Any], said: str) -> None:
    with pytest.raises(contract.Refused, match=said):
        pictures.order_of(request_, Settings(), 1)


def inference_job(folder: Path, **inputs: Any) -> contract.Job:
    from tasks.stages import StageJob

    job = StageJob(
        stage="inference-complete",
        parameters={"dtype": "auto"},
        inputs={name: str(value) for name, value in inputs.items()},
        output=folder / "output",
        seed=3,
    )
    return opened(folder, job)


def test_requests_become_pictures_and_rows_become_distances(rows: Path, tmp_path: Path) -> None:
    usual = Settings(width=64, height=64, steps=2)
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"caption": "a"}\n{"caption": "b", "seed": 200, "size": "32x16"}\n')
    pipeline = Pipeline()
    result = answering.answer(inference_job(tmp_path / "asked", requests=requests), pipeline, usual)
    lines = Path(str(result["predictions"])).read_text().splitlines()
    first, second = [json.loads(line) for line in lines]
    assert (first["seed"], second["seed"]) == (3, 200)
    with Image.open(second["image"]) as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((32, 16), (200, 100, 50))
    assert [asked["prompt"] for asked in pipeline.asked] == ["a", "b"]

    measured = answering.answer(inference_job(tmp_path / "measured", evaluation_rows=rows), pipeline, usual)
    colours = []
    for number, line in enumerate(rows.read_text().splitlines()):
        with Image.open(json.loads(line)["image"]) as opened_:
            real = np.asarray(opened_.convert("RGB")).mean((0, 1))
        colours.append(np.linalg.norm(real - [3 + number, 100, 50]))
    figures = measured["figures"]
    assert isinstance(figures, dict)
    assert figures["colour_distance"] == pytest.approx(np.mean(colours))
    assert figures["histogram_distance"] == pytest.approx(1, abs=0.01)  # no pixel of such a colour is in the images
    assert measured["rows"] == 6


def test_the_same_image_has_no_distance(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (3, 100, 50)).save(tmp_path / "same.png")
    (tmp_path / "rows.jsonl").write_text('{"line": 1, "image": "same.png", "caption": "a"}\n')
    job = inference_job(tmp_path / "job", evaluation_rows=tmp_path / "rows.jsonl")
    assert answering.answer(job, Pipeline(), Settings(64, 64, 1))["figures"] == {
        "colour_distance": 0,
        "histogram_distance": 0,
    }
    job.cancelled = True
    with pytest.raises(contract.Cancelled):
        answering.answer(job, Pipeline(), Settings(64, 64, 1))


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a deploying stage whose model makes pictures of one colour."""
    monkeypatch.setattr(pictures, "load_pipeline", lambda *_: Pipeline())
    monkeypatch.setattr(pictures, "read_settings", lambda _: Settings(64, 64, 2))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inputs = {"name": "shapes", "host": "127.0.0.1", "port": port, "model": "made"}
    given = {"dtype": "auto", "device": "auto"}
    stage = StageJob(stage="deploying", parameters=given, inputs=inputs, output=tmp_path / "output", seed=0)
    job = opened(tmp_path, stage)
    thread = threading.Thread(target=deploying.main, args=(job,))
    thread.start()
    try:
        assert wait_for(lambda: listens(port), 10)
        yield f"http://127.0.0.1:{port}"
    finally:
        job.cancelled = True
        thread.join()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_endpoint_paints_as_openai_s_interface_asks(address: str) -> None:
    assert httpx.get(f"{address}/health").status_code == 200
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "shapes"
    url = f"{address}/v1/images/generations"
    asked = {
        "model": "shapes",
        "prompt": "a boat",
        "n": 2,
        "size": "32x16",
        "seed": 7,
        "response_format": "b64_json",
    }
    data = httpx.post(url, json=asked).json()["data"]
    found = [Image.open(BytesIO(base64.b64decode(each["b64_json"]))) for each in data]
    assert [(picture.size, picture.getpixel((0, 0))) for picture in found] == [
        ((32, 16), (7, 100, 50)),
        ((32, 16), (8, 100, 50)),
    ]
    for wrong in (
        {},
        {"prompt": "a", "n": 0},
        {"prompt": "a", "response_format": "url"},
        {"prompt": "a", "steps": -1},
    ):
        answer = httpx.post(url, json=wrong)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.post(url, content=b"{").status_code == 400
    assert httpx.post(url, content=b"[]").status_code == 400
    assert httpx.post(f"{address}/v1/chat/completions", json={}).status_code == 404
    assert httpx.post(url, content=b" " * 2_000_000).status_code == 413


def test_a_base_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(contract.Refused, match=r"holds no model_index\.json"):
        pictures.trained_part(tmp_path)
    (tmp_path / pictures.INDEX).write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(contract.Refused, match="known are StableDiffusionXLPipeline"):
        pictures.trained_part(tmp_path)
    with pytest.raises(contract.Refused, match="known families: sdxl, sd3, flux"):
        pictures.require_family(tmp_path, "sdxl")
