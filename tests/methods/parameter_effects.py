"""What each common hyper-parameter has to do in a trainer of the transformers family, by its name.

The methods share this table; what a hyper-parameter does to rows is for each of them to say.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from methods import contract
from methods.toolkit import chat, finite, training
from methods.toolkit.best_metric import is_lower_better
from tests.methods.stage_jobs import curve
from tests.methods.training_bench import Bench, result_of, schedule

Effect = Callable[[Bench], None]


def argument(name: str, field: str, value: Any, expected: Any = None) -> Effect:
    """The field's value is the value of the trainer's argument."""

    def check(bench: Bench) -> None:
        found = getattr(bench.build(**{field: value}).args, name)
        assert found == (value if expected is None else expected)
        assert getattr(bench.build().args, name) != found

    return check


def lora(name: str, field: str, value: Any, expected: Any = None) -> Effect:
    """The field's value is the value of the adapter's configuration."""

    def check(bench: Bench) -> None:
        config = bench.build(**{field: value}).model.peft_config["default"]
        assert getattr(config, name) == (value if expected is None else expected)

    return check


def kept(field: str, limit: int, rows: int) -> Effect:
    """The field as a limit leaves fewer rows, of so many."""

    def check(bench: Bench) -> None:
        assert 0 < len(bench.build(**{field: limit}).train_dataset) < rows

    return check


def over_length(limit: int, rows: int) -> Effect:
    """Rows over the sequence length are left out, cut, or refused."""

    def check(bench: Bench) -> None:
        left = len(bench.build(max_seq_length=limit).train_dataset)
        assert left < len(bench.build(max_seq_length=limit, over_length="truncate").train_dataset) == rows
        with pytest.raises(contract.Refused, match=f"max_seq_length is {limit}"):
            bench.build(max_seq_length=limit, over_length="error")

    return check


def max_samples(bench: Bench) -> None:
    assert len(bench.build(max_samples=5).train_dataset) == 5


def load_in_4bit(bench: Bench) -> None:
    types = {type(m).__name__ for m in bench.build(load_in_4bit=True).model.modules()}
    assert "Linear4bit" in types
    assert "Linear4bit" not in {type(m).__name__ for m in bench.build().model.modules()}


def lora_targets(bench: Bench) -> None:
    model = bench.build(lora_targets="q_proj,v_proj").model
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


def max_steps(bench: Bench) -> None:
    assert len(bench.losses(max_steps=5, epochs=1, batch_size=8)) == 5
    assert len(bench.losses(epochs=1, batch_size=8)) == 3


def lr_decay_ratio(bench: Bench) -> None:
    rates = schedule(bench.build(lr_decay_ratio=0.5, learning_rate=1e-3), 20)
    assert rates[-1] == pytest.approx(0.5e-3, rel=0.02)


def warmup_steps(bench: Bench) -> None:
    rates = schedule(bench.build(warmup_steps=4, warmup_ratio=0.5, learning_rate=1e-3), 20)
    assert rates.index(max(rates)) == 4  # and not the ratio's 10
    rates = schedule(bench.build(warmup_steps=0, warmup_ratio=0.5, learning_rate=1e-3), 20)
    assert rates.index(max(rates)) == 0


def warmup_ratio(bench: Bench) -> None:
    rates = schedule(bench.build(warmup_ratio=0.5, learning_rate=1e-3), 20)
    assert rates.index(max(rates)) == 10


def weight_decay(bench: Bench) -> None:
    trainer = bench.build(weight_decay=0.3)
    trainer.create_optimizer()
    assert max(group["weight_decay"] for group in trainer.optimizer.param_groups) == 0.3


def optimizer(bench: Bench) -> None:
    names = {}
    for name in training.OPTIMIZERS:
        trainer = bench.build(optimizer=name)
        trainer.create_optimizer()
        names[name] = type(trainer.optimizer).__name__
    assert names == {"adamw": "AdamW", "adamw_8bit": names["adamw_8bit"], "adafactor": "Adafactor", "sgd": "SGD"}
    assert names["adamw_8bit"] in ("AdamW", "AdamW8bit")
    trainer = bench.build(optimizer="adamw_8bit")
    trainer.create_optimizer()
    assert "bitsandbytes" in type(trainer.optimizer).__module__


def checkpoints(bench: Bench) -> None:
    folder = bench.train(max_steps=7, checkpoint_steps=2, keep_checkpoints=3, batch_size=4)
    found = [path.name for path in contract.complete_checkpoints(folder / "checkpoints")]
    assert found == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]
    assert len(list((folder / "checkpoints").glob("checkpoint-*"))) == 3


def evaluation_steps(bench: Bench) -> None:
    folder = bench.train(validation=True, max_steps=4, evaluation_steps=2, batch_size=8)
    assert sorted(curve(folder, "eval_loss")) == [2, 4]
    folder = bench.train(validation=True, epochs=2, batch_size=8)
    assert sorted(curve(folder, "eval_loss")) == [3, 6]


QUICK: dict[str, Any] = {"max_steps": 4, "batch_size": 8, "checkpoint_steps": 100, "keep_checkpoints": 1}
QUICK |= {"evaluation_steps": 1, "learning_rate": 5e-3, "lr_scheduler": "constant"}


class Trains(Protocol):
    """What can train."""

    def train(self, *, validation: bool = False, **given: Any) -> Path: ...


def keep_best(bench: Trains, metric: str = "eval_loss", **given: Any) -> None:
    folder = bench.train(validation=True, **{**QUICK, **given, "keep_best": metric})
    points = {step: values[0] for step, values in curve(folder, metric).items() if step > 0}
    sign = 1 if is_lower_better(metric) else -1
    best, last = min(points, key=lambda step: (sign * points[step], step)), max(points)
    assert result_of(folder)["best_step"] == best
    found = [path.name for path in contract.complete_checkpoints(folder / "checkpoints")]
    assert found == [f"checkpoint-{step}" for step in sorted({best, last})]


def early_stopping(bench: Trains, metric: str = "eval_loss", **given: Any) -> None:
    """Patience counts evaluations, and a threshold that nothing reaches makes each of them one in vain."""
    for patience in (1, 2):
        hyper = {"early_stopping_patience": patience, "early_stopping_threshold": 1e9, "keep_best": None}
        folder = bench.train(validation=True, **{**QUICK, **given, **hyper})
        assert max(curve(folder, metric)) == result_of(folder)["steps"] == 1 + patience


def stop_after_nonfinite(bench: Trains, **given: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {2}, "loss")
        folder = bench.train(**{**QUICK, **given, "stop_after_nonfinite": 2})
        assert result_of(folder)["steps"] == {**QUICK, **given}["max_steps"]
        with pytest.raises(contract.Refused, match="the loss became nan at step 2"):
            bench.train(**{**QUICK, **given, "stop_after_nonfinite": 1})


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Let the loss or the gradient of these steps be NaN."""
    whole_step = finite.FiniteUpdates.training_step

    def step(self: Any, model: Any, *given: Any, **named: Any) -> Any:
        loss = whole_step(self, model, *given, **named)
        if self.state.global_step + 1 in steps:
            if what == "loss":
                self._step_losses = (loss * float("nan"),)
                return self._step_losses[0]
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(finite.FiniteUpdates, "training_step", step)


def logging_steps(bench: Bench) -> None:
    assert sorted(curve(bench.train(max_steps=6, logging_steps=3, batch_size=4), "loss")) == [1, 3, 6]


def gradient_checkpointing(bench: Bench) -> None:
    trainer = bench.build(gradient_checkpointing=True)
    assert trainer.args.gradient_checkpointing
    assert not bench.build().args.gradient_checkpointing


def group_by_length(bench: Bench) -> None:
    def padding(**hyper: Any) -> float:
        folder = bench.train(epochs=1, batch_size=4, **hyper)
        return sum(values[0] for values in curve(folder, "padding_share").values())

    assert padding() < padding(group_by_length=False)


def seed(bench: Bench) -> None:
    orders = [list(bench.build(seed=number)._get_train_sampler()) for number in (5, 5, 6)]
    assert orders[0] == orders[1] != orders[2]
    assert bench.build(seed=5).args.seed == 5


def dtype(bench: Bench) -> None:
    for name in ("float32", "bfloat16"):
        assert next(bench.build(dtype=name, tuning="full").model.parameters()).dtype == getattr(torch, name)
    if not torch.cuda.is_available():
        assert next(bench.build(tuning="full").model.parameters()).dtype == torch.float32


THINKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (message['reasoning_content'] or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""A template that lets the model think before its last answer, and leaves the thoughts of earlier answers out."""


def thinking_bench(bench: Bench) -> Bench:
    """The bench with a base model whose template thinks."""
    base = bench.root / "thinking_base"
    if not base.exists():
        shutil.copytree(bench.base, base)
        (base / "chat_template.jinja").write_text(THINKS, encoding="utf-8")
    return replace(bench, base=base, root=bench.root / "thinking")


def thinking(bench: Bench) -> None:
    place = thinking_bench(bench)
    templates = {name: place.build(thinking=name).processing_class.chat_template for name in ("auto", "on", "off")}
    assert "set enable_thinking = true" in templates["on"]
    assert "set enable_thinking = false" in templates["off"]
    assert "set enable_thinking" in templates["auto"]


def chat_template_kwargs(bench: Bench) -> None:
    place = thinking_bench(bench)
    template = place.build(chat_template_kwargs={"enable_thinking": True}).processing_class.chat_template
    assert "set enable_thinking = true" in template
    with pytest.raises(contract.Refused, match=r"chat_template_kwargs\.enabel_thinking"):
        place.build(chat_template_kwargs={"enabel_thinking": True})


def train_on(bench: Bench) -> None:
    every, last = (_trained_tokens(bench.build(train_on=which)) for which in ("all", "last"))
    assert 0 < last < every


def turns(bench: Bench) -> None:
    place = thinking_bench(bench)
    assert len(place.build(turns="all").train_dataset) == 22  # one of 21 conversations has two answers
    assert len(place.build(turns="last").train_dataset) == 21


def _trained_tokens(trainer: Any) -> int:
    return sum(label != chat.IGNORED for labels in trainer.train_dataset["labels"] for label in labels)


COMMON: dict[str, Effect] = {
    "load_in_4bit": load_in_4bit,
    "lora_rank": lora("r", "lora_rank", 3),
    "lora_alpha": lora("lora_alpha", "lora_alpha", 5),
    "lora_dropout": lora("lora_dropout", "lora_dropout", 0.4),
    "lora_targets": lora_targets,
    "max_samples": max_samples,
    "max_grad_norm": argument("max_grad_norm", "max_grad_norm", 0.7),
    "epochs": argument("num_train_epochs", "epochs", 3.5),
    "max_steps": max_steps,
    "batch_size": argument("per_device_train_batch_size", "batch_size", 3),
    "grad_accum_steps": argument("gradient_accumulation_steps", "grad_accum_steps", 3),
    "learning_rate": argument("learning_rate", "learning_rate", 3e-4),
    "lr_scheduler": argument("lr_scheduler_type", "lr_scheduler", "polynomial"),
    "lr_decay_ratio": lr_decay_ratio,
    "warmup_steps": warmup_steps,
    "warmup_ratio": warmup_ratio,
    "weight_decay": weight_decay,
    "optimizer": optimizer,
    "checkpoint_steps": checkpoints,
    "keep_checkpoints": checkpoints,
    "evaluation_steps": evaluation_steps,
    "keep_best": keep_best,
    "early_stopping_patience": early_stopping,
    "early_stopping_threshold": early_stopping,
    "stop_after_nonfinite": stop_after_nonfinite,
    "logging_steps": logging_steps,
    "gradient_checkpointing": gradient_checkpointing,
    "group_by_length": group_by_length,
    "train_on": train_on,
    "turns": turns,
    "thinking": thinking,
    "chat_template_kwargs": chat_template_kwargs,
    "seed": seed,
    "dtype": dtype,
}
"""For 21 rows."""
