"""The method embedding in the environment that it names: it learns, resumes exactly, and uses what it is given."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.base_models import load_base_models
from configs.settings import PROJECT_ROOT, Settings
from configs.train import Hyperparameters, TrainConfig
from methods import contract
from methods.embedding.check import make_rows, make_tiny_encoder
from methods.registry import find_method
from tasks.base_models import fetch_base_model
from tasks.inference import Generation
from tasks.stages import StageCancelled, StageJob, run_stage, stage_environment
from tests.method_environments import method_python
from tests.methods.stage_jobs import curve, open_job, signal_running
from tests.methods.training_bench import interrupt_at, losses, weights

pytestmark = pytest.mark.methods

KINDS = ("pair", "triplet", "scored_pair")
SAMPLES = PROJECT_ROOT / "configs" / "samples" / "alarms"


@dataclass
class Bench:
    """A tiny encoder with rows of every kind, and a process of the environment that does many jobs on them."""

    python: Path
    root: Path
    base: Path
    count: int = 0

    def rows(self, kind: str) -> Path:
        path = self.root / f"{kind}.jsonl"
        if not path.exists():
            write_rows(path, make_rows(24, kind))
        return path

    def training(
        self,
        kind: str = "pair",
        *,
        validation: bool = False,
        resume: Path | None = None,
        base: Path | None = None,
        rows: dict[str, Path] | None = None,
        **given: Any,
    ) -> Path:
        """A folder with a training job as `tasks.trains` makes it; `given` are common and own parameters."""
        method = find_method("embedding")
        hyper = {name: value for name, value in given.items() if name in Hyperparameters.model_fields}
        config = TrainConfig(
            name="t",
            method="embedding",
            base_model="b",
            dataset="d",
            validation_dataset="v" if validation or (rows or {}).get("validation") else None,
            hyperparameters=Hyperparameters(**{**method.hyperparameter_defaults, **hyper}),
            method_params={name: value for name, value in given.items() if name not in hyper},
        )
        held_back = (rows or {}).get("validation") or (self.rows(kind) if validation else None)
        inputs = {
            "base_model": str(base or self.base),
            "train_rows": str((rows or {}).get("train") or self.rows(kind)),
            "validation_rows": str(held_back) if held_back else None,
        }
        return self.job("training", inputs, method.job_parameters(config), config.hyperparameters.seed, resume)

    def saving(self, trained: Path, *, adapter: bool, base: Path | None = None, dtype: str = "auto") -> Path:
        inputs = {"base_model": str(base or self.base), "trained": str(trained / "output"), "adapter": adapter}
        return self.job("saving", inputs, {"dtype": dtype})

    def inference(self, weights: dict[str, str], **inputs: str) -> Path:
        stage = "inference-customized" if "adapter" in weights else "inference-complete"
        parameters = {**Generation().parameters(), "dtype": "float32"}
        return self.job(stage, {**weights, **inputs}, parameters)

    def job(
        self, stage: str, inputs: dict[str, Any], parameters: dict[str, Any], seed: int = 1, resume: Path | None = None
    ) -> Path:
        self.count += 1
        folder = self.root / f"{self.count}-{stage}"
        job = StageJob(
            stage=stage,
            parameters=parameters,
            inputs=inputs,
            output=folder / "output",
            resume_from=resume,
            seed=seed,
        )
        open_job(folder, job)
        return folder

    def run(self, jobs: list[tuple[str, Path]]) -> list[dict[str, Any]]:
        """Do the jobs in one process of the environment; returns their results."""
        self.count += 1
        asked, told = self.root / f"jobs-{self.count}.json", self.root / f"results-{self.count}.json"
        asked.write_text(json.dumps([{"do": do, "folder": str(folder)} for do, folder in jobs]), encoding="utf-8")
        command = [str(self.python), "-W", "ignore", "-m", "tests.methods.embedding_bench", str(asked), str(told)]
        done = subprocess.run(command, env=stage_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        results: list[dict[str, Any]] = json.loads(told.read_text(encoding="utf-8"))
        return results

    def run_alone(self, folder: Path, resume: Path | None = None) -> None:
        """Do one job as the system does: in a process of its own, which can be asked to stop."""
        job = StageJob(**{**json.loads((folder / contract.JOB_FILE).read_text()), "resume_from": resume})
        file = find_method("embedding").stage_file(job.stage)
        run_stage(folder, job, self.python, file, 60, lambda events: None)

    def describe(self, *wanted: dict[str, Any]) -> list[dict[str, Any]]:
        return self.run([("describe", self.training(**each)) for each in wanted])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("embedding")
    return Bench(method_python("embedding", "embedding"), root, make_tiny_encoder(root / "encoder", seed=3))


def warnings_of(folder: Path) -> list[str]:
    lines = (folder / contract.EVENTS_FILE).read_text(encoding="utf-8").splitlines()
    return [event["text"] for event in map(json.loads, lines) if event["type"] == "warning"]


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tuning", "rate"), [("full", 2e-4), ("lora", 2e-3)])
def test_a_real_model_learns_to_find_what_it_did_not_know(bench: Bench, tuning: str, rate: float) -> None:
    settings = Settings(home=bench.root / "home")
    base = fetch_base_model(load_base_models(settings)["all-minilm-l6-v2"], settings)
    files = {}
    for split in ("train", "validation", "test"):
        lines = (SAMPLES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        files[split] = bench.root / f"alarms-{split}.jsonl"
        write_rows(files[split], [{"line": number, **json.loads(line)} for number, line in enumerate(lines, start=1)])
    steps: dict[str, Any] = {"epochs": 6, "batch_size": 24, "evaluation_steps": 12, "warmup_ratio": 0.1}
    train = bench.training(
        base=base, rows=files, tuning=tuning, learning_rate=rate, lora_rank=16, checkpoint_steps=99, **steps
    )
    output = str(train / "output")
    tuned = {"model": output} if tuning == "full" else {"base_model": str(base), "adapter": output}
    held_out = {"evaluation_rows": str(files["test"])}
    measured = [bench.inference(weights, **held_out) for weights in ({"model": str(base)}, tuned)]
    complete = bench.saving(train, adapter=tuning == "lora", base=base)
    measured.append(bench.inference({"model": str(complete / "output")}, **held_out))
    which = "inference_complete" if tuning == "full" else "inference_customized"
    results = bench.run(
        [
            ("training", train),
            ("inference_complete", measured[0]),
            (which, measured[1]),
            ("saving", complete),
            ("inference_complete", measured[2]),
        ]
    )
    before, after, saved = (results[place]["figures"] for place in (1, 2, 4))
    print(f"{tuning}: {results[0]['steps']} steps in {results[0]['seconds']:.0f} s; before {before}; after {after}")
    assert before["ndcg_at_10"] < 0.2
    assert after["ndcg_at_10"] > 0.7
    assert saved == pytest.approx(after, abs=0.02)
    points = [values[0] for _, values in sorted(curve(train, "eval_ndcg_at_10").items())]
    assert points[-1] > points[0]
    proof = results[3]["verification"]
    assert proof["merged_to_reference"] < proof["tolerance"] < proof["merged_to_base"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_train_learns_resumes_to_the_same_and_is_saved_as_a_plain_folder(
    bench: Bench, kind: str, tuning: str
) -> None:
    # 24 rows in batches of 5: five steps an epoch, and its last one has a checkpoint and an evaluation.
    given: dict[str, Any] = {"tuning": tuning, "epochs": 4, "batch_size": 5, "checkpoint_steps": 5, "lora_dropout": 0.1}
    given |= {"keep_checkpoints": 9, "learning_rate": 5e-3 if tuning == "lora" else 2e-3}
    alone = bench.training(kind, validation=True, **given)
    (result,) = bench.run([("training", alone)])
    assert (result["adapter"], result["steps"]) == (tuning == "lora", 20)
    evaluated = [values[0] for _, values in sorted(curve(alone, "eval_loss").items())]
    assert len(evaluated) == 4
    assert evaluated[-1] < evaluated[0]
    figure = "eval_spearman" if kind == "scored_pair" else "eval_ndcg_at_10"
    assert sorted(curve(alone, figure)) == [5, 10, 15, 20]
    for name in ("loss", "learning_rate", "grad_norm", "epoch", "tokens", "tokens_per_second", "memory_gib"):
        assert len(curve(alone, name)) == 20, name

    jobs = []
    for step in (5, 15):
        resumed = bench.training(kind, validation=True, **given)
        checkpoint = resumed / "checkpoints" / f"checkpoint-{step}"
        shutil.copytree(alone / "checkpoints" / checkpoint.name, checkpoint)
        job = json.loads((resumed / contract.JOB_FILE).read_text())
        contract.write_json(resumed / contract.JOB_FILE, {**job, "resume_from": str(checkpoint)})
        jobs.append((step, resumed))
    complete = bench.saving(alone, adapter=tuning == "lora")
    results = bench.run([*(("training", folder) for _, folder in jobs), ("saving", complete)])
    for step, resumed in jobs:
        for name in ("loss", "grad_norm", "learning_rate", "tokens", "eval_loss", figure):
            expected = {at: values for at, values in curve(alone, name).items() if at > step}
            assert curve(resumed, name) == expected, name
        expected_weights = weights(alone)
        assert all(torch.equal(expected_weights[name], tensor) for name, tensor in weights(resumed).items())
    proof = results[-1]["verification"]
    assert proof["merged_to_reference"] < proof["tolerance"] < proof["merged_to_base"]
    files = {path.name for path in (complete / "output").iterdir()}
    assert {"modules.json", "1_Pooling", "model.safetensors", "tokenizer.json", "probes.json"} <= files
    assert not [name for name in files if "adapter" in name or name.endswith((".bin", ".md"))]
    assert str(bench.base) not in (complete / "output" / "config.json").read_text()


def test_a_cancelled_train_saves_a_checkpoint_and_goes_on_from_it_to_the_same(bench: Bench) -> None:
    given: dict[str, Any] = {"epochs": 40, "batch_size": 4, "learning_rate": 5e-3, "lora_dropout": 0.1}
    folder, alone = bench.training(**given), bench.training(**given)
    canceller = interrupt_at(folder, 5, lambda: signal_running(folder))
    with pytest.raises(StageCancelled):
        bench.run_alone(folder)
    canceller.join()
    newest = contract.complete_checkpoints(folder / "checkpoints")[-1]
    assert 5 <= int(newest.name.removeprefix("checkpoint-")) < 240
    bench.run_alone(folder, newest)
    bench.run([("training", alone)])
    assert losses(folder) == losses(alone)
    expected = weights(alone)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(folder).items())


def test_a_train_that_has_changed_nothing_gives_no_complete_model(bench: Bench) -> None:
    untrained = bench.training(tuning="lora", max_steps=1, learning_rate=1e-12)
    nothing = bench.saving(untrained, adapter=True)
    results = bench.run([("training", untrained), ("saving", nothing)])
    assert "training has changed nothing" in results[1]["refused"]


def test_texts_become_vectors_in_order_and_with_the_prompt_of_their_kind(bench: Bench) -> None:
    trained = bench.training(tuning="full", max_steps=2, query_prompt="what is ", document_prompt="check ")
    bench.run([("training", trained)])
    requests = bench.root / "requests.jsonl"
    asked: list[dict[str, Any]] = [
        {"texts": ["alarm 1", "belt", "alarm 1"]},
        {"texts": ["what is belt", "check belt"]},
        {"texts": ["belt"], "input_type": "query"},
        {"texts": ["belt"], "input_type": "document"},
        {"texts": []},
    ]
    write_rows(requests, asked)
    folder = bench.inference({"model": str(trained / "output")}, requests=str(requests))
    write_rows(bench.root / "wrong.jsonl", [{"texts": ["a"], "input_type": "passage"}])
    wrong = bench.inference({"model": str(trained / "output")}, requests=str(bench.root / "wrong.jsonl"))
    results = bench.run([("inference_complete", folder), ("inference_complete", wrong)])
    assert results[0]["rows"] == 5
    assert "request 1: input_type is 'passage', one of query, document" in results[1]["refused"]
    lines = (folder / "output" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    vectors = [torch.tensor(json.loads(line)["embeddings"]) for line in lines]
    assert [len(each) for each in vectors] == [3, 2, 1, 1, 0]
    assert torch.allclose(vectors[0][0], vectors[0][2], atol=1e-6)
    assert torch.allclose(vectors[2][0], vectors[1][0], atol=1e-6)
    assert torch.allclose(vectors[3][0], vectors[1][1], atol=1e-6)
    assert not torch.allclose(vectors[0][1], vectors[1][0], atol=1e-3)


def test_an_adapter_is_used_on_the_base_that_is_named_wherever_it_was_trained(bench: Bench) -> None:
    trained = bench.training(tuning="lora", max_steps=3, learning_rate=1e-2)
    bench.run([("training", trained)])
    moved = bench.root / "moved-base"
    shutil.copytree(bench.base, moved)
    config = trained / "output" / "adapter_config.json"
    named = json.loads(config.read_text())["base_model_name_or_path"]
    requests = bench.root / "one.jsonl"
    write_rows(requests, [{"texts": ["alarm 1"]}])
    here = bench.inference({"base_model": str(bench.base), "adapter": str(trained / "output")}, requests=str(requests))
    away = bench.inference({"base_model": str(moved), "adapter": str(trained / "output")}, requests=str(requests))
    plain = bench.inference({"model": str(bench.base)}, requests=str(requests))
    gone = bench.base.rename(bench.base.with_name("gone"))
    try:
        bench.run([("inference_customized", away)])
    finally:
        gone.rename(bench.base)
    bench.run([("inference_customized", here), ("inference_complete", plain)])
    found = [(folder / "output" / "predictions.jsonl").read_text() for folder in (here, away, plain)]
    assert found[0] == found[1] != found[2]
    assert json.loads(config.read_text())["base_model_name_or_path"] == named  # the model's own folder is left alone


# --- every parameter reaches what it is for -------------------------------------------------------------------------


def _argument(name: str) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda found, given: found["arguments"][name]


Check = tuple[list[dict[str, Any]], Callable[..., bool]]

CHECKS: dict[str, Check] = {
    "tuning": (
        [{"tuning": "lora"}, {"tuning": "full"}],
        lambda lora, full: all("lora_" in name for name in lora["trained"]) and len(full["trained"]) > 30,
    ),
    "lora_rank": ([{"lora_rank": 3}], lambda found: found["lora"][0] == 3),
    "lora_alpha": ([{"lora_alpha": 5}], lambda found: found["lora"][1] == 5),
    "lora_dropout": ([{"lora_dropout": 0.4}], lambda found: found["lora"][2] == 0.4),
    "lora_targets": (
        [{"lora_targets": "query,value"}],
        lambda found: {name.split(".lora_")[0].split(".")[-1] for name in found["trained"]} == {"query", "value"},
    ),
    "max_seq_length": (
        [{"max_seq_length": 8}, {"max_seq_length": 4000}],
        lambda short, long: (short["max_seq_length"], long["max_seq_length"]) == (8, 64) and max(short["lengths"]) == 8,
    ),
    "over_length": (
        [{"max_seq_length": 12, "over_length": each} for each in ("drop", "truncate", "error")],
        lambda drop, cut, error: 0 < drop["rows"] < 24 == cut["rows"] and "line " in error["refused"],
    ),
    "max_samples": ([{"max_samples": 7}], lambda found: found["rows"] == 7),
    "max_grad_norm": ([{"max_grad_norm": 0.7}], lambda found: found["arguments"]["max_grad_norm"] == 0.7),
    "epochs": ([{"epochs": 3.5}], lambda found: found["arguments"]["num_train_epochs"] == 3.5),
    "max_steps": ([{"max_steps": 9}], lambda found: found["arguments"]["max_steps"] == 9),
    "batch_size": ([{"batch_size": 6}], lambda found: [len(each) for each in found["batches"]] == [6, 6, 6, 6]),
    "grad_accum_steps": (
        [{"grad_accum_steps": 3}],
        lambda found: found["arguments"]["gradient_accumulation_steps"] == 3,
    ),
    "learning_rate": ([{"learning_rate": 3e-4}], lambda found: max(found["rates"]) == pytest.approx(3e-4)),
    "lr_scheduler": (
        [{"lr_scheduler": "linear", "warmup_steps": 0}, {"lr_scheduler": "constant"}],
        lambda linear, flat: (
            linear["rates"][10] == pytest.approx(linear["rates"][0] / 2) and len(set(flat["rates"])) == 1
        ),
    ),
    "lr_decay_ratio": (
        [{"lr_decay_ratio": 0.5, "learning_rate": 1e-3}],
        lambda found: found["rates"][-1] == pytest.approx(0.5e-3, rel=0.02),
    ),
    "warmup_steps": (
        [{"warmup_steps": 4, "warmup_ratio": 0.5}],
        lambda found: found["rates"].index(max(found["rates"])) == 4,
    ),
    "warmup_ratio": ([{"warmup_ratio": 0.5}], lambda found: found["rates"].index(max(found["rates"])) == 10),
    "weight_decay": ([{"weight_decay": 0.3}], lambda found: found["weight_decay"] == 0.3),
    "optimizer": (
        [{"optimizer": each} for each in ("adamw", "adafactor", "sgd")],
        lambda *found: [each["optimizer"][1] for each in found] == ["AdamW", "Adafactor", "SGD"],
    ),
    "checkpoint_steps": ([{"checkpoint_steps": 7}], lambda found: found["arguments"]["save_steps"] == 7),
    "evaluation_steps": (
        [{"evaluation_steps": 4, "validation": True}],
        lambda found: found["arguments"]["eval_steps"] == 4,
    ),
    "logging_steps": ([{"logging_steps": 5}], lambda found: found["arguments"]["logging_steps"] == 5),
    "gradient_checkpointing": (
        [{"gradient_checkpointing": True}],
        lambda found: found["arguments"]["gradient_checkpointing"] is True,
    ),
    "group_by_length": (
        [{"batch_size": 4}, {"batch_size": 4, "group_by_length": False}],
        lambda grouped, mixed: padding(grouped) < padding(mixed),
    ),
    "seed": (
        [{"seed": each} for each in (5, 5, 6)],
        lambda one, same, other: one["batches"] == same["batches"] != other["batches"],
    ),
    "dtype": (
        [{"dtype": "bfloat16", "tuning": "full"}, {"dtype": "float32"}, {"dtype": "float16"}],
        lambda half, whole, none: (
            (half["dtype"], whole["dtype"]) == ("torch.bfloat16", "torch.float32")
            and "float16 can be trained on a CUDA GPU only" in none["refused"]
        ),
    ),
    "loss": (
        [
            {"kind": "triplet", "loss": "triplet"},
            {"loss": "cached_multiple_negatives"},
            {"kind": "scored_pair", "loss": "cosine"},
            {"kind": "scored_pair"},
            {},
            {"loss": "cosent"},
        ],
        lambda *found: (
            [each["loss"][0] for each in found[:5]]
            == [
                "TripletLoss",
                "CachedMultipleNegativesRankingLoss",
                "CosineSimilarityLoss",
                "CoSENTLoss",
                "MultipleNegativesRankingLoss",
            ]
            and "loss cosent does not fit rows of the kind pair" in found[5]["refused"]
        ),
    ),
    "temperature": (
        [{"temperature": 0.1}, {"temperature": 0.1, "kind": "scored_pair"}],
        lambda pairs, scored: pairs["scale"] == scored["scale"] == 10,
    ),
    "mini_batch_size": (
        [{"mini_batch_size": 3, "loss": "cached_multiple_negatives"}],
        lambda found: found["mini_batch"] == 3,
    ),
    "triplet_margin": (
        [{"triplet_margin": 0.4, "kind": "triplet", "loss": "triplet"}],
        lambda found: found["margin"] == 0.4,
    ),
    "no_duplicates": (
        [{"batch_size": 12}, {"batch_size": 12, "no_duplicates": False, "group_by_length": False}],
        lambda unique, free: not twice(unique) and twice(free),
    ),
    "matryoshka_dims": (
        [{"matryoshka_dims": [8, 16]}, {"matryoshka_dims": [32]}],
        lambda found, long: (
            (found["loss"], found["dimensions"]) == (["MatryoshkaLoss", "MultipleNegativesRankingLoss"], [32, 16, 8])
            and "matryoshka_dims [32] are no part of a vector of 32 numbers" in long["refused"]
        ),
    ),
    "pooling": (
        [{"pooling": "cls"}, {}],
        lambda first, mean: (first["pooling"], mean["pooling"]) == ("cls", "mean"),
    ),
    "query_prompt": (
        [{"query_prompt": "q: "}],
        lambda found: (
            (found["prompts"]["query"], found["column_prompts"]) == ("q: ", {"anchor": "q: ", "positive": ""})
        ),
    ),
    "document_prompt": (
        [{"document_prompt": "d: ", "kind": "triplet"}],
        lambda found: (
            (found["prompts"]["document"], found["column_prompts"])
            == ("d: ", {"anchor": "", "positive": "d: ", "negative": "d: "})
        ),
    ),
}
# What shows in a train only: see below.
_TRAINED = {"keep_checkpoints", "keep_best", "early_stopping_patience", "early_stopping_threshold"}
_TRAINED |= {"stop_after_nonfinite"}


def padding(found: dict[str, Any]) -> int:
    lengths = found["lengths"]
    return sum(max(lengths[row] for row in batch) - lengths[row] for batch in found["batches"] for row in batch)


def twice(found: dict[str, Any]) -> bool:
    """Whether a batch has two rows with one positive: rows 2n and 2n + 1 share theirs."""
    return any(len({row // 2 for row in batch}) < len(batch) for batch in found["batches"])


@pytest.fixture(scope="module")
def described(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """What every case of the table has become, all of it in one process."""
    wanted = [(name, case) for name, (cases, _) in CHECKS.items() for case in cases]
    found = bench.describe(*(case for _, case in wanted))
    sorted_out: dict[str, list[dict[str, Any]]] = {}
    for (name, _), each in zip(wanted, found, strict=True):
        sorted_out.setdefault(name, []).append(each)
    return sorted_out


def test_every_parameter_is_in_the_table() -> None:
    method = find_method("embedding")
    assert {*method.hyperparameter_names, *method.parameters} == set(CHECKS) | _TRAINED


@pytest.mark.parametrize("name", CHECKS)
def test_every_parameter_reaches_what_it_is_for(described: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert CHECKS[name][1](*described[name]), json.dumps(described[name])[:2000]


def test_checkpoints_are_kept_as_asked_and_what_saves_memory_changes_no_loss(bench: Bench) -> None:
    # Without dropout, which draws other numbers for a batch in parts.
    base = bench.root / "without-dropout"
    shutil.copytree(bench.base, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    given: dict[str, Any] = {"max_steps": 7, "checkpoint_steps": 2, "keep_checkpoints": 3, "batch_size": 6}
    given |= {"base": base, "tuning": "lora", "learning_rate": 1e-2}
    plain, sparing = bench.training(**given), bench.training(gradient_checkpointing=True, **given)
    cached = bench.training(loss="cached_multiple_negatives", mini_batch_size=2, **given)
    bench.run([("training", folder) for folder in (plain, sparing, cached)])
    kept = [path.name for path in contract.complete_checkpoints(plain / "checkpoints")]
    assert kept == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]
    expected = [values[0] for values in curve(plain, "loss").values()]
    assert expected[-1] != expected[0]
    for folder in (sparing, cached):
        assert [values[0] for values in curve(folder, "loss").values()] == pytest.approx(expected, rel=1e-4)


def test_the_best_checkpoint_is_kept_and_a_train_stops_early_and_at_nan(bench: Bench) -> None:
    given: dict[str, Any] = {"batch_size": 6, "evaluation_steps": 1, "checkpoint_steps": 100, "keep_checkpoints": 1}
    given |= {"validation": True, "lr_scheduler": "constant", "learning_rate": 1e-2, "max_steps": 5}
    best = bench.training(tuning="lora", keep_best="eval_ndcg_at_10", **given)
    ended = bench.training(early_stopping_patience=2, early_stopping_threshold=1e9, **given)
    bench.run([("training", folder) for folder in (best, ended)])
    points = {step: values[0] for step, values in curve(best, "eval_ndcg_at_10").items()}
    step = min(points, key=lambda each: (-points[each], each))
    assert json.loads((best / contract.RESULT_FILE).read_text())["best_step"] == step
    kept = best / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors"
    assert (best / "output" / "adapter_model.safetensors").read_bytes() == kept.read_bytes()
    assert json.loads((ended / contract.RESULT_FILE).read_text())["steps"] == 3


def test_what_was_set_for_nothing_and_what_is_left_out_is_told(bench: Bench) -> None:
    folder = bench.training(triplet_margin=0.5, batch_size=24, max_steps=1)
    bench.run([("training", folder)])
    told = warnings_of(folder)
    assert "the loss multiple_negatives does not use triplet_margin (0.5): no effect" in told
    assert any(text.startswith("12 of 24 rows have a text that stands in every batch already") for text in told)


def test_models_and_rows_that_cannot_be_trained_are_refused(bench: Bench) -> None:
    own = bench.training(tuning="full", max_steps=1)
    bench.run([("training", own)])
    mixed = {"train": bench.rows("pair"), "validation": bench.rows("triplet")}
    results = bench.describe(
        {"base": own / "output", "pooling": "cls"},
        {"base": bench.root},
        {"rows": mixed},
        {"lora_targets": "queries"},
    )
    said = [each["refused"] for each in results]
    assert "has a pooling of its own" in said[0]
    assert "as an embedding model" in said[1]
    assert "the training rows are of the kind pair, those for validation not" in said[2]
    assert "lora_targets ['queries'] do not fit this model" in said[3]
