"""Proximal policy optimization with trl's PPOTrainer: an actor answers, rewards judge, a critic learns to expect them.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from transformers import (
    GenerationConfig,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import TrainOutput
from trl.experimental.ppo import PPOConfig, PPOTrainer

from methods import contract
from methods.ppo.rollouts import Prompts, RewardHead, set_pad_apart
from methods.toolkit import (
    chat,
    finite,
    hardware,
    memory,
    models,
    probing,
    prompt_rows,
    remote_code,
    reward_model,
    tokenizing,
    training,
    tuning,
)
from methods.toolkit.reward_evaluation import RewardEvaluation
from methods.toolkit.rewards import Reward

OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "trainer_state.json"
"""What a checkpoint holds beside the trained weights of actor and critic: optimizer and schedule, steps and curves."""


class Trainer(training.Scheduled, PPOTrainer):
    """trl's trainer with a rate each for actor and critic, gradient clipping, and checkpoints it goes on from exactly.

    The library's loop counts from its first step whenever it is entered, reads no checkpoint, clips no gradient and
    does not stop when told to: `GoOn` and `StopAfterSaving` make up for it at the ends that it leaves open.
    """

    def __init__(self, job: contract.Job, prompts: Prompts, head: RewardHead, **arguments: Any) -> None:
        self.job, self.prompts, self.head = job, prompts, head
        super().__init__(reward_model=head, **arguments)
        self.dataloader = prompts
        head.count = self.count_positions
        self.tokens = 0.0
        self.total_steps = self.args.num_total_batches
        self.grad_norms: dict[str, list[float]] = defaultdict(list)
        self.optimizer.optimizer.register_step_pre_hook(self._clip)

    def create_optimizer(self, model: Any = None) -> Any:
        p = self.job.parameters
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = []
        for prefix, rate in (("policy.", p["actor_learning_rate"]), ("value_model.", p["critic_learning_rate"])):
            for decays in (True, False):
                chosen = [
                    parameter
                    for name, parameter in self.model.named_parameters()
                    if name.startswith(prefix) and parameter.requires_grad and (name in decayed) is decays
                ]
                decay = p["weight_decay"] if decays else 0.0
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "part": prefix})
        make, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = make([group for group in groups if group["params"]], **arguments)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | None = None) -> TrainOutput:
        started = time.monotonic()
        if resume_from_checkpoint is not None:
            self._load(Path(resume_from_checkpoint))
        super().train()
        return TrainOutput(self.state.global_step, math.nan, {"train_runtime": time.monotonic() - started})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        figures = self.head.take_figures()
        length = figures["completion_length"]
        self.tokens += figures.pop("tokens")
        rates = self.lr_scheduler.get_last_lr()
        loss = logs["loss/policy_avg"] + self.args.vf_coef * logs["loss/value_avg"]
        if not math.isfinite(loss):
            raise finite.refusal(self.job, self.state.global_step - 1, loss)
        super().log(
            {
                "loss": loss,
                "policy_loss": logs["loss/policy_avg"],
                "value_loss": logs["loss/value_avg"],
                **figures,
                # Sums over an answer there, means over its tokens here, as for every method.
                "kl": logs["objective/kl"] / length,
                "entropy": logs["objective/entropy"] / length,
                "clip_ratio": logs["policy/clipfrac_avg"],
                "value_clip_ratio": logs["val/clipfrac_avg"],
                "learning_rate": rates[0],
                "critic_learning_rate": rates[-1],
                "grad_norm": sum(self.grad_norms["policy."]) / len(self.grad_norms["policy."]),
                "critic_grad_norm": sum(self.grad_norms["value_model."]) / len(self.grad_norms["value_model."]),
                "tokens": self.tokens,
            }
        )
        self.grad_norms.clear()

    def _clip(self, optimizer: Any, *_: Any) -> None:
        """Clip the gradients of actor and critic, each by its own norm: they are of different sizes."""
        limit = self.args.max_grad_norm or math.inf
        for part in ("policy.", "value_model."):
            groups = [group["params"] for group in optimizer.param_groups if group["part"] == part]
            trained = [parameter for group in groups for parameter in group if parameter.grad is not None]
            self.grad_norms[part].append(float(torch.nn.utils.clip_grad_norm_(trained, limit)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.job.checkpoints / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        training.save_trained_weights(self.accelerator.unwrap_model(self.model), folder)
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.lr_scheduler.state_dict()}
        torch.save(state, folder / OPTIMIZER_FILE)
        self.state.save_to_json(str(folder / STATE_FILE))

    def _load(self, folder: Path) -> None:
        training.load_trained_weights(self.accelerator.unwrap_model(self.model), folder)
        state = torch.load(folder / OPTIMIZER_FILE, map_location=self.accelerator.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["schedule"])
        before = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self.prompts.step = before["global_step"]
        self.state.log_history = before["log_history"]
        self.tokens = training.last_logged("tokens", before["log_history"])


class GoOn(TrainerCallback):
    """Counts on from a checkpoint's step: the library's loop has just set it to 0, and does as many as are left."""

    trainer: Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done, total = self.trainer.prompts.step, self.trainer.total_steps
        state.global_step, state.max_steps = done, total
        state.episode = done * args.batch_size
        args.num_total_batches = total - done


class StopAfterSaving(TrainerCallback):
    """Ends the train when its checkpoint is written and it was asked to stop: the library's loop would go on."""

    def __init__(self, job: contract.Job) -> None:
        self.job = job

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.job.cancelled and state.global_step < state.max_steps:
            raise contract.Cancelled


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Make prompts of the training and validation rows and report what was kept and cut."""
    return prompt_rows.prepare_prompts(job, tokenizer)


def prepare_model(job: contract.Job) -> tuple[Any, LoraConfig | None, Any]:
    """Load the actor, which adapter it is to get, and the critic: the base model with a head that gives one value.

    The seed decides the first weights of head and adapters. With LoRA the critic gets an adapter too.
    """
    set_seed(job.seed)
    p = {**job.parameters, "lora_dropout": 0.0}  # the library switches dropout off: it would bend the probabilities
    actor = tuning.load_trained_model(job)
    dtype = training.weights_dtype(p["dtype"], full=p["tuning"] == "full")
    critic = models.load_scorer(job.inputs["base_model"], dtype)
    torch.nn.init.zeros_(critic.score.weight)  # it expects nothing, where chance would have it expect anything
    critic.config.use_cache = False
    if p["gradient_checkpointing"]:
        # The library's loop is not the one that would switch it on.
        for model in (actor, critic):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if p["tuning"] == "full":
        return actor, None, critic
    lora = tuning.fitting_lora(actor, p)
    with tuning.refusing():
        inject_adapter_in_model(tuning.fitting_lora(critic, p, "SEQ_CLS"), critic)
    critic.score.requires_grad_(True)
    return actor, lora, critic


def build_trainer(
    job: contract.Job,
    parts: tuple[Any, LoraConfig | None, Any],
    tokenizer: Any,
    functions: Sequence[Reward],
    rows: Any,
    validation: Any | None,
) -> Trainer:
    """Put actor, critic, rewards, prompts and arguments together and refuse or warn before the first step."""
    p = job.parameters
    actor, lora, critic = parts
    longest = max(rows["length"])
    limit = prompt_rows.answer_limit(job, longest)
    update = p["batch_size"] * p["grad_accum_steps"]
    an_epoch = math.ceil(len(rows) / update)
    steps = p["max_steps"] or math.ceil(p["epochs"] * len(rows) / update)
    common = training.training_arguments(
        job, has_validation=False, learning_rate=p["actor_learning_rate"], logging_steps=1
    )
    arguments = PPOConfig(
        **common,
        total_episodes=steps * update,
        local_rollout_forward_batch_size=p["batch_size"],
        num_sample_generations=0,  # RewardEvaluation shows answers
        response_length=limit,
        stop_token="eos",  # noqa: S106 - the name of a kind of token
        temperature=p["temperature"],
        missing_eos_penalty=p["missing_end_penalty"] or None,
        num_ppo_epochs=p["ppo_epochs"],
        kl_coef=p["kl_coeff"],
        kl_estimator=p["kl_estimator"],
        cliprange=p["clip_range_ratio"],
        cliprange_value=p["clip_range_value"],
        vf_coef=p["value_coeff"],
        gamma=p["gamma"],
        lam=p["gae_lambda"],
    )
    padding = copy.deepcopy(tokenizer)
    padding.eos_token = chat.answer_end(tokenizer)  # what ends an answer, which need not be what ends a text
    set_pad_apart(padding, rows)
    # Nothing of the model's own settings, such as a penalty for repetition, may bend the sampled probabilities.
    actor.generation_config = GenerationConfig(pad_token_id=padding.pad_token_id, bos_token_id=padding.bos_token_id)
    prompts = Prompts(rows, padding, update, by_length=p["group_by_length"], seed=job.seed)
    head = RewardHead(prompts, padding, functions, p["clip_range_score"])
    go_on, events = GoOn(), training.EventWriter(job, name_of=str)
    callbacks: list[TrainerCallback] = [go_on, events]
    if validation is not None:
        every = p["evaluation_steps"] or an_epoch
        callbacks.append(RewardEvaluation(job, tokenizer, functions, validation, every))
    with tuning.refusing():
        trainer = Trainer(
            job,
            prompts,
            head,
            args=arguments,
            processing_class=padding,
            model=actor,
            ref_model=None,
            train_dataset=rows,
            value_model=critic,
            callbacks=[*callbacks, training.CheckpointKeeper(job), StopAfterSaving(job)],
            peft_config=lora,
        )
    go_on.trainer = events.trainer = trainer
    frozen = reward_model.frozen_parameters(trainer.ref_model, functions)
    memory.report_memory(job, trainer.model, longest + limit, p["tuning"], frozen=frozen)
    return trainer


def save(
    job: contract.Job, trainer: Trainer, tokenizer: Any, generation: Any, outcome: dict[str, float]
) -> dict[str, object]:
    """Save the actor (its adapter, or its full weights), the tokenizer and the probe prompts; not the critic."""
    actor = trainer.accelerator.unwrap_model(trainer.model).policy
    generation.eos_token_id = chat.end_tokens(tokenizer)
    actor.generation_config = generation
    conversations = tokenizing.read_conversations(Path(job.inputs["train_rows"]), -1)
    probing.write_probes(job.output, tokenizer, conversations)
    models.save_trained(actor, job.output)
    chat.save_tokenizer(tokenizer, job.output)
    remote_code.carry(job.inputs["base_model"], job.output)
    return {"model": str(job.output), "adapter": isinstance(actor, PeftModel), **outcome}


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    hardware.settle_dtype(job, hardware.training_device())
    job.phase("reading the data")
    tokenizer = chat.training_tokenizer(job)
    rows, validation = prepare_data(job, tokenizer)
    job.phase("loading the model")
    functions = reward_model.load_rewards(job)
    parts = prepare_model(job)
    generation = parts[0].generation_config
    trainer = build_trainer(job, parts, tokenizer, functions, rows, validation)
    job.phase("training")
    outcome = training.run_training(trainer, job)
    job.phase("saving")
    return save(job, trainer, tokenizer, generation, outcome)


if __name__ == "__main__":
    contract.run(main)
