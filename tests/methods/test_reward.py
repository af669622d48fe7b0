"""Reward models of a tiny model: they rank what they have not seen, are saved whole, resume to the same, score."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from methods import contract
from methods.registry import find_method
from methods.reward import inference_complete, inference_customized, saving
from methods.toolkit import chat, merging, models, preference_rows, probing, scoring
from tasks.inference import Generation
from tasks.stages import StageCancelled, StageJob, StageKilled
from tests.methods import parameter_effects as effects
from tests.methods.preference_data import asked, pair_rows, polite_rows, ranking_rows, said, write_rows
from tests.methods.stage_jobs import curve, open_job, run_method, signal_running
from tests.methods.training_bench import Bench, interrupt_at, kill_stage, losses, same_as

pytestmark = pytest.mark.methods

METHOD = find_method("reward")
CURVES = ("loss", "learning_rate", "grad_norm", "tokens", "epoch", "reward", "reward_min", "reward_max")
CURVES += ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
RESUMED: dict[str, dict[str, Any]] = {
    "lora": {"epochs": 3, "batch_size": 4, "lora_dropout": 0.3, "learning_rate": 5e-3, "checkpoint_steps": 3}
    | {"keep_checkpoints": 10},
    "full": {"epochs": 3, "batch_size": 2, "grad_accum_steps": 2, "tuning": "full", "checkpoint_steps": 4}
    | {"keep_checkpoints": 10, "learning_rate": 1e-3, "multi_turn_share": 0.5},
}
STEPS = 18
TUNED: dict[str, dict[str, Any]] = {
    "lora": {"epochs": 3, "learning_rate": 5e-3},
    "qlora": {"epochs": 3, "learning_rate": 5e-3, "load_in_4bit": True},
    "full": {"epochs": 3, "learning_rate": 1e-3, "tuning": "full"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pair_rows())


@pytest.fixture
def bench(tiny_model: Path, rows: Path, tmp_path: Path) -> Bench:
    return Bench("reward", tiny_model, rows, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Job folders of trains left alone, LoRA and full."""
    bench = Bench("reward", tiny_model, rows, tmp_path_factory.mktemp("uninterrupted"))
    return {name: bench.train(**given) for name, given in RESUMED.items()}


@pytest.fixture(scope="module")
def trained(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What training leaves: an adapter with its head, one trained on a 4-bit base, full weights."""
    bench = Bench("reward", tiny_model, rows, tmp_path_factory.mktemp("trained"))
    return {name: bench.train(**given) / "output" for name, given in TUNED.items()}


def saving_job(folder: Path, base: Path, trained: Path, dtype: str = "auto") -> StageJob:
    adapter = (trained / "adapter_config.json").exists()
    inputs = {"base_model": str(base), "trained": str(trained), "adapter": adapter}
    return StageJob(stage="saving", parameters={"dtype": dtype}, inputs=inputs, output=folder / "output", seed=0)


def inference_job(folder: Path, **inputs: str) -> StageJob:
    """An inference job as `tasks.inference` makes it."""
    stage = "inference-customized" if "adapter" in inputs else "inference-complete"
    generation = Generation(batch_size=4).parameters()
    return StageJob(
        stage=stage, parameters={**generation, "dtype": "float32"}, inputs=inputs, output=folder / "output", seed=5
    )


def conversations(rows: Path) -> list[list[chat.Message]]:
    pairs = preference_rows.read_pairs(rows, -1)
    return [[*pair.prompt, *side] for pair in pairs for side in (pair.chosen, pair.rejected)]


def scores(model: Any, tokenizer_of: Path, texts: list[list[chat.Message]], **how: Any) -> list[float]:
    tokenizer, _ = chat.load_tokenizer(str(tokenizer_of))
    return scoring.score_conversations(model, tokenizer, texts, **how)


def load(base: Path, adapter: Path | None = None) -> Any:
    return models.load_with_adapter(str(base), str(adapter) if adapter else None, "float32", models.load_scorer)


def ranked_right(model: Any, tokenizer_of: Path, rows: Path) -> float:
    found = scores(model, tokenizer_of, conversations(rows))
    margins = [better - worse for better, worse in zip(found[::2], found[1::2], strict=True)]
    return sum(margin > 0 for margin in margins) / len(margins)


# --- training -------------------------------------------------------------------------------------------------------


def test_it_ranks_pairs_right_that_it_has_not_seen(tiny_model: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", polite_rows(320, seed=1))
    held_out = write_rows(tmp_path / "held_out.jsonl", polite_rows(60, seed=2))
    bench = Bench("reward", tiny_model, train, tmp_path / "jobs", held_back=held_out)
    given: dict[str, Any] = {"epochs": 3, "batch_size": 8, "learning_rate": 3e-3, "lora_rank": 16}
    folder = bench.train(validation=True, evaluation_steps=60, **given)
    torch.manual_seed(0)
    before = ranked_right(load(tiny_model), tiny_model, held_out)
    after = ranked_right(load(tiny_model, folder / "output"), tiny_model, held_out)
    print(f"held-out pairs ranked right: {before:.0%} -> {after:.0%}")
    assert before < 0.75
    assert after >= 0.9
    assert curve(folder, "eval_reward_accuracy")[120][0] == pytest.approx(after, abs=0.03)
    assert curve(folder, "eval_reward_margin")[120][0] > 1


def test_the_curves_of_training_and_evaluation_have_the_names_of_every_method(bench: Bench) -> None:
    folder = bench.train(validation=True, max_steps=2, evaluation_steps=1)
    expected = [*CURVES, "tokens_per_second", "padding_share", "memory_gib", "eval_loss"]
    expected += [f"eval_{name}" for name in CURVES if name.startswith("reward")]
    assert [name for name in expected if sorted(curve(folder, name)) != [1, 2]] == []
    for step in (1, 2):
        chosen, rejected, margin = (
            curve(folder, f"reward_{name}")[step][0] for name in ("chosen", "rejected", "margin")
        )
        assert chosen - rejected == pytest.approx(margin, abs=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_train_goes_on_from_a_checkpoint_as_if_it_had_not_been_interrupted(
    bench: Bench, uninterrupted: dict[str, Path], tuning: str
) -> None:
    step = 9 if tuning == "lora" else 8
    again = bench.go_on(uninterrupted[tuning], step, **RESUMED[tuning])
    same_as(uninterrupted[tuning], again, CURVES, STEPS, first=step + 1)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_killed_train_resumes_to_the_same_curves_and_weights(
    bench: Bench, tmp_path: Path, uninterrupted: dict[str, Path], tuning: str
) -> None:
    step = random.randrange(5, 14)  # noqa: S311
    print("killed at step", step)
    folder, given = tmp_path / "killed", RESUMED[tuning]
    killer = interrupt_at(folder, step, lambda: kill_stage(folder))
    with pytest.raises(StageKilled):
        run_method(folder, bench.stage_job(folder, **given), method="reward")
    killer.join()
    newest = contract.complete_checkpoints(folder / "checkpoints")[-1]
    run_method(folder, bench.stage_job(folder, resume=newest, **given), method="reward")
    same_as(uninterrupted[tuning], folder, CURVES, STEPS)


def test_a_cancelled_train_saves_a_checkpoint_and_resumes_to_the_same(
    bench: Bench, tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    folder = tmp_path / "cancelled"
    canceller = interrupt_at(folder, 7, lambda: signal_running(folder))
    with pytest.raises(StageCancelled):
        run_method(folder, bench.stage_job(folder, **RESUMED["lora"]), method="reward")
    canceller.join()
    newest = contract.complete_checkpoints(folder / "checkpoints")[-1]
    assert int(newest.name.rpartition("-")[2]) == max(curve(folder, "loss"))
    run_method(folder, bench.stage_job(folder, resume=newest, **RESUMED["lora"]), method="reward")
    same_as(uninterrupted["lora"], folder, CURVES, STEPS)


def test_the_head_is_trained_and_the_seed_decides_where_it_starts(bench: Bench) -> None:
    def head(trainer: Any) -> torch.Tensor:
        return next(p for name, p in trainer.model.named_parameters() if "score" in name and p.requires_grad).detach()

    first = head(bench.build(seed=1))
    assert first.shape == (1, 64)
    assert torch.equal(first, head(bench.build(seed=1)))
    assert not torch.equal(first, head(bench.build(seed=2)))
    folder = bench.train(seed=1, max_steps=3, learning_rate=1e-2)
    saved = load_file(folder / "output" / "adapter_model.safetensors")
    assert not torch.equal(saved["base_model.model.score.weight"], first)


def test_rankings_are_trained_in_every_pair(bench: Bench, tmp_path: Path) -> None:
    bench.rows = write_rows(tmp_path / "rankings.jsonl", ranking_rows())
    folder = bench.train(epochs=8, learning_rate=5e-3)
    report = json.loads((folder / "rows.json").read_text())["train"]
    assert (report["read"], report["pairs"], report["kept"]) == (7, 20, 20)
    assert losses(folder)[-1] < 0.8 * losses(folder)[0]


def test_score_margins_of_rows_without_scores_are_refused(bench: Bench) -> None:
    with pytest.raises(contract.Refused, match="score_margins is for ranked rows"):
        bench.build(score_margins=True)


# --- every parameter reaches what it is for -------------------------------------------------------------------------


def _center(bench: Bench) -> None:
    plain, centred = bench.losses(max_steps=1), bench.losses(max_steps=1, center_rewards_coefficient=5.0)
    assert centred[0] > plain[0]
    assert bench.build().args.center_rewards_coefficient is None


def _ranking_pairs(bench: Bench) -> None:
    bench.rows = write_rows(bench.root / "rankings.jsonl", ranking_rows())
    assert len(bench.build(ranking_pairs="best").train_dataset) == 14
    assert len(bench.build(ranking_pairs="all").train_dataset) == 20


def _score_margins(bench: Bench) -> None:
    bench.rows = write_rows(bench.root / "rankings.jsonl", ranking_rows())
    assert sorted(set(bench.build(score_margins=True).train_dataset["margin"])) == [1.0, 2.0, 2.5, 3.0]
    asking, plain = bench.losses(score_margins=True, max_steps=1), bench.losses(max_steps=1)
    assert asking[0] > plain[0] + 0.5


def _multi_turn_share(bench: Bench) -> None:
    plain, longer = (sum(bench.build(multi_turn_share=share).train_dataset["length"]) for share in (0.0, 1.0))
    assert longer > 1.5 * plain
    held_back = [bench.build(validation=True, multi_turn_share=s).eval_dataset["length"] for s in (0.0, 1.0)]
    assert held_back[0] == held_back[1]


def _tuning(bench: Bench) -> None:
    full, lora = bench.build(tuning="full").model, bench.build(tuning="lora").model
    assert all(p.requires_grad for p in full.parameters())
    trained = {name.split(".")[-3] for name, p in lora.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "modules_to_save"}


def _lora_dropout(bench: Bench) -> None:
    effects.lora("lora_dropout", "lora_dropout", 0.4)(bench)
    modules = dict(bench.build(lora_dropout=0.4).model.named_modules())
    assert {m.p for name, m in modules.items() if "lora_dropout" in name and hasattr(m, "p")} == {0.4}


EFFECTS: dict[str, effects.Effect] = {
    **effects.COMMON,
    "tuning": _tuning,
    "lora_dropout": _lora_dropout,
    "max_seq_length": effects.kept("max_seq_length", 42, 21),
    "max_input_length": effects.kept("max_input_length", 33, 21),
    "max_content_length": effects.kept("max_content_length", 8, 21),
    "over_length": effects.over_length(42, 21),
    "center_rewards_coefficient": _center,
    "ranking_pairs": _ranking_pairs,
    "score_margins": _score_margins,
    "multi_turn_share": _multi_turn_share,
}


@pytest.mark.parametrize("field", METHOD.parameters)
def test_every_parameter_of_its_own_reaches_what_it_is_for(bench: Bench, field: str) -> None:
    EFFECTS[field](bench)


@pytest.mark.parametrize("field", METHOD.hyperparameter_names)
def test_every_common_parameter_reaches_what_it_is_for(bench: Bench, field: str) -> None:
    EFFECTS[field](bench)


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TUNED))
def test_a_complete_model_is_self_contained_and_scores_as_what_was_trained(
    tiny_model: Path, rows: Path, trained: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    result = saving.main(open_job(tmp_path, saving_job(tmp_path, tiny_model, trained[name])))
    output = tmp_path / "output"
    found = AutoModelForSequenceClassification.from_pretrained(output).eval()
    assert found.config.num_labels == 1
    assert found.config.pad_token_id == chat.load_tokenizer(str(output))[0].pad_token_id
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert "quantization_config" not in (output / "config.json").read_text()
    assert {"tokenizer.json", probing.PROBES_FILE, "model.safetensors"} <= {path.name for path in output.iterdir()}
    texts = conversations(rows)
    reference = load(tiny_model, trained[name]) if name != "full" else load(trained[name])
    expected = scores(reference, tiny_model, texts)
    assert scores(found, output, texts) == pytest.approx(expected, abs=1e-3)
    assert max(expected) - min(expected) > 0.5
    figures: Any = result["verification"]
    assert 0 <= figures["merged_to_reference"] <= figures["tolerance"] < figures["merged_to_base"]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_base_without_a_pad_token_gives_one_score_alone_in_a_batch_and_saved(
    tiny_model: Path, rows: Path, tmp_path: Path, tuning: str
) -> None:
    base = tmp_path / "no-pad"
    shutil.copytree(tiny_model, base)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((base / name).read_text())
        kept = {field: value for field, value in content.items() if field not in ("pad_token", "pad_token_id")}
        (base / name).write_text(json.dumps(kept))
    job = Bench("reward", base, rows, tmp_path / "jobs").train(epochs=1, learning_rate=5e-3, tuning=tuning)
    output = job / "output"
    saving.main(open_job(tmp_path / "saving", saving_job(tmp_path / "saving", base, output)))
    saved = tmp_path / "saving" / "output"
    texts = conversations(rows)[:6]
    trained = load(base, output) if tuning == "lora" else load(output)
    alone = [scores(trained, output, [text])[0] for text in texts]
    assert len(set(alone)) > 1
    assert scores(trained, output, texts) == pytest.approx(alone, abs=1e-4)
    # By the library alone, which reads the pad token in the folder.
    whole = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    tokenizer, _ = chat.load_tokenizer(str(saved))
    with torch.no_grad():
        rendered = [torch.tensor([scoring.scored_tokens(tokenizer, text)]) for text in texts]
        assert [float(whole(ids).logits) for ids in rendered] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_in_half_precision_are_within_what_rounding_explains(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    result = saving.main(open_job(tmp_path, saving_job(tmp_path, tiny_model, trained["lora"], dtype)))
    print(result["verification"])
    tensors = load_file(tmp_path / "output" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("part", ["score.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_corrupted_model_is_not_called_complete(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path, part: str
) -> None:
    job = open_job(tmp_path, saving_job(tmp_path, tiny_model, trained["lora"]))
    saving.save_complete(job, "float32")
    saving.verify(job, "float32")
    file = job.output / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, part: tensors[part] * 1.5}, file, metadata={"format": "pt"})
    with pytest.raises(contract.Refused, match="the saved weights are not the trained ones"):
        saving.verify(job, "float32")


def test_the_base_under_the_trained_head_is_not_called_complete(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    job = open_job(tmp_path, saving_job(tmp_path, tiny_model, trained["lora"]))
    model = models.load_scorer(str(tiny_model), "float32")
    head = load_file(trained["lora"] / "adapter_model.safetensors")["base_model.model.score.weight"]
    model.score.weight.data = head
    merging.save_weights(model, job.output, "float32")
    with pytest.raises(contract.Refused, match="training has changed nothing"):
        saving.verify(job, "float32")


def test_the_saving_stage_works_as_a_process_of_its_own(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    result = run_method(tmp_path, saving_job(tmp_path, tiny_model, trained["full"]), method="reward")
    assert (result["model"], result["dtype"]) == (str(tmp_path / "output"), "float32")


# --- inference ------------------------------------------------------------------------------------------------------


def test_scores_in_batches_equal_those_one_by_one_and_keep_their_order(
    tiny_model: Path, rows: Path, trained: dict[str, Path]
) -> None:
    model, texts = load(tiny_model, trained["lora"]), conversations(rows)
    alone = [scores(model, tiny_model, [text])[0] for text in texts]
    assert len(set(alone)) > 30
    for size in (2, 7, 100):
        assert scores(model, tiny_model, texts, batch_size=size) == pytest.approx(alone, abs=1e-5)


def test_scores_are_those_that_the_model_had_in_training(bench: Bench, tiny_model: Path) -> None:
    folder = bench.train(max_steps=1, batch_size=21, warmup_steps=5)  # whose rate is 0 in its first step
    found = scores(load(tiny_model, folder / "output"), tiny_model, conversations(bench.rows))
    expected = {"chosen": found[::2], "rejected": found[1::2]}
    for side, values in expected.items():
        assert curve(folder, f"reward_{side}")[1][0] == pytest.approx(sum(values) / 21, abs=1e-4)


def test_requests_are_scored_by_a_customized_and_a_complete_model_alike(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    saving.main(open_job(tmp_path / "save", saving_job(tmp_path / "save", tiny_model, trained["lora"])))
    requests = [
        {"prompt": asked("switch the light in the hall on"), "answers": ["hall on", "no", "a\u2028b"]},
        {"prompt": asked("off"), "answers": ["off"]},
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in requests), encoding="utf-8")
    weights = {"base_model": str(tiny_model), "adapter": str(trained["lora"])}
    job = inference_job(tmp_path / "a", requests=str(file), **weights)
    result = inference_customized.main(open_job(tmp_path / "a", job))
    assert (result["rows"], result["answers"]) == (2, 4)
    complete = inference_job(tmp_path / "b", requests=str(file), model=str(tmp_path / "save" / "output"))
    inference_complete.main(open_job(tmp_path / "b", complete))
    found = [
        [json.loads(line)["scores"] for line in (tmp_path / name / "output" / "predictions.jsonl").open()]
        for name in ("a", "b")
    ]
    assert [len(each) for each in found[0]] == [3, 1]
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    texts = [[*asked("switch the light in the hall on"), *said(answer)] for answer in ("hall on", "no", "a\u2028b")]
    assert found[0][0] == pytest.approx(scores(load(tiny_model, trained["lora"]), tiny_model, texts), abs=1e-5)


def test_evaluation_rows_give_accuracy_and_margin(
    tiny_model: Path, rows: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    weights = {"base_model": str(tiny_model), "adapter": str(trained["lora"])}
    job = inference_job(tmp_path / "a", evaluation_rows=str(rows), **weights)
    result: Any = inference_customized.main(open_job(tmp_path / "a", job))
    found = scores(load(tiny_model, trained["lora"]), tiny_model, conversations(rows))
    margins = [better - worse for better, worse in zip(found[::2], found[1::2], strict=True)]
    assert result["figures"] == {
        "accuracy": sum(margin > 0 for margin in margins) / 21,
        "margin": pytest.approx(sum(margins) / 21, abs=1e-5),
    }
    assert result["figures"]["accuracy"] > 0.9
    rankings = write_rows(tmp_path / "rankings.jsonl", ranking_rows())
    job = inference_job(tmp_path / "b", evaluation_rows=str(rankings), **weights)
    assert inference_customized.main(open_job(tmp_path / "b", job))["pairs"] == 20
    # A base model has no head: what it scores is by chance, but the same chance each time.
    figures = []
    for name in ("c", "d"):
        job = inference_job(tmp_path / name, evaluation_rows=str(rows), model=str(tiny_model))
        figures.append(inference_complete.main(open_job(tmp_path / name, job))["figures"])
    assert figures[0] == figures[1]


def test_a_cancelled_scoring_ends_after_its_batch(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    job = open_job(tmp_path, inference_job(tmp_path, evaluation_rows=str(rows), model=str(tiny_model)))
    job.cancelled = True
    with pytest.raises(contract.Cancelled):
        inference_complete.main(job)


def test_no_request_gives_no_score(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text("")
    job = inference_job(tmp_path, requests=str(tmp_path / "requests.jsonl"), model=str(tiny_model))
    assert inference_complete.main(open_job(tmp_path, job))["rows"] == 0


def test_a_base_whose_architecture_has_no_scores_is_refused_by_its_type(tmp_path: Path) -> None:
    from tests.families.family_models import BY_NAME, make_model

    base = make_model(BY_NAME["Granite"], tmp_path / "base")
    with pytest.raises(contract.Refused, match="no sequence classification for models of the type granite"):
        models.load_scorer(str(base), "float32")
