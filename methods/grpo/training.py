"""Group relative policy optimization: answers are sampled, rewarded and compared with each other; trl's GRPOTrainer.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from methods import contract
from methods.toolkit import (
    chat,
    generating,
    hardware,
    memory,
    prompt_rows,
    reward_model,
    rewards,
    saving_chat,
    tokenizing,
    training,
    tuning,
)
from methods.toolkit.reward_evaluation import RewardEvaluation
from methods.toolkit.rewards import Reward

ANSWERS_FILE = "answers.safetensors"
"""In a checkpoint between two updates on the same answers: these answers, as the trainer holds them."""


class Trainer(training.Scheduled, GRPOTrainer):
    """trl's trainer with a repeatable order of prompts, repeatable answers, and checkpoints it goes on from exactly."""

    lengths: list[int]

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        p = self.job.parameters
        prompts = self.args.generation_batch_size // self.num_generations
        order = training.LengthGroupedOrder(self.lengths, prompts if p["group_by_length"] else None, self.job.seed)
        return GroupOrder(order, prompts, self.num_generations, self.num_iterations * self.args.steps_per_generation)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Answers follow from the seed and the step alone, not from what was drawn before a checkpoint.
        set_seed(training.step_seed(self.job.seed, self._step, self.accelerator.process_index))
        # Nothing of the model's own settings, such as a penalty for repetition, may bend the sampled probabilities.
        with generating.replaced_config(self.accelerator.unwrap_model(self.model), self.generation_config):
            scored: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return scored

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        self.count_positions(inputs["prompt_mask"], inputs["completion_mask"])
        return inputs

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.state.global_step % self.num_iterations:
            tensors = {
                f"{index}/{name}": tensor.clone().contiguous()
                for index, batch in enumerate(self._buffered_inputs)
                for name, tensor in batch.items()
            }
            save_file(tensors, self.job.checkpoints / f"checkpoint-{self.state.global_step}" / ANSWERS_FILE)

    def go_on(self, step: int) -> None:
        """Count steps from `step`, and take up the answers that the checkpoint's updates were made on, if any."""
        self._step = step * self.args.gradient_accumulation_steps
        path = self.job.resume_from / ANSWERS_FILE if self.job.resume_from else None
        if path is None or not path.exists():
            return
        batches: list[dict[str, Any]] = [{} for _ in range(self.args.steps_per_generation)]
        for name, tensor in load_file(path, device=str(self.accelerator.device)).items():
            index, _, field = name.partition("/")
            batches[int(index)][field] = tensor
        self._buffered_inputs = batches


class GroupOrder(Sampler[int]):
    """Each prompt as often as it is answered, and each batch of prompts as often as its answers are used.

    The last batch of an epoch is filled up from the epoch's start: a prompt is never left out, and a dataset may be
    smaller than a batch.
    """

    def __init__(self, order: training.LengthGroupedOrder, prompts: int, answers: int, uses: int) -> None:
        self.order, self.prompts, self.answers, self.uses = order, prompts, answers, uses

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        batches = -(-len(self.order) // self.prompts)
        return batches * self.prompts * self.answers * self.uses

    def __iter__(self) -> Iterator[int]:
        rows = list(self.order)
        for start in range(0, len(rows), self.prompts):
            batch = [rows[index % len(rows)] for index in range(start, start + self.prompts)]
            for _ in range(self.uses):
                yield from (row for row in batch for _ in range(self.answers))


class GoOn(TrainerCallback):
    """Tells the trainer, once its state is loaded, at which step it is."""

    trainer: Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.go_on(state.global_step)


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Make prompts of the training and validation rows and report what was kept and cut."""
    return prompt_rows.prepare_prompts(job, tokenizer)


def prepare_model(job: contract.Job) -> tuple[Any, LoraConfig | None]:
    """Load the base model, and say which adapter the trainer is to put on it: without it, it is the reference."""
    model = tuning.load_trained_model(job)
    tuning.switch_dropout_off(model)
    lora = None if job.parameters["tuning"] == "full" else tuning.fitting_lora(model, job.parameters)
    return model, lora


def build_trainer(
    job: contract.Job,
    model: Any,
    lora: LoraConfig | None,
    tokenizer: Any,
    functions: Sequence[Reward],
    rows: Any,
    validation: Any | None,
) -> Trainer:
    """Put model, rewards, prompts and arguments together and refuse or warn before the first step."""
    p = job.parameters
    _refuse_groups(p)
    longest = max(rows["length"])
    limit = prompt_rows.answer_limit(job, longest)
    arguments = GRPOConfig(
        **{**training.training_arguments(job, has_validation=False), "remove_unused_columns": False},
        num_generations=p["num_generations"],
        max_completion_length=limit,
        temperature=p["temperature"],
        top_p=p["top_p"],
        beta=p["beta"],
        epsilon=p["epsilon"],
        epsilon_high=p["epsilon_high"],
        num_iterations=p["num_iterations"],
        loss_type=p["loss_type"],
        scale_rewards=p["scale_rewards"],
        mask_truncated_completions=p["mask_truncated"],
        reward_weights=[reward.weight for reward in functions],
    )
    events, go_on = training.EventWriter(job), GoOn()
    callbacks: list[TrainerCallback] = [go_on, events]
    if validation is not None:
        batches = -(-len(rows) * p["num_generations"] // (p["batch_size"] * p["grad_accum_steps"]))
        every = p["evaluation_steps"] or batches * p["num_iterations"]
        callbacks.append(RewardEvaluation(job, tokenizer, functions, validation, every))
    callbacks.append(training.CheckpointKeeper(job))
    model.generation_config.eos_token_id = chat.end_tokens(tokenizer)  # where the library ends an answer
    with tuning.refusing():
        trainer = Trainer(
            model=model,
            args=arguments,
            reward_funcs=[_for_trl(reward) for reward in functions],
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=lora,
        )
    tuning.keep_adapter_precise(trainer.model)
    trainer.job = job
    trainer.lengths = list(rows["length"])
    events.trainer = go_on.trainer = trainer
    frozen = reward_model.frozen_parameters(trainer.ref_model, functions)
    memory.report_memory(job, trainer.model, longest + limit, p["tuning"], frozen=frozen)
    return trainer


def save(job: contract.Job, trainer: Trainer, tokenizer: Any, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter (or the full weights), the tokenizer and the probe prompts."""
    conversations = tokenizing.read_conversations(Path(job.inputs["train_rows"]), -1)
    return saving_chat.save_trained(job, trainer, tokenizer, conversations, outcome)


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    hardware.settle_dtype(job, hardware.training_device())
    job.phase("reading the data")
    tokenizer = chat.training_tokenizer(job)
    rows, validation = prepare_data(job, tokenizer)
    job.phase("loading the model")
    functions = reward_model.load_rewards(job)
    model, lora = prepare_model(job)
    trainer = build_trainer(job, model, lora, tokenizer, functions, rows, validation)
    job.phase("training")
    outcome = training.run_training(trainer, job)
    job.phase("saving")
    return save(job, trainer, tokenizer, outcome)


def _refuse_groups(p: dict[str, Any]) -> None:
    """Answers of one prompt are compared with each other, so that a batch has to hold all of them."""
    answers, group = p["batch_size"] * p["grad_accum_steps"], p["num_generations"]
    if group < 2:
        raise contract.Refused("num_generations is 1, and answers are compared with each other: set it to 2 or more")
    if answers % group:
        raise contract.Refused(
            f"batch_size × grad_accum_steps ({answers} answers an update) is no multiple of num_generations ({group} "
            f"answers a prompt): set batch_size to {-(-p['batch_size'] // group) * group}, for example"
        )


def _for_trl(reward: Reward) -> Any:
    """The reward function as the trainer calls it: with answers as messages and more columns than ours has."""

    def function(
        prompts: list[Any],
        completions: list[list[dict[str, Any]]],
        completion_ids: list[list[int]],
        reference: list[str],
        line: list[int],
        **_: Any,
    ) -> list[float]:
        texts = [(answer[0].get("content") or "").strip() for answer in completions]
        columns = {"reference": reference, "line": line, "tokens": [len(ids) for ids in completion_ids]}
        return rewards.score([reward], prompts, texts, columns)[reward.name]

    function.__name__ = reward.name
    return function


if __name__ == "__main__":
    contract.run(main)
