"""Makes pictures with a diffusers pipeline: a base model, one with a LoRA on top of it, or a complete one."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from methods import contract
from methods.image_generation.configuration import LORA_WEIGHTS, picture_size
from methods.toolkit import hardware

INDEX = "model_index.json"
SETTINGS = "pictures.json"
PROBES = "probes.json"
FAMILIES = {
    "sdxl": ("StableDiffusionXLPipeline", "unet"),
    "sd3": ("StableDiffusion3Pipeline", "transformer"),
    "flux": ("FluxPipeline", "transformer"),
}
"""The pipeline of each family, and the part of it that is trained."""

_SIZE = re.compile(r"(\d{1,5})[x:](\d{1,5})")
_MULTIPLE = 16  # sides are multiples of this: all families can make such pictures
_MOST_PIXELS = 2048 * 2048
_MOST_STEPS = 500
_ADAPTER_METADATA = "lora_adapter_metadata"  # as diffusers.loaders.lora_base calls it


@dataclass(frozen=True)
class Settings:
    """How a picture is made; sizes in pixels."""

    width: int = 1024
    height: int = 1024
    steps: int = 28
    guidance: float = 5.0
    negative_prompt: str = ""


@dataclass(frozen=True)
class Order:
    """One picture to make."""

    caption: str
    seed: int
    settings: Settings


def settings_of(parameters: dict[str, Any]) -> Settings:
    """How a trained model makes pictures unless asked otherwise: as the samples of its training were made."""
    width, height = _sides(picture_size(parameters))
    return Settings(
        width=width,
        height=height,
        steps=parameters["validation_steps"],
        guidance=parameters["validation_guidance"],
        negative_prompt=parameters["validation_negative_prompt"],
    )


def save_settings(folder: Path, settings: Settings, caption: str) -> None:
    """Store beside a model how it makes pictures, and a caption that later stages prove themselves with."""
    contract.write_json(folder / SETTINGS, asdict(settings))
    contract.write_json(folder / PROBES, {"probes": [{"request": {"caption": caption}}]})


def read_settings(folder: str) -> Settings:
    """How a model makes pictures; the usual way for one that was not trained here."""
    path = Path(folder) / SETTINGS
    return Settings(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Settings()


def order_of(request: dict[str, Any], usual: Settings, seed: int) -> Order:
    """What is asked for: a `caption`, and where they differ from the usual `seed`, `steps`, `guidance`,
    `negative_prompt`, and `size` (such as 1152x648) or `aspect_ratio` (such as 16:9, with as many pixels as usual).

    Raises Refused for values that cannot be.
    """
    caption = request.get("caption")
    if not isinstance(caption, str):
        raise contract.Refused(f"a request holds a caption, not {caption!r}")
    width, height = usual.width, usual.height
    if request.get("size") not in (None, "auto"):
        width, height = _sides(request["size"])
    elif request.get("aspect_ratio") is not None:
        across, down = _sides(request["aspect_ratio"])
        scale = math.sqrt(width * height / (across * down))
        width, height = _rounded(across * scale), _rounded(down * scale)
    if width * height > _MOST_PIXELS:
        raise contract.Refused(f"a picture of {width} x {height} is too large: at most {_MOST_PIXELS:,} pixels")
    settings = replace(
        usual,
        width=width,
        height=height,
        steps=int(_number(request, "steps", usual.steps, 1, _MOST_STEPS)),
        guidance=_number(request, "guidance", usual.guidance, 0, 100),
        negative_prompt=str(request.get("negative_prompt", usual.negative_prompt)),
    )
    return Order(caption, int(_number(request, "seed", seed, 0, 2**32 - 1)), settings)


def _number(request: dict[str, Any], name: str, usual: float, low: float, high: float) -> float:
    value = request.get(name)
    value = usual if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise contract.Refused(f"{name} is a number from {low} to {high}, not {value!r}")
    return value


def _sides(text: Any) -> tuple[int, int]:
    found = _SIZE.fullmatch(str(text))
    if found is None or 0 in (int(found[1]), int(found[2])):
        raise contract.Refused(f"{text!r} is no size or aspect ratio: 1152x648, or 16:9")
    return int(found[1]), int(found[2])


def _rounded(side: float) -> int:
    return max(_MULTIPLE, round(side / _MULTIPLE) * _MULTIPLE)


def require_family(base: Path, family: str) -> None:
    """Raise Refused if the folder is no pipeline of the family."""
    found = pipeline_class(base)
    expected = FAMILIES[family][0]
    if found != expected:
        fitting = [name for name, (pipeline, _) in FAMILIES.items() if pipeline == found]
        mend = f"set model_family to {fitting[0]}" if fitting else f"known families: {', '.join(FAMILIES)}"
        raise contract.Refused(f"{base} is a {found}, and a model of the family {family} is a {expected}: {mend}")


def pipeline_class(folder: Path) -> str:
    """The class of the pipeline of a folder. Raises Refused if it holds none."""
    index = folder / INDEX
    if not index.is_file():
        raise contract.Refused(f"{folder} holds no {INDEX}, so it is no model that makes images")
    return str(json.loads(index.read_text(encoding="utf-8")).get("_class_name"))


def trained_part(folder: Path) -> str:
    """The part of a pipeline that is trained: the folder in it. Raises Refused for a family that is not known."""
    found = pipeline_class(folder)
    parts = [part for pipeline, part in FAMILIES.values() if pipeline == found]
    if not parts:
        raise contract.Refused(f"{folder} is a {found}: known are {', '.join(name for name, _ in FAMILIES.values())}")
    return parts[0]


def on_gpu() -> bool:
    """Whether there is one to train on."""
    import torch

    return bool(torch.cuda.is_available())


def training_dtype(name: str) -> str:
    """The number type of a `dtype` parameter, on the GPU where there is one, else on the processor."""
    return hardware.resolve_dtype(name)


def keep_lora(trained: Path, kept: Path, part: str, rank: int, alpha: float) -> None:
    """Copy the weights of a LoRA on `part`, saying its rank and alpha as diffusers does.

    SimpleTuner says them in the files of its checkpoints, and not in the one at the end: whoever loads that takes
    alpha for the rank, and a LoRA that was trained with an alpha of twice its rank paints at half its strength.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    weights = load_file(trained)
    modules = sorted({name.removeprefix(f"{part}.").rsplit(".lora_", 1)[0] for name in weights})
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    with safe_open(trained, framework="pt") as file:
        said = file.metadata() or {}
    told = json.dumps({f"{part}.{name}": value for name, value in settings.items()})
    save_file(weights, kept, {**said, _ADAPTER_METADATA: told})


def load_pipeline(base: str, adapter: str | None, dtype: str, device: str = "auto") -> Any:
    """Load a pipeline, with a LoRA on top of it if one is given, on the GPU where there is one. Raises Refused."""
    import torch
    from diffusers import DiffusionPipeline

    trained_part(Path(base))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            base, torch_dtype=getattr(torch, training_dtype(dtype)), use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise contract.Refused(f"cannot load {base} as a pipeline: {error}") from error
    if adapter is not None:
        pipeline.load_lora_weights(adapter, weight_name=LORA_WEIGHTS, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def paint(pipeline: Any, order: Order) -> Any:
    """The picture (PIL) of an order; the same order on the same kind of device makes the same picture."""
    import torch

    s = order.settings
    negative = {"negative_prompt": s.negative_prompt} if s.negative_prompt else {}
    if negative and type(pipeline).__name__ == FAMILIES["flux"][0]:
        raise contract.Refused("a Flux model takes no negative prompt")
    made = pipeline(
        prompt=order.caption,
        width=s.width,
        height=s.height,
        num_inference_steps=s.steps,
        guidance_scale=s.guidance,
        generator=torch.Generator("cpu").manual_seed(order.seed),
        **negative,
    )
    return made.images[0]
