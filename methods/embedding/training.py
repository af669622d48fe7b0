"""Fine-tuning of embedding models: full-parameter or LoRA, with the trainer of sentence-transformers.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import set_seed

from methods import contract
from methods.embedding import encoders, losses, probes, retrieval
from methods.embedding import rows as text_rows
from methods.toolkit import hardware, memory, training, tuning, unused


class Trainer(training.Scheduled, SentenceTransformerTrainer):
    """The library's trainer with our schedule and batches, and no model card: writing one asks the hub for the base."""

    batches: text_rows.Batches
    _total_train_tokens: float  # of the run that this one goes on from

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
        if dataset is self.train_dataset:
            return self.batches
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        self.count_positions(*(tensor for name, tensor in inputs.items() if name.endswith("attention_mask")))
        return super().training_step(model, inputs, *rest, **named)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, "num_tokens": self._total_train_tokens + self.real_positions}
        super().log(logs, start_time)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir, create_model_card=False)


class Retrieval(BaseEvaluator):
    """Measures the validation rows after each evaluation of the loss."""

    def __init__(self, path: Path, batch_size: int) -> None:
        super().__init__()
        self.kind, self.rows = text_rows.read_rows(path)
        self.batch_size = batch_size

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        return retrieval.measure_rows(model, self.kind, self.rows, self.batch_size)


def prepare_data(job: contract.Job, model: Any) -> tuple[Any, Any | None]:
    """Read the training and validation rows and report what was kept and cut, by the model's own tokens."""
    return text_rows.prepare_rows(job, model)


def prepare_model(job: contract.Job) -> Any:
    """Load the base model and put what is trained on top of it; the seed decides an adapter's first weights."""
    set_seed(job.seed)
    p = job.parameters
    full = p["tuning"] == "full"
    model = encoders.load_encoder(job.inputs["base_model"], training.weights_dtype(p["dtype"], full=full), p["pooling"])
    model.max_seq_length = min(p["max_seq_length"], model.max_seq_length or p["max_seq_length"])
    encoders.set_prompts(model, p["query_prompt"], p["document_prompt"])
    if full:
        return model
    try:
        model.add_adapter(tuning.lora_config(p, "FEATURE_EXTRACTION"))
    except ValueError as error:
        raise contract.Refused(f"lora_targets {p['lora_targets']!r} do not fit this model: {error}") from error
    if p["gradient_checkpointing"]:
        model.transformers_model.enable_input_require_grads()
    return model


def build_trainer(job: contract.Job, model: Any, rows: Any, validation: Any | None) -> Trainer:
    """Put model, rows and arguments together and refuse or warn before the first step."""
    p = job.parameters
    columns = [name for name in rows.column_names if name != "length"]
    kind = text_rows.kind_of(rows[0])
    loss = losses.chosen_loss(p, kind)
    unused.tell(job, f"the loss {loss}", losses.unused_settings(p, loss))
    if kind == "scored_pair":
        losses.check_scores(loss, rows[text_rows.SCORE])
    order = training.LengthGroupedOrder(rows["length"], _group(p), job.seed)
    texts = [tuple(row[column] for column in text_rows.COLUMNS[kind]) for row in rows]
    unique = p["no_duplicates"] and loss in losses.IN_BATCH
    batches = text_rows.Batches(texts, order, p["batch_size"], unique=unique)
    _warn_of_left_out(job, batches)
    arguments = SentenceTransformerTrainingArguments(
        **training.training_arguments(job, has_validation=validation is not None),
        prompts=text_rows.columns_with_prompts(kind, model.prompts),
    )
    measured = job.inputs.get("validation_rows")
    events = training.EventWriter(job)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.select_columns(columns),
        eval_dataset=validation.select_columns(columns) if validation is not None else None,
        loss=losses.make_loss(p, loss, model),
        evaluator=Retrieval(Path(measured), p["batch_size"]) if measured else None,
        callbacks=[events, training.CheckpointKeeper(job)],
    )
    trainer.job, trainer.batches = job, batches
    events.trainer = trainer
    longest = max(rows["length"]) * len(text_rows.COLUMNS[kind])
    memory.report_memory(job, model, longest, p["tuning"], has_head=False)
    return trainer


def save(job: contract.Job, trainer: Trainer, outcome: dict[str, float]) -> dict[str, object]:
    """Save the adapter (or the full weights) with the tokenizer and the pooling, and texts to prove it by."""
    trainer.model.save_pretrained(str(job.output), create_model_card=False)
    probes.write_probes(job.output, Path(job.inputs["train_rows"]))
    return {"model": str(job.output), "adapter": job.parameters["tuning"] != "full", **outcome}


def main(job: contract.Job) -> dict[str, object]:
    """Train from the job folder; returns where the product lies and how it went."""
    hardware.settle_dtype(job, hardware.training_device())
    job.phase("loading the model")
    model = prepare_model(job)
    job.phase("reading the data")
    rows, validation = prepare_data(job, model)
    trainer = build_trainer(job, model, rows, validation)
    job.phase("training")
    outcome = training.run_training(trainer, job)
    job.phase("saving")
    return save(job, trainer, outcome)


def _group(p: dict[str, Any]) -> int | None:
    return p["batch_size"] * p["grad_accum_steps"] if p["group_by_length"] else None


def _warn_of_left_out(job: contract.Job, batches: text_rows.Batches) -> None:
    list(batches)
    if batches.left_out:
        job.warning(
            f"{batches.left_out} of {len(batches.texts)} rows have a text that stands in every batch already and are "
            "left out of an epoch: lower batch_size, or set no_duplicates: false"
        )


if __name__ == "__main__":
    contract.run(main)
