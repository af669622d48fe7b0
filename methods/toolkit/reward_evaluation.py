"""Answers the validation prompts while a model is trained by rewards, and records what the answers are worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from methods import contract
from methods.toolkit import generating, rewards
from methods.toolkit.best_checkpoint import BestStep
from methods.toolkit.chat import render_prompt
from methods.toolkit.rewards import Reward

SAMPLES_FILE = "samples.jsonl"
_KEPT = 20


class RewardEvaluation(TrainerCallback):
    """Every `every` steps, before the first and after the last: greedy answers to all validation prompts, and rewards.

    Greedy, so that two points of a curve differ by what was learned and by nothing else. Their means are the curves
    eval_reward, eval_reward_NAME and eval_completion_length; the first answers are kept in `samples.jsonl`.
    """

    def __init__(self, job: contract.Job, tokenizer: Any, functions: Sequence[Reward], rows: Any, every: int) -> None:
        self.job, self.tokenizer, self.rewards, self.every = job, tokenizer, functions, every
        self.rows = list(rows)
        self.prompts = [render_prompt(tokenizer, row["prompt"]) for row in self.rows]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._evaluate(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        last = state.global_step == state.max_steps
        in_haste = self.job.cancelled and not BestStep(self.job).is_asked_for
        if (state.global_step % self.every == 0 or last) and not in_haste:
            self._evaluate(model, state)

    def _evaluate(self, model: Any, state: Any) -> None:
        answers = self._answers(getattr(model, "policy", model))
        texts = [answer.said for answer in answers]
        columns = {
            "reference": [row["reference"] for row in self.rows],
            "line": [row["line"] for row in self.rows],
            "tokens": [answer.tokens + (not answer.hit_limit) for answer in answers],
        }
        scores = rewards.score(self.rewards, [row["prompt"] for row in self.rows], texts, columns)
        total = rewards.weighted_sum(self.rewards, scores)
        figures = {
            "eval_reward": _mean(total),
            **{f"eval_reward_{name}": _mean(values) for name, values in scores.items()},
            "eval_completion_length": _mean(columns["tokens"]),
        }
        self.job.metrics(state.global_step, **figures)
        state.log_history.append({"step": state.global_step, **figures})  # for keep_best, and for checkpoints
        shown = "  ".join(f"{name} {value:.6g}" for name, value in figures.items())
        print(f"step {state.global_step}/{state.max_steps}  {shown}", flush=True)
        self._keep(state.global_step, texts, total)

    def _answers(self, model: Any) -> list[generating.Answer]:
        sampling = generating.Sampling(max_new_tokens=self.job.parameters["max_new_tokens"])
        training, cached = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        answers = generating.generate(model, self.tokenizer, self.prompts, sampling)
        model.config.use_cache = cached
        model.train(training)
        return answers

    def _keep(self, step: int, texts: list[str], total: list[float]) -> None:
        path = self.job.folder / SAMPLES_FILE
        with path.open("a", encoding="utf-8") as file:
            for row, text, reward in list(zip(self.rows, texts, total, strict=True))[:_KEPT]:
                sample = {
                    "step": step,
                    "prompt": row["prompt"][-1]["content"] if row["prompt"] else "",
                    "reference": row["reference"],
                    "answer": text,
                    "reward": reward,
                }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        self.job.artifact(path)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
