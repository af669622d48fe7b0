"""What trainers of the transformers family share: arguments, schedule, order of rows, checkpoints, events."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from methods import contract
from methods.toolkit import finite, hardware, own_heads, processes
from methods.toolkit.best_checkpoint import BestStep, load_best
from methods.toolkit.best_metric import is_lower_better
from methods.toolkit.checkpoints import remove_torn_checkpoints

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def _with_evaluation(curves: dict[str, str]) -> dict[str, str]:
    return {**curves, **{f"eval_{name}": f"eval_{ours}" for name, ours in curves.items()}}


CURVES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "epoch": "epoch",
    "mean_token_accuracy": "token_accuracy",
    "num_tokens": "tokens",
    "eval_loss": "eval_loss",
    "eval_perplexity": "eval_perplexity",
    "eval_mean_token_accuracy": "eval_token_accuracy",
    "eval_ndcg_at_10": "eval_ndcg_at_10",
    "eval_mrr_at_10": "eval_mrr_at_10",
    "eval_recall_at_5": "eval_recall_at_5",
    "eval_accuracy_at_1": "eval_accuracy_at_1",
    "eval_spearman": "eval_spearman",
    "reward": "reward",
    "reward_std": "reward_std",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "completion_clipped_share",
    "frac_reward_zero_std": "reward_equal_share",
    "clip_ratio/region_mean": "clip_ratio",
    **_with_evaluation(
        {
            "kl": "kl",
            "entropy": "entropy",
            "rewards/chosen": "reward_chosen",
            "rewards/rejected": "reward_rejected",
            "rewards/margins": "reward_margin",
            "rewards/accuracies": "reward_accuracy",
            "logps/chosen": "logp_chosen",
            "logps/rejected": "logp_rejected",
            "nll_loss": "nll_loss",
            "log_odds_chosen": "log_odds",
            "margin": "reward_margin",
            "accuracy": "reward_accuracy",
            "mean_reward": "reward",
            "min_reward": "reward_min",
            "max_reward": "reward_max",
        }
    ),
}
"""The trainer's own names and ours: the same curve has the same name for every method."""

_OF_REWARD = re.compile(r"rewards/(.+)/mean")

_POLYNOMIAL = {"power": 2.0, "lr_end": 0.0}  # the library's own end, 1e-7, is above some learning rates


def curve_name(name: str) -> str | None:
    """Our name of a curve of the trainer's, None for one that is not recorded."""
    of_reward = _OF_REWARD.fullmatch(name)
    return f"reward_{of_reward[1]}" if of_reward else CURVES.get(name)


def training_arguments(job: contract.Job, *, has_validation: bool, **others: Any) -> dict[str, Any]:
    """The arguments of a transformers trainer from the hyper-parameters of the job.

    `others` are those in whose place a method has parameters of its own.
    """
    p = {**job.parameters, **others}
    on_gpu = torch.cuda.is_available()
    evaluation = {"eval_strategy": "no"}
    if has_validation:
        every = p["evaluation_steps"]
        evaluation = {"eval_strategy": "steps", "eval_steps": every} if every else {"eval_strategy": "epoch"}
    return {
        "output_dir": str(job.checkpoints),
        "per_device_train_batch_size": p["batch_size"],
        "per_device_eval_batch_size": p["batch_size"],
        "gradient_accumulation_steps": p["grad_accum_steps"],
        "num_train_epochs": p["epochs"],
        "max_steps": p["max_steps"] or -1,
        "learning_rate": p["learning_rate"],
        "lr_scheduler_type": p["lr_scheduler"],
        "lr_scheduler_kwargs": _POLYNOMIAL if p["lr_scheduler"] == "polynomial" else {},
        "weight_decay": p["weight_decay"],
        "optim": OPTIMIZERS[p["optimizer"]],
        "max_grad_norm": p["max_grad_norm"],
        "gradient_checkpointing": p["gradient_checkpointing"],
        "logging_steps": p["logging_steps"],
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": p["checkpoint_steps"],
        "save_total_limit": None,  # CheckpointKeeper removes old ones, and only after the new one is whole
        "seed": job.seed,
        "data_seed": job.seed,
        # Weights are loaded in the wanted dtype; mixed precision on top is for float16, which underflows without.
        "bf16": False,
        "fp16": p["dtype"] == "float16" and on_gpu,
        "use_cpu": not on_gpu and not torch.backends.mps.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": True,
        "dataloader_pin_memory": on_gpu,
        **evaluation,
    }


def weights_dtype(dtype: str, *, full: bool) -> str:
    """The dtype that weights are loaded in for training, by name; for `auto` the one that the hardware computes.

    Gradients in float16 underflow without a loss scaler, which works on float32 weights and on a GPU only.
    Raises Refused where there is no such GPU.
    """
    dtype = hardware.resolve_dtype(dtype, hardware.training_device())
    if dtype != "float16":
        return dtype
    if not torch.cuda.is_available():
        raise contract.Refused(
            "dtype float16 can be trained on a CUDA GPU only: set dtype to auto, bfloat16 or float32"
        )
    return "float32" if full else "float16"


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """A seed for what is drawn in one step by one process, whatever was drawn before it."""
    return (seed + 1_000_003 * (step + 1) + 7_919 * process) % 2**32


class Scheduled(finite.FiniteUpdates):
    """Mixed in before a transformers trainer: its schedule follows from the job, and it counts what it works on."""

    control: Any
    real_positions = 0
    all_positions = 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        p = self.job.parameters
        self.args.warmup_steps = warmup_steps(p["warmup_steps"], p["warmup_ratio"], num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        keep_above_floor(scheduler, p["lr_decay_ratio"])
        return scheduler

    def _run_epoch(self, *, epoch: int, **named: Any) -> Any:
        # A training that goes on from a checkpoint of its end has nothing left to do; the library would do a step.
        if self.control.should_training_stop:
            return None
        return super()._run_epoch(epoch=epoch, **named)  # type: ignore[misc]

    def evaluate(self, *given: Any, **named: Any) -> Any:
        # Its data loader draws a random number, which training after it would miss.
        with torch.random.fork_rng():
            return super().evaluate(*given, **named)  # type: ignore[misc]

    def count_positions(self, *masks: Any) -> None:
        """Count the positions of a batch, and those of them that its attention masks do not leave out."""
        self.real_positions += sum(int(mask.sum()) for mask in masks)
        self.all_positions += sum(mask.numel() for mask in masks)


class Repeatable(Scheduled):
    """Mixed in before a transformers trainer: the order of rows and the schedule depend on the job alone.

    The library's own length-grouped order is drawn from the global generator, so that a resumed epoch sees other
    rows than an uninterrupted one; here it is drawn from the seed and the epoch.
    """

    lengths: list[int]
    order: LengthGroupedOrder | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        p = self.job.parameters
        # Several processes take the batches in turn: what they take for one step is one group.
        group = p["batch_size"] * p["grad_accum_steps"] * self.args.world_size
        self.order = LengthGroupedOrder(self.lengths, group if p["group_by_length"] else None, self.job.seed)
        return self.order

    def _run_epoch(self, *, epoch: int, **named: Any) -> Any:
        # After a resume in several processes the library does not reach the order behind its skipped batches.
        if self.order is not None:
            self.order.set_epoch(epoch)
        return super()._run_epoch(epoch=epoch, **named)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        self.count_positions(*(mask for name, mask in inputs.items() if name.endswith("attention_mask")))
        return super().training_step(model, inputs, *rest, **named)


class LengthGroupedOrder(Sampler[int]):
    """A shuffled order of rows in which rows of like length stand together; the longest batch comes first.

    Rows are shuffled, taken in chunks of 50 batches, sorted by length inside a chunk and cut into batches, and the
    batches are shuffled. The longest goes first so that too little memory shows at once and not after hours.
    """

    def __init__(self, lengths: list[int], batch: int | None, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.batch is None:
            return iter(order)
        chunk = self.batch * 50
        batches: list[list[int]] = []
        for start in range(0, len(order), chunk):
            rows = sorted(order[start : start + chunk], key=lambda row: -self.lengths[row])
            batches += [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        whole = [rows for rows in batches if len(rows) == self.batch]
        rest = [row for rows in batches if len(rows) < self.batch for row in rows]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        shuffled.sort(key=lambda rows: rows is not max(whole, key=lambda rows: self.lengths[rows[0]]))
        return iter([row for rows in shuffled for row in rows] + rest)


def warmup_steps(steps: int | None, ratio: float, total: int) -> int:
    """Steps of warm-up: `steps` where given, else `ratio` of all steps, rounded up."""
    return steps if steps is not None else math.ceil(ratio * total)


def keep_above_floor(scheduler: LambdaLR, ratio: float) -> None:
    """Raise the whole schedule so that it runs between `learning_rate * ratio` and `learning_rate`.

    Each factor f of the schedule becomes ratio + (1 - ratio) f, warm-up included.
    """
    if ratio == 0:
        return

    def raised(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: ratio + (1 - ratio) * factor(step)

    scheduler.lr_lambdas = [raised(factor) for factor in scheduler.lr_lambdas]
    for group, base, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(0)
    # Set by the constructor from the schedule before it was raised; the first point of the curve is read from it.
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


TRAINED_FILE = "trained.safetensors"
"""In a checkpoint: every trained weight, where the library's own files do not hold them all."""


def save_trained_weights(model: Any, folder: Path) -> None:
    """Write every weight that is trained into a checkpoint's folder."""
    save_file({name: weight.detach().contiguous() for name, weight in _trained(model)}, folder / TRAINED_FILE)


def load_trained_weights(model: Any, folder: Path) -> None:
    """Take up what `save_trained_weights` has written."""
    saved = load_file(folder / TRAINED_FILE)
    with torch.no_grad():
        for name, weight in _trained(model):
            weight.copy_(saved[name])


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


class CheckpointKeeper(TrainerCallback):
    """Saves when asked to stop, marks whole checkpoints, keeps the newest ones and the best, ends a training early."""

    def __init__(self, job: contract.Job) -> None:
        self.job, self.best = job, BestStep(job)
        self._evaluated_at = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        found = evaluations(state.log_history)
        if self.best.is_asked_for:
            self.best.check(found)
        done = 0 < state.max_steps <= state.global_step
        if done or self.best.has_ended(found) or self.job.inputs.get(SAVE_ONLY):
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The loss of this step was that of the newest checkpoint's weights, or of later ones. If it is finite, that
        # checkpoint can replace older ones.
        if not finite.was_left_out(state):
            self._remove_old(state)
        # Asked by one signal each, they are to stop at the same step.
        self.job.cancelled = processes.any_of(self.job.cancelled, args.device)
        if self.job.cancelled:
            control.should_save = True
            control.should_training_stop = True
        # A cancelled training has little time, but without this evaluation it could choose another best step.
        in_haste = self.job.cancelled and not self.best.is_asked_for
        if args.eval_strategy == "epoch" and self._ends_an_epoch(state) and not in_haste:
            # The library saves first, and who resumes from there would never evaluate this epoch.
            control.should_evaluate = True
            self._evaluated_at = state.global_step
        if self.best.is_asked_for and control.should_evaluate:
            control.should_save = True
        self._judge(args, state, control)  # an evaluation that this trainer's own callback has made
        if control.should_save:
            # A loss that was summed up but not logged is in no checkpoint: a resumed curve would lack it.
            control.should_log = True

    def _ends_an_epoch(self, state: Any) -> bool:
        return float(state.epoch).is_integer() or (self.best.is_asked_for and state.global_step >= state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._judge(args, state, control)

    def _judge(self, args: Any, state: Any, control: Any) -> None:
        """Save the step if it was evaluated, and end the training if the evaluations no longer improve."""
        found = evaluations(state.log_history)
        if not self.best.is_asked_for or state.global_step not in found:
            return
        self.best.check(found)
        control.should_save = True
        if processes.any_of(self.job.is_main and self.best.has_ended(found), args.device):
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.job.cancelled or self._evaluated_at == state.global_step:
            control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        processes.wait_for_all()  # each has written its part
        if self.job.is_main:
            contract.mark_complete(self.job.checkpoints / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._remove_old(state)

    def _remove_old(self, state: Any) -> None:
        """Remove old checkpoints but the best one, by what the newest, from which a resume goes on, knows of it."""
        whole = contract.complete_checkpoints(self.job.checkpoints) if self.job.is_main else []
        if not whole:
            return
        newest = int(whole[-1].name.removeprefix("checkpoint-"))
        known = {step: figures for step, figures in evaluations(state.log_history).items() if step <= newest}
        best = self.best.kept_step(known)
        contract.keep_newest(self.job.checkpoints, self.job.parameters["keep_checkpoints"], best)


class EventWriter(TrainerCallback):
    """Reports curves and progress as events, and one readable line a step to the log."""

    def __init__(self, job: contract.Job, name_of: Callable[[str], str | None] = curve_name) -> None:
        self.job, self.name_of = job, name_of
        self.trainer: Any = None
        self._last = time.monotonic()
        self._seen = (0, 0)
        self._substeps = self._validated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
        # trl counts from 0 again after a resume, and the curve would start anew.
        self.trainer._total_train_tokens = last_logged("num_tokens", state.log_history)
        self.job.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._substeps = 0
        self.job.progress(state.global_step, state.max_steps)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each batch of an accumulated step but the last."""
        self._substeps += 1
        part = min(self._substeps / args.gradient_accumulation_steps, 1.0)
        note = f"batch {self._substeps} of {args.gradient_accumulation_steps}"
        self.job.progress(state.global_step, state.max_steps, part, note)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each batch of validation rows."""
        self._validated += 1
        self.job.progress(state.global_step, state.max_steps, 0.0, f"validation batch {self._validated}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._validated = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        values = {ours: value for name, value in logs.items() if (ours := self.name_of(name)) is not None}
        if "loss" in values:
            values |= self._speed(args.device)
        if "loss" in values or "eval_loss" in values:
            self.job.metrics(state.global_step, **values)
            shown = "  ".join(f"{name} {value:.6g}" for name, value in values.items())
            print(f"step {state.global_step}/{state.max_steps}  {shown}", flush=True)

    def _speed(self, device: Any) -> dict[str, float]:
        now = time.monotonic()
        since = [self.trainer.real_positions - self._seen[0], self.trainer.all_positions - self._seen[1]]
        real, positions = processes.summed(since, device)
        seconds = now - self._last
        self._seen = (self.trainer.real_positions, self.trainer.all_positions)
        self._last = now
        return {
            "tokens_per_second": real / seconds,
            "padding_share": 1 - real / positions if positions else 0.0,
            "memory_gib": peak_memory_gib(),
        }


def peak_memory_gib() -> float:
    """Highest memory so far in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


SAVE_ONLY = "save_checkpoint"
"""An input of a job: the product is to be made of the checkpoint that it goes on from, without a further step."""


def run_training(trainer: Any, job: contract.Job) -> dict[str, Any]:
    """Train to the end or until asked to stop, from the checkpoint of the job if it names one.

    The model then has the weights that are to be saved: those of the last step, or of the best one with `keep_best`.
    Returns steps, seconds and the mean loss, with `keep_best` the best step and its figures, and why it has stopped
    early. Raises contract.Cancelled once a checkpoint is saved, contract.Refused if losses are not finite.
    """
    if job.is_main:
        remove_torn_checkpoints(job.checkpoints)
    processes.wait_for_all()
    trainer.remove_callback(PrinterCallback)  # the same figures once more, as a dictionary
    own_heads.score_by_own_forward(trainer)
    resume = str(job.resume_from) if job.resume_from else None
    outcome = trainer.train(resume_from_checkpoint=resume)
    state = trainer.state
    best, found = BestStep(job), evaluations(state.log_history)
    if job.inputs.get(SAVE_ONLY):
        return {"steps": state.global_step}
    if job.cancelled and state.global_step < state.max_steps:
        raise contract.Cancelled
    loss = mean_loss(state.log_history)
    if not math.isfinite(loss):
        raise finite.refusal(job, state.global_step, loss)
    load_best(trainer, job, best, found)
    ended = best.outcome(found, state.global_step)
    if "stopped" in ended:
        print(ended["stopped"], flush=True)
    return {"steps": state.global_step, "seconds": outcome.metrics["train_runtime"], "loss": loss, **ended}


def evaluations(history: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    """The figures of each evaluation in a trainer's history that one can be the best by, by step and our names."""
    found: dict[int, dict[str, float]] = {}
    for entry in history:
        for name, value in entry.items():
            ours = curve_name(name) or name
            if name.startswith("eval_") and is_lower_better(ours) is not None:
                found.setdefault(int(entry["step"]), {})[ours] = value
    return found


def mean_loss(history: list[dict[str, float]]) -> float:
    """Mean loss of all steps; the library's own mean leaves out those before a resume.

    Points that are not finite are left out with their steps: they were reported when their updates were left out.
    """
    total, counted, last = 0.0, 0.0, 0.0
    for entry in history:
        if "loss" in entry:
            steps = entry["step"] - last
            last = entry["step"]
            if math.isfinite(entry["loss"]):
                total += entry["loss"] * steps
                counted += steps
    return total / counted if counted else math.nan


def last_logged(name: str, history: list[dict[str, float]]) -> float:
    """The newest value of a curve in a trainer's history, 0 if there is none."""
    return next((entry[name] for entry in reversed(history) if name in entry), 0)
