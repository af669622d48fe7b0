"""Parameter-efficient fine-tuning with one of the techniques of peft, and trl's SFTTrainer.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from methods import contract
from methods.peft import adalora, techniques
from methods.toolkit import (
    chat,
    chat_rows,
    hardware,
    memory,
    probing,
    saving_chat,
    tokenizing,
    training,
    tuning,
    unused,
)


class Trainer(training.Repeatable, SFTTrainer):
    """trl's trainer with a repeatable order of rows, and checkpoints that any technique resumes from exactly."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        loss = super().compute_loss(model, inputs, *rest, **named)
        if self.job.parameters["technique"] == "adalora" and self.model.training:
            weight = self.job.parameters["adalora_orthogonality"] / self.current_gradient_accumulation_steps
            loss = loss + weight * adalora.orthogonality(self.model)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Saving runs the encoder that makes a prompt: with dropout it would save a wrong one and draw random numbers.
        self.model.eval()
        super()._save_checkpoint(model, trial)
        self.model.train()
        folder = self.job.checkpoints / f"checkpoint-{self.state.global_step}"
        # The library's own files lack the encoder that makes a prompt, and ranks that AdaLoRA has only masked so far.
        training.save_trained_weights(self.model, folder)
        if self.job.parameters["technique"] == "adalora":
            adalora.save_ranks(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        training.load_trained_weights(self.model, folder)
        if self.job.parameters["technique"] == "adalora":
            adalora.load_ranks(self.model, folder)


def prepare_data(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Tokenise the training and validation rows and report what was kept and cut."""
    return chat_rows.prepare_rows(job, tokenizer)


def prepare_model(job: contract.Job, tokenizer: Any) -> Any:
    """Load the base model, frozen, and put what is trained beside it; the seed decides its first weights."""
    set_seed(job.seed)
    p = job.parameters
    model = tuning.load_trained_model(job)
    model = techniques.put_beside(model, techniques.adapter_config(p, model), p)
    if not techniques.TECHNIQUES[p["technique"]].mergeable:
        techniques.try_out(model, p["technique"])
    if p["technique"] == "prompt_tuning" and p["prompt_init"] == "text":
        techniques.start_at_text(model, tokenizer, p["prompt_init_text"])
    return model


def build_trainer(job: contract.Job, model: Any, tokenizer: Any, rows: Any, validation: Any | None) -> Trainer:
    """Put model, rows and arguments together and refuse or warn before the first step."""
    p = job.parameters
    longest = max(rows["length"])
    _refuse_too_long(job, model, longest)
    _warn_of_settings(job)
    arguments = SFTConfig(
        **training.training_arguments(job, has_validation=validation is not None),
        max_length=None,  # rows are already limited, and what was cut is counted
        # A trained prompt has no say in how experts are balanced, and a prefix makes the mask too long for that loss.
        router_aux_loss_coef=None if techniques.TECHNIQUES[p["technique"]].mergeable else 0.0,
    )
    events = training.EventWriter(job)
    callbacks: list[Any] = [events, training.CheckpointKeeper(job)]
    if validation is not None:
        callbacks.append(probing.SampleWriter(job, tokenizer))
    if p["technique"] == "adalora":
        callbacks.append(adalora.RankSchedule(p["adalora_start"], p["adalora_end"]))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    tuning.keep_adapter_precise(model)
    if p["technique"] == "llama_adapter":
        # The library took hold of the base's forward before the trainer gave it a head that makes the loss.
        model.base_model.forward = model.get_base_model().forward
    trainer.job = job
    trainer.lengths = list(rows["length"])
    events.trainer = trainer
    memory.report_memory(job, model, longest, "lora" if techniques.TECHNIQUES[p["technique"]].mergeable else "prompt")
    return trainer


def save(job: contract.Job, trainer: Trainer, tokenizer: Any, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter, the tokenizer and the probe prompts."""
    trainer.model.eval()  # as in `_save_checkpoint`
    conversations = tokenizing.read_conversations(Path(job.inputs["train_rows"]), -1)
    return saving_chat.save_trained(job, trainer, tokenizer, conversations, outcome)


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    hardware.settle_dtype(job, hardware.training_device())
    job.phase("reading the data")
    tokenizer = chat.training_tokenizer(job)
    rows, validation = prepare_data(job, tokenizer)
    job.phase("loading the model")
    model = prepare_model(job, tokenizer)
    trainer = build_trainer(job, model, tokenizer, rows, validation)
    job.phase("training")
    outcome = training.run_training(trainer, job)
    job.phase("saving")
    return save(job, trainer, tokenizer, outcome)


def _refuse_too_long(job: contract.Job, model: Any, longest: int) -> None:
    """A trained prompt takes positions, of which a model has so many."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if "num_virtual_tokens" not in techniques.used_parameters(job.parameters) or room is None:
        return
    virtual = job.parameters["num_virtual_tokens"]
    if virtual + longest > room:
        raise contract.Refused(
            f"{virtual} virtual tokens and a row of {longest} tokens are more than the {room} positions of this "
            f"model: lower num_virtual_tokens, or max_seq_length to at most {room - virtual}"
        )


def _warn_of_settings(job: contract.Job) -> None:
    p = job.parameters
    technique = p["technique"]
    unused.tell(job, technique, techniques.unused_settings(p))
    low, high, source = techniques.USUAL_RATES.get(technique, (0.0, 1.0, ""))
    if not low <= p["learning_rate"] <= high:
        job.warning(
            f"learning_rate {p['learning_rate']:g} is unusual for {technique}: {low:g} to {high:g} is ({source})"
        )


if __name__ == "__main__":
    contract.run(main)
