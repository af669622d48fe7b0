"""Makes a self-contained model of base and adapter, and proves that it is one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from methods import contract
from methods.contract import Refused
from methods.toolkit import models, probing, remote_code

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Greatest allowed difference of logits, relative to their largest value, by the dtype the weights are saved in:
a few thousand roundings of half a unit in the last place (2^-24, 2^-9, 2^-12) add up to less in every model tried."""


@dataclass(frozen=True)
class Verification:
    """How far apart the outputs of the probe prompts are (largest absolute difference; `scale`: largest output).

    The outputs are the logits of every token, or the scores of a reward model.
    """

    merged_to_reference: float
    merged_to_base: float
    reference_to_base: float
    scale: float
    tolerance: float
    tokens: int

    def as_dict(self) -> dict[str, float]:
        """All figures by name."""
        return asdict(self)

    def in_words(self, outputs: str) -> str:
        """The figures that decide, for the log; `outputs` says what was compared."""
        return (
            f"{outputs}: merged to trained {self.merged_to_reference:.3g} (allowed {self.tolerance:.3g}), "
            f"merged to base {self.merged_to_base:.3g}"
        )


def save_and_prove(
    job: contract.Job,
    save: Callable[[contract.Job, str], None],
    prove: Callable[[contract.Job, str], Verification],
    outputs: str,
    base: str | None = None,
) -> dict[str, object]:
    """Save the complete model of a train and prove it; returns the result of a saving stage. Raises Refused.

    `save` writes it and `prove` compares it, each in the dtype it is given; `outputs` says by what. `base` is the
    folder of the base model's weights, where that is not the base model's own.
    """
    dtype = saving_dtype(base or job.inputs["base_model"], job.parameters["dtype"])
    job.phase("merging" if job.inputs["adapter"] else "saving")
    save(job, dtype)
    job.phase("verifying")
    verification = prove(job, dtype)
    print(verification.in_words(outputs), flush=True)
    return {"model": str(job.output), "dtype": dtype, "verification": verification.as_dict()}


def saving_dtype(base: str, wanted: str) -> str:
    """The dtype complete weights are saved in: the one asked for, or with `auto` the base model's own."""
    from transformers import AutoConfig

    if wanted != "auto":
        return wanted
    own = AutoConfig.from_pretrained(base, **remote_code.loading(base)).dtype
    return str(own or torch.float32).removeprefix("torch.")


def merge(base: str, adapter: str, output: Path, dtype: str) -> None:
    """Save base and adapter as one causal language model, safetensors in `dtype`."""
    save_weights(merged(base, adapter), output, dtype)


def merged(base: str, adapter: str, load: models.Load = models.load_model) -> Any:
    """Load the base unquantised and add the adapter to its weights.

    Never into a quantised base: rounding the sum to 4 bits would lose the fine-tune (peft issue 2321).
    """
    model = models.load_with_adapter(base, adapter, "float32", load)
    untie_adapted(model)
    return model.merge_and_unload(safe_merge=True)


def untie_adapted(model: Any) -> None:
    """Give the output head weights of its own where an adapter changes the input embeddings that it shares.

    Else the merge would change both. The saved model is larger by one table of embeddings.
    """
    base = model.get_base_model()
    head = base.get_output_embeddings()
    if head is None or not isinstance(base.get_input_embeddings(), BaseTunerLayer):
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def save_weights(model: Any, output: Path, dtype: str) -> None:
    """Save a whole model as safetensors in `dtype`, its configuration saying so."""
    model = model.to(getattr(torch, dtype))
    text = model.config.get_text_config()
    text.use_cache = True
    if hasattr(text, "output_router_logits"):
        text.output_router_logits = False  # training switches it on, for the loss that balances experts
    model.save_pretrained(output, max_shard_size="5GB")


def verify(
    base: str, adapter: str | None, trained: str | None, saved: Path, prompts: list[list[int]], dtype: str
) -> Verification:
    """Prove that the saved model is what was trained, and is not the base.

    The reference is base + adapter, or for full-parameter training the folder `trained`.
    """
    return compare(
        lambda: models.load_with_adapter(trained or base, adapter, "float32"),
        lambda: models.load_with_adapter(str(saved), None, "float32"),
        lambda: models.load_with_adapter(base, None, "float32"),
        prompts,
        dtype,
    )


def prompt_inputs(prompt: list[int]) -> dict[str, torch.Tensor]:
    """Token ids as a model takes them."""
    return {"input_ids": torch.tensor([prompt])}


def compare(
    load_reference: Callable[[], Any],
    load_saved: Callable[[], Any],
    load_base: Callable[[], Any],
    prompts: list[Any],
    dtype: str,
    inputs: Callable[[Any], Mapping[str, Any]] = prompt_inputs,
) -> Verification:
    """Prove by their outputs that the saved model is the reference, and is not the base.

    Each model is loaded on its own, in float32; `inputs` makes the tensors of a prompt. Raises Refused with the figures
    if the saved one differs from the reference by more than its dtype explains, or if it is nearer to the base than to
    the reference.
    """
    asked = [inputs(prompt) for prompt in prompts]
    reference, saved, untouched = (_outputs(load, asked) for load in (load_reference, load_saved, load_base))
    scale = max(float(row.abs().max()) for row in reference)
    result = Verification(
        merged_to_reference=_distance(saved, reference),
        merged_to_base=_distance(saved, untouched),
        reference_to_base=_distance(reference, untouched),
        scale=scale,
        tolerance=TOLERANCE[dtype] * scale,
        tokens=sum(each["input_ids"].shape[-1] for each in asked),
    )
    judge(result, dtype)
    return result


def probe_prompts(folder: Path) -> list[list[int]]:
    """The probe prompts stored with a trained model, as token ids. Raises Refused if there are none."""
    prompts: list[list[int]] = [probe["prompt_token_ids"] for probe in probing.read_probes(folder)]
    if not prompts:
        raise Refused(f"{folder} holds no {probing.PROBES_FILE}: the merged weights cannot be verified")
    return prompts


def _outputs(load: Callable[[], Any], asked: list[Mapping[str, Any]]) -> list[torch.Tensor]:
    model = load()
    rows = []
    with torch.inference_mode():
        for each in asked:
            tensors = {name: tensor.to(model.device) for name, tensor in each.items()}
            rows.append(model(**tensors).logits[0].float().cpu())
    del model
    gc.collect()
    return rows


def _distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def judge(result: Verification, dtype: str) -> None:
    """Refuse a saved model by the figures of its proof. Raises Refused."""
    if result.merged_to_base == 0 or result.reference_to_base == 0:
        raise Refused("the trained model gives the same outputs as its base: training has changed nothing")
    if result.merged_to_reference > result.tolerance:
        raise Refused(
            f"the saved weights are not the trained ones: outputs differ by {result.merged_to_reference:.4g}, "
            f"{dtype} explains at most {result.tolerance:.4g}"
        )
    if result.merged_to_reference > result.reference_to_base:
        raise Refused(
            f"rounding to {dtype} moves the outputs by {result.merged_to_reference:.4g}, training moved them by "
            f"{result.reference_to_base:.4g}: the fine-tune would be lost. Set dtype to float32 or train longer."
        )
