"""Lets trl's trainers score tokens by the forward pass of a model that brings its own code.

trl 1.16 replaces the forward pass: it multiplies the hidden states with the head's matrix itself, in tiles, which is
what models of transformers do. A model's own code may do more; Baichuan2 normalises the matrix first. Trained past
that, it would learn for outputs that it never gives.
"""

from __future__ import annotations

import functools
import types
from typing import Any


def score_by_own_forward(trainer: Any) -> None:
    """Give the models of a trl trainer back their own forward pass, where their code is their own.

    Takes more memory than trl's: the logits of all positions, in float32.
    """
    temperature = getattr(trainer.args, "temperature", None) or 1.0
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is None:
            continue
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        if "forward" in vars(plain) and has_own_code(plain):
            _replace_forward(plain, temperature)


def has_own_code(model: Any) -> bool:
    """Whether the class of the model, or one that it inherits from, came with the model's files."""
    return any(kind.__module__.startswith("transformers_modules.") for kind in type(model).__mro__)


def _replace_forward(model: Any, temperature: float) -> None:
    own = type(model).forward

    @functools.wraps(own)  # the library looks up what the forward pass takes
    def forward(self: Any, *given: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        if not fused_lm_head:
            return own(self, *given, **named)
        wanted = {name: named.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")}
        return _scores(own(self, *given, **{**named, "use_cache": False}).logits, temperature, **wanted)

    model.forward = types.MethodType(forward, model)


def _scores(logits: Any, temperature: float, labels: Any, shift_labels: Any, num_items_in_batch: Any) -> Any:
    """What trl reads of its own head: figures of every position (rows, positions), 0 where the label is -100."""
    from trl.trainer.utils import FusedCausalLMOutput

    if shift_labels is None:
        logits, labels = logits[:, :-1], labels[:, 1:]
    else:
        labels = shift_labels
    logits = logits.float() / temperature
    mask = labels != -100
    logs = logits.log_softmax(-1)
    log_probs = logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / count,
        log_probs=log_probs,
        entropy=-(logs.exp() * logs).sum(-1).masked_fill(~mask, 0),
        log_sum_sq_probs=(2 * logs.detach()).logsumexp(-1).masked_fill(~mask, 0),
        mean_logits=logits.detach().mean(-1).masked_fill(~mask, 0),
        is_top1=(logits.argmax(-1) == labels) & mask,
        label_mask=mask,
    )
