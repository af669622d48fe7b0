"""A model with a head of its own is trained by its own outputs, not by those that trl would compute past it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from methods.toolkit.own_heads import score_by_own_forward


class NormHead(nn.Linear):
    """A head whose rows are normalised before they are used."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


class OwnModel(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama with that head, as if its code had come with its files."""

    __module__ = "transformers_modules.own.modeling"


def model_of(kind: type[Any]) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = kind(LlamaConfig(vocab_size=30, **sizes))
    model.lm_head = NormHead(16, 30, bias=False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def test_scores_are_those_of_the_model_s_own_outputs() -> None:
    model = model_of(OwnModel)
    ids = torch.randint(0, 30, (2, 7))
    labels = ids.clone()
    labels[:, :3] = -100
    logits = model(input_ids=ids).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.reshape(-1, 30), labels[:, 1:].reshape(-1), ignore_index=-100)
    assert not torch.allclose(model(input_ids=ids, labels=labels, fused_lm_head=True).loss, expected)

    score_by_own_forward(SimpleNamespace(model=model, args=SimpleNamespace()))

    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert torch.allclose(found.loss, expected)
    assert torch.equal(found.label_mask, labels[:, 1:] != -100)
    assert torch.equal(found.is_top1, (logits.argmax(-1) == labels[:, 1:]) & found.label_mask)
    assert torch.allclose(model(input_ids=ids).logits[:, :-1], logits)
    found.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_a_model_of_transformers_keeps_trl_s_forward() -> None:
    model = model_of(LlamaForCausalLM)
    before = model.forward
    score_by_own_forward(SimpleNamespace(model=model, args=SimpleNamespace()))
    assert model.forward == before
