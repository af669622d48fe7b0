"""The techniques of the method: what each trains, which parameters it uses, and whether its result can be merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

from methods.contract import Refused
from methods.toolkit import tuning, unused
from methods.toolkit.adapter_targets import check_targets, layer_names

_TASK = "CAUSAL_LM"
_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
_ADALORA = (
    "adalora_init_r",
    "adalora_target_r",
    "adalora_start",
    "adalora_end",
    "adalora_interval",
    "adalora_beta1",
    "adalora_beta2",
    "adalora_orthogonality",
)


@dataclass(frozen=True)
class Technique:
    """`uses`: of the parameters that not every technique has, those that this one reads.

    `kind`: the `peft_type` of its adapters. `mergeable`: what it trains can be added to the weights of the base.
    """

    kind: str
    uses: tuple[str, ...]
    mergeable: bool


TECHNIQUES = {
    "lora": Technique("LORA", _LORA, mergeable=True),
    "dora": Technique("LORA", _LORA, mergeable=True),
    "rslora": Technique("LORA", _LORA, mergeable=True),
    "adalora": Technique("ADALORA", (*_LORA[1:], *_ADALORA), mergeable=True),
    "ia3": Technique("IA3", ("ia3_targets", "ia3_feedforward"), mergeable=True),
    "prompt_tuning": Technique(
        "PROMPT_TUNING", ("num_virtual_tokens", "prompt_init", "prompt_init_text"), mergeable=False
    ),
    "p_tuning": Technique(
        "P_TUNING",
        ("num_virtual_tokens", "encoder_type", "encoder_hidden_size", "encoder_layers", "encoder_dropout"),
        mergeable=False,
    ),
    "prefix_tuning": Technique(
        "PREFIX_TUNING",
        ("num_virtual_tokens", "prefix_projection", "prefix_init", "encoder_hidden_size"),
        mergeable=False,
    ),
    "llama_adapter": Technique("ADAPTION_PROMPT", ("adapter_len", "adapter_layers"), mergeable=False),
}

_ONLY_WITH = {
    "prompt_init_text": ("prompt_init", "text"),
    "encoder_layers": ("encoder_type", "lstm"),
    "encoder_dropout": ("encoder_type", "lstm"),
}
"""Parameters that count only if another one of the same technique has this value."""

USUAL_RATES = {
    "prompt_tuning": (0.003, 0.1, "Baidu Qianfan, prompt tuning; its default is 0.03"),
}
"""Documented learning rates of techniques that take others than adapters of layers do."""


def used_parameters(p: dict[str, Any]) -> set[str]:
    """Of the parameters that some technique has for itself, those that count in this job."""
    used = set(TECHNIQUES[p["technique"]].uses)
    for name, (other, value) in _ONLY_WITH.items():
        if p[other] != value:
            used.discard(name)
    if p["technique"] == "prefix_tuning" and not p["prefix_projection"]:
        used.discard("encoder_hidden_size")
    return used


def unused_settings(p: dict[str, Any]) -> dict[str, Any]:
    """The parameters with another value than the default that this job makes no use of, by name."""
    optional = {name for technique in TECHNIQUES.values() for name in technique.uses}
    defaults = {**unused.manifest_defaults(Path(__file__).parent), "lora_alpha": 2 * p["lora_rank"]}
    return unused.set_in_vain(p, optional - used_parameters(p), defaults)


def adapter_config(p: dict[str, Any], model: Any) -> PeftConfig:
    """The library's configuration of what is put beside `model`.

    Raises Refused for parameters that cannot stand together, or with what the library says of them.
    """
    try:
        return _MAKERS[p["technique"]](p, model)
    except (TypeError, ValueError) as error:
        raise Refused(f"technique {p['technique']}: {error}") from error


def put_beside(model: Any, config: PeftConfig, p: dict[str, Any]) -> Any:
    """Put what is trained beside the model. Raises Refused, with our parameters' names, where the two do not fit."""
    technique = p["technique"]
    field = "ia3_targets" if technique == "ia3" else "lora_targets" if "lora_targets" in used_parameters(p) else None
    chosen = f" with {field} {p[field]!r}" if field and p[field] is not None else ""
    kind = model.config.model_type
    layers = [name for name in layer_names(model) if not name.startswith("experts.")]  # for lora alone
    try:
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        others = f"set {field} to other layers, of {', '.join(layers)}, or " if field else ""
        raise Refused(
            f"technique {technique}{chosen} does not fit this model ({kind}): {str(error).rstrip('. ')}. To "
            f"fix it, {others}set technique to lora with lora_targets all-linear"
        ) from error


def try_out(model: Any, technique: str) -> None:
    """Let the model read two tokens and write two, in evaluation mode. Raises Refused if it fails.

    The techniques reach into the attention and the cache of a model, and do not know those of every family.
    """
    import torch

    ids = torch.tensor([[1, 2]], device=model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    except Exception as error:  # a family's own code fails in ways of its own
        raise Refused(
            f"technique {technique} does not work with this model ({model.config.model_type}): "
            f"{type(error).__name__}: {error}. Set technique to lora or prompt_tuning"
        ) from error
    model.train(training)


def start_at_text(model: Any, tokenizer: Any, text: str) -> None:
    """Start a trained prompt at the embeddings of a text, repeated or cut to its length. Raises Refused."""
    import torch

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise Refused(f"prompt_init_text {text!r} has no tokens")
    prompt = model.prompt_encoder[model.active_adapter].embedding.weight
    chosen = torch.tensor([ids[place % len(ids)] for place in range(prompt.shape[0])], device=prompt.device)
    with torch.no_grad():
        prompt.copy_(model.word_embeddings(chosen))


def _lora(p: dict[str, Any], model: Any) -> PeftConfig:
    config = tuning.fitting_lora(model, p)
    config.use_dora, config.use_rslora = p["technique"] == "dora", p["technique"] == "rslora"
    return config


def _adalora(p: dict[str, Any], model: Any) -> PeftConfig:
    check_targets(model, p["lora_targets"])
    if p["adalora_target_r"] >= p["adalora_init_r"]:
        raise ValueError(
            f"adalora_target_r ({p['adalora_target_r']}) must be below adalora_init_r ({p['adalora_init_r']})"
        )
    if p["adalora_start"] + p["adalora_end"] >= 1:
        raise ValueError(
            f"adalora_start ({p['adalora_start']}) and adalora_end ({p['adalora_end']}) leave no steps to reduce "
            "ranks in; together they must be below 1"
        )
    return AdaLoraConfig(
        task_type=_TASK,
        init_r=p["adalora_init_r"],
        target_r=p["adalora_target_r"],
        deltaT=p["adalora_interval"],
        beta1=p["adalora_beta1"],
        beta2=p["adalora_beta2"],
        orth_reg_weight=p["adalora_orthogonality"],
        lora_alpha=p["lora_alpha"],
        lora_dropout=p["lora_dropout"],
        target_modules=p["lora_targets"],
        total_step=1,  # RankSchedule sets it, once the trainer knows
    )


def _ia3(p: dict[str, Any], model: Any) -> PeftConfig:
    targets, feedforward = p["ia3_targets"], p["ia3_feedforward"]
    if targets is None:
        if feedforward is not None:
            raise ValueError("ia3_feedforward names some of ia3_targets, which are not set")
        _refuse_unusual_layers(model)
        return IA3Config(task_type=_TASK)
    check_targets(model, targets, "ia3_targets")
    others = sorted(set(feedforward or []) - set(targets))
    if others:
        raise ValueError(f"ia3_feedforward names {', '.join(others)}, which ia3_targets does not")
    return IA3Config(task_type=_TASK, target_modules=targets, feedforward_modules=feedforward or [])


def _refuse_unusual_layers(model: Any) -> None:
    """The library knows the layers to rescale by the type of the model. Raises Refused where it does not."""
    kind, names = model.config.model_type, layer_names(model)
    usual = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind, [])
    if usual and all(name in names for name in usual):
        return
    attention = [name for name in ("k_proj", "v_proj", "qkv_proj", "kv_b_proj") if name in names]
    after = [name for name in ("down_proj", "fc2") if name in names]
    shown = f"ia3_targets: [{', '.join([*attention, *after])}]"
    shown += f", ia3_feedforward: [{', '.join(after)}]" if after else ""
    raise Refused(
        f"technique ia3: the library knows no layers to rescale in models of the type {kind}; set ia3_targets, and "
        f"repeat in ia3_feedforward those of the feed-forward part, for example {shown}. Layers of this model: "
        f"{', '.join(names)}"
    )


def _prompt_tuning(p: dict[str, Any], _model: Any) -> PeftConfig:
    if p["prompt_init"] == "text" and not p["prompt_init_text"]:
        raise ValueError("prompt_init is text, and prompt_init_text is not set")
    return PromptTuningConfig(
        task_type=_TASK,
        num_virtual_tokens=p["num_virtual_tokens"],
        # A text is put in by `start_at_text`: the library would add the tokenizer's start token to it.
        prompt_tuning_init="SAMPLE_VOCAB" if p["prompt_init"] == "vocabulary" else "RANDOM",
    )


def _p_tuning(p: dict[str, Any], model: Any) -> PeftConfig:
    lstm = p["encoder_type"] == "lstm"
    layers = {"encoder_num_layers": p["encoder_layers"], "encoder_dropout": p["encoder_dropout"]} if lstm else {}
    return PromptEncoderConfig(
        task_type=_TASK,
        num_virtual_tokens=p["num_virtual_tokens"],
        encoder_reparameterization_type=p["encoder_type"].upper(),
        encoder_hidden_size=p["encoder_hidden_size"] or _hidden_size(model),
        **layers,
    )


def _prefix_tuning(p: dict[str, Any], model: Any) -> PeftConfig:
    if p["gradient_checkpointing"]:
        raise ValueError("a trained prefix stands in the cache, which gradient_checkpointing does away with")
    projection = {}
    if p["prefix_projection"]:
        projection = {
            "prefix_projection": True,
            "encoder_hidden_size": p["encoder_hidden_size"] or _hidden_size(model),
        }
    return PrefixTuningConfig(
        task_type=_TASK,
        num_virtual_tokens=p["num_virtual_tokens"],
        init_weights="zero" if p["prefix_init"] == "zero" else None,
        **projection,
    )


def _llama_adapter(p: dict[str, Any], model: Any) -> PeftConfig:
    kind = model.config.model_type
    if kind not in TRANSFORMERS_MODEL_CONFIG:
        raise ValueError(
            f"the library has this technique for models of the types {', '.join(TRANSFORMERS_MODEL_CONFIG)}, and this "
            f"one is {kind}; set technique to lora or prompt_tuning"
        )
    text = model.config.get_text_config()
    layers = text.num_hidden_layers
    if (p["adapter_layers"] or 0) > layers:
        raise ValueError(f"adapter_layers is {p['adapter_layers']}, and the model has {layers}")
    return AdaptionPromptConfig(
        task_type=_TASK, adapter_len=p["adapter_len"], adapter_layers=p["adapter_layers"] or layers
    )


def _hidden_size(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


_MAKERS = {
    "lora": _lora,
    "dora": _lora,
    "rslora": _lora,
    "adalora": _adalora,
    "ia3": _ia3,
    "prompt_tuning": _prompt_tuning,
    "p_tuning": _p_tuning,
    "prefix_tuning": _prefix_tuning,
    "llama_adapter": _llama_adapter,
}
