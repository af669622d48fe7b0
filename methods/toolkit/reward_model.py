"""The reward functions of a job, a reward model of ours among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods import contract
from methods.contract import Refused
from methods.toolkit import chat, models, rewards, scoring
from methods.toolkit.rewards import Reward


def load_rewards(job: contract.Job) -> list[Reward]:
    """The reward functions that the job names, with its reward model loaded. Raises Refused."""
    files, given, p = job.inputs["files"], job.inputs["models"], job.parameters
    of_file = rewards.read_functions(Path(files["reward_file"])) if "reward_file" in files else {}
    of_model = RewardModel(given["reward_model"], p["dtype"], p["batch_size"]) if "reward_model" in given else None
    return rewards.choose_rewards(p["rewards"], of_file, of_model)


def frozen_parameters(reference: Any | None, functions: Sequence[Reward]) -> int:
    """Parameters that lie in memory beside what is trained: of the reference model and of the reward model."""
    beside = [reference, *(getattr(reward.function, "model", None) for reward in functions)]
    return sum(p.numel() for model in beside if model is not None for p in model.parameters())


class RewardModel:
    """A trained reward model as a reward function: the score of an answer after its prompt.

    Texts are rendered by its own tokenizer and template, so that it may be of another family than what it judges.
    """

    def __init__(self, model: dict[str, Any], dtype: str, batch_size: int) -> None:
        if model["method"] != "reward":
            raise Refused(f"the model in reward_model was trained by the method {model['method']}, not by reward")
        base, adapter = (model["base_model"], model["path"]) if model["adapter"] else (model["path"], None)
        self.tokenizer, _ = chat.load_tokenizer(model["path"])
        self.model = models.load_with_adapter(base, adapter, dtype, models.load_scorer)
        self.batch_size = batch_size

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        conversations = [
            [*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(prompts, completions, strict=True)
        ]
        return scoring.score_conversations(self.model, self.tokenizer, conversations, batch_size=self.batch_size)
