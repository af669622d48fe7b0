"""Continued pre-training on a tiny model: losses, resumed trains, saving, and what held-out documents gain."""

from __future__ import annotations

import json
import math
import shutil
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.train import Hyperparameters, TrainConfig
from methods import contract
from methods.pretrain import perplexity
from methods.pretrain.check import make_documents
from methods.registry import find_method
from methods.toolkit import chat, documents, models, probing
from tasks.launching import launcher
from tasks.stages import StageJob, run_stage
from tests.methods import parameter_effects as effects
from tests.methods.stage_jobs import curve, open_job, run_method
from tests.methods.training_bench import Bench, result_of, same_as

CURVES = ("loss", "learning_rate", "grad_norm", "token_accuracy", "tokens", "epoch")
SMALL = {"max_seq_length": 64, "batch_size": 4, "learning_rate": 5e-3, "dtype": "float32"}


class TextBench(Bench):
    """Trains on documents, each in a block of its own unless a test says otherwise."""

    def stage_job(self, folder: Path, *, validation: bool = False, **given: Any) -> StageJob:
        return super().stage_job(folder, validation=validation, **{"max_seq_length": 256, "packing": False, **given})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 documents of three lengths."""
    path = tmp_path_factory.mktemp("documents") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_documents(21)), encoding="utf-8")
    return path


@pytest.fixture
def bench(tiny_model: Path, rows: Path, tmp_path: Path) -> TextBench:
    return TextBench("pretrain", tiny_model, rows, tmp_path)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Job folders of trains on packed blocks, by what was trained."""
    bench = Bench("pretrain", tiny_model, rows, tmp_path_factory.mktemp("trained"))
    hyper: dict[str, Any] = {**SMALL, "max_steps": 10, "checkpoint_steps": 4, "keep_checkpoints": 9}
    return {
        "lora": bench.train(validation=True, lora_dropout=0.2, evaluation_steps=5, **hyper),
        "full": bench.train(tuning="full", separate_documents=True, **hyper),
        "4bit": bench.train(load_in_4bit=True, **hyper),
    }


def test_the_first_loss_is_the_mean_over_all_tokens_of_the_blocks(bench: TextBench, tiny_model: Path) -> None:
    folder = bench.train(packing=True, max_steps=1, batch_size=3, max_seq_length=64)
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    stream = [i for _, text in documents.read_texts(bench.rows) for i in documents.document_ids(tokenizer, text)]
    cut = [stream[first : first + 64] for first in range(0, len(stream), 64)]
    chosen = list(bench.build(packing=True, batch_size=3, max_seq_length=64)._get_train_sampler())[:3]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    nats, count = 0.0, 0
    with torch.no_grad():
        for ids in (cut[place] for place in chosen):
            likely = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            nats -= sum(float(likely[place, token]) for place, token in enumerate(ids[1:]))
            count += len(ids) - 1
    assert curve(folder, "loss")[1] == [pytest.approx(nats / count, rel=1e-5)]
    assert curve(folder, "tokens")[1] == [sum(len(cut[place]) for place in chosen)]


def test_the_loss_of_separate_documents_is_that_of_each_by_itself(bench: TextBench, tiny_model: Path) -> None:
    # 21 documents in one row: were they to see each other, their losses would be others.
    given: dict[str, Any] = {"max_steps": 1, "packing": True, "max_seq_length": 512, "batch_size": 30}
    folder = bench.train(separate_documents=True, **given)
    together = bench.train(**given)
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    found = [documents.document_ids(tokenizer, text) for _, text in documents.read_texts(bench.rows)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    parts = []
    for block in documents.packed(found, 512):
        ends = [*block.starts, len(block.ids)] if block.starts[:1] == [0] else [0, *block.starts, len(block.ids)]
        parts += [block.ids[one:other] for one, other in pairwise(ends) if other - one > 1]
    with torch.no_grad():
        sums = [float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) * (len(ids) - 1) for ids in parts]
    expected = sum(sums) / sum(len(ids) - 1 for ids in parts)
    assert curve(folder, "loss")[1] == [pytest.approx(expected, rel=1e-5)]
    assert curve(together, "loss")[1] != [pytest.approx(expected, rel=1e-4)]
    assert curve(folder, "tokens")[1] == curve(together, "tokens")[1] == [sum(map(len, found))]
    assert 0 < curve(folder, "padding_share")[1][0] < 1


@pytest.mark.parametrize(
    ("name", "given"),
    [("lora", {"lora_dropout": 0.2, "evaluation_steps": 5, "validation": True}), ("full", {"tuning": "full"})],
)
def test_a_resumed_train_is_the_uninterrupted_one(
    bench: Bench, trained: dict[str, Path], name: str, given: dict[str, Any]
) -> None:
    own = {"packing": True, "separate_documents": name == "full"}
    hyper = {**SMALL, "max_steps": 10, "checkpoint_steps": 4, "keep_checkpoints": 9}
    resumed = bench.go_on(trained[name], 4, **own, **hyper, **given)
    # An evaluation logs the epoch once more.
    same_as(trained[name], resumed, tuple(curve for curve in CURVES if curve != "epoch"), 10, first=5)


def test_perplexity_is_the_exponential_of_the_validation_loss(trained: dict[str, Path]) -> None:
    found = curve(trained["lora"], "eval_perplexity")
    assert list(found) == [5, 10]
    for step, (value,) in found.items():
        assert value == pytest.approx(math.exp(curve(trained["lora"], "eval_loss")[step][0]))
    assert found[10][0] < found[5][0]


def test_the_blocks_are_gone_after_the_train(trained: dict[str, Path]) -> None:
    assert list(trained["full"].rglob("*.arrow")) == []


def test_more_tokens_than_the_base_reads_are_refused_before_the_train(bench: TextBench) -> None:
    with pytest.raises(contract.Refused, match="max_seq_length is 513, and the base model reads at most 512"):
        bench.build(max_seq_length=513)


@pytest.mark.parametrize("name", ["lora", "full", "4bit"])
def test_what_was_trained_is_saved_whole_and_answers(
    trained: dict[str, Path], tiny_model: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    adapter = name != "full"
    folder = trained[name] / "output"
    assert result_of(trained[name])["adapter"] is adapter
    inputs: dict[str, Any] = {"base_model": str(tiny_model), "trained": str(folder), "adapter": adapter}
    saved = _stage(tmp_path / "saving", "saving", {"dtype": "float32"}, inputs)
    proof = saved["verification"]
    assert proof["merged_to_reference"] < proof["tolerance"] < proof["merged_to_base"]
    assert probing.read_probes(Path(saved["model"])) == probing.read_probes(folder)

    whole = {"model": str(saved["model"])}
    tuned = {"base_model": str(tiny_model), "adapter": str(folder)} if adapter else {"model": str(folder)}
    figures = [
        _measured(tmp_path / str(number), inputs, rows)
        for number, inputs in enumerate(({"model": str(tiny_model)}, tuned, whole))
    ]
    assert figures[1] == pytest.approx(figures[2], rel=1e-3)
    assert all(after < 0.9 * before for before, after in zip(figures[0].values(), figures[1].values(), strict=True))

    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"text": "The light in the"}\n{"text": "Its number"}\n')
    told = _stage(tmp_path / "asked", _stage_of(tuned), _asking(), {**tuned, "requests": str(requests)})
    answers = [json.loads(line) for line in Path(str(told["predictions"])).read_text().splitlines()]
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    assert [answer["prompt_token_ids"] for answer in answers] == [
        documents.text_ids(tokenizer, text) for text in ("The light in the", "Its number")
    ]
    assert all(answer["tokens"] == 4 for answer in answers)


def _asking() -> dict[str, Any]:
    return {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": 50, "batch_size": 4, "dtype": "float32"}


def _stage_of(inputs: dict[str, str]) -> str:
    return "inference-customized" if "adapter" in inputs else "inference-complete"


def _measured(folder: Path, inputs: dict[str, str], rows: Path) -> dict[str, float]:
    told = _stage(folder, _stage_of(inputs), _asking(), {**inputs, "evaluation_rows": str(rows)})
    figures: dict[str, float] = told["figures"]
    return figures


def _stage(folder: Path, stage: str, parameters: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """The stage's own main, in this process: what it takes to start one each time is seconds."""
    job = StageJob(stage=stage, parameters=parameters, inputs=inputs, output=folder / "output", seed=1)
    file = find_method("pretrain").stage_file(stage)  # type: ignore[arg-type]
    told: dict[str, Any] = import_module(f"methods.pretrain.{file.stem}").main(open_job(folder, job))
    return told


def test_held_out_documents_are_predicted_better_after_training(
    bench: TextBench, tiny_model: Path, tmp_path: Path
) -> None:
    held_out = [row["text"].replace("Its number is", "It is number") for row in make_documents(30)[21:]]
    folder = bench.train(packing=True, tuning="full", epochs=10, **SMALL)
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    before, after = (
        perplexity.measure(models.load_model(str(path), "float32").eval(), tokenizer, held_out)
        for path in (tiny_model, folder / "output")
    )
    assert after["perplexity"] < before["perplexity"] / 5
    assert after["bits_per_byte"] < before["bits_per_byte"]


def test_the_figures_are_those_of_an_independent_computation(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    texts = ["The light in the kitchen is on.", "灯 off"]
    nats, tokens = 0.0, 0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        with torch.no_grad():
            likely = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats -= sum(float(likely[place, token]) for place, token in enumerate(ids[1:]))
        tokens += len(ids) - 1
    characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    expected = {
        "perplexity": math.exp(nats / tokens),
        "bits_per_character": nats / math.log(2) / characters,
        "bits_per_byte": nats / math.log(2) / size,
    }
    assert perplexity.measure(model, tokenizer, texts) == pytest.approx(expected, rel=1e-4)
    assert size > characters


def test_a_long_document_is_read_in_windows_and_every_token_is_asked_for_once(tiny_model: Path) -> None:
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    text = "switch the light in the kitchen on and off"
    ids = [tokenizer.eos_token_id, *documents.text_ids(tokenizer, text)]
    spans = list(perplexity.spans_of(tokenizer, text, 8))
    assert [token for span in spans for token in span.input_ids[span.prompt_length :]] == ids[1:]
    assert all(len(span.input_ids) <= 8 for span in spans)
    assert [span.prompt_length for span in spans] == [1] + [4] * (len(spans) - 1)
    assert spans[1].input_ids == ids[4:12]


def test_a_template_that_takes_no_user_is_told_of_and_the_train_goes_on(
    bench: TextBench, tmp_path: Path, tiny_model: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    bench.base = base
    folder = bench.train(max_steps=1)
    events = (folder / contract.EVENTS_FILE).read_text()
    assert "not be served by chat" in events
    assert "no users here" in events
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    first = probing.read_probes(folder / "output")[0]
    assert first["prompt_token_ids"][:3] == documents.text_ids(tokenizer, "The light in")[:3]


@pytest.mark.methods
def test_a_stage_runs_as_the_system_starts_it(bench: TextBench, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    result = run_method(folder, bench.stage_job(folder, max_steps=1, packing=True), method="pretrain")
    assert (result["steps"], result["adapter"]) == (1, True)


@pytest.mark.methods
def test_two_processes_are_one_with_twice_the_batch(bench: TextBench, tiny_model: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {**SMALL, "packing": True, "separate_documents": True, "max_steps": 4}
    alone = bench.train(**given)
    config = TrainConfig(name="t", base_model="b", dataset="d", distribution="ddp", processes=2)
    folder = tmp_path / "spread"
    folder.mkdir()
    method = find_method("pretrain")
    python, file = method.stage_python("training"), method.stage_file("training")
    job = bench.stage_job(folder, **{**given, "batch_size": 2})
    run_stage(folder, job, python, file, 60, lambda events: None, launcher(config, folder, on_gpus=False))
    for name in ("loss", "tokens", "token_accuracy", "learning_rate"):
        expected, found = curve(alone, name), curve(folder, name)
        assert list(found) == list(expected)
        assert all(found[step] == pytest.approx(values, rel=2e-4) for step, values in expected.items()), name
    assert list(folder.rglob("*.arrow")) == []


# --- every parameter reaches what it is for -------------------------------------------------------------------------


def _tuning(bench: Bench) -> None:
    full, lora = bench.build(tuning="full").model, bench.build(tuning="lora").model
    assert all(p.requires_grad for p in full.parameters())
    assert {name.split(".")[-3] for name, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def _max_seq_length(bench: Bench) -> None:
    assert max(bench.build(max_seq_length=40, packing=True).train_dataset["length"]) == 40
    assert max(bench.build(max_seq_length=50, packing=True).train_dataset["length"]) == 50


def _packing(bench: Bench) -> None:
    apart, packed = bench.build(packing=False), bench.build(packing=True)
    assert len(apart.train_dataset) == 21
    assert packed.train_dataset["length"][:-1] == [256] * (len(packed.train_dataset) - 1)


def _separate_documents(bench: Bench) -> None:
    def batch(trainer: Any) -> set[str]:
        return set(next(iter(trainer.get_train_dataloader())))

    assert "position_ids" in batch(bench.build(packing=True, separate_documents=True))
    assert "attention_mask" in batch(bench.build(packing=True))
    trainer = bench.build(packing=False, separate_documents=True)
    assert "attention_mask" in batch(trainer)
    assert "no effect with packing: false" in (trainer.job.folder / contract.EVENTS_FILE).read_text()


EFFECTS: dict[str, effects.Effect] = {
    **effects.COMMON,
    "tuning": _tuning,
    "max_seq_length": _max_seq_length,
    "packing": _packing,
    "separate_documents": _separate_documents,
}


@pytest.mark.parametrize("field", [*find_method("pretrain").hyperparameter_names, *find_method("pretrain").parameters])
def test_every_parameter_reaches_what_it_is_for(bench: Bench, field: str) -> None:
    EFFECTS[field](bench)


def test_what_the_method_does_not_use_is_refused_and_not_ignored() -> None:
    unused = set(Hyperparameters.model_fields) - set(find_method("pretrain").hyperparameter_names)
    of_answers = {"train_on", "turns", "thinking", "chat_template_kwargs"}
    assert unused == {"max_input_length", "max_content_length", "over_length", "num_generations"} | of_answers
