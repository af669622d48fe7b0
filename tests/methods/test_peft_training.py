"""Every technique of the method peft on a tiny model: it learns, resumes exactly, and uses what it is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModelForCausalLM
from safetensors.torch import load_file

from methods import contract
from methods.peft import adalora, techniques, training
from methods.registry import find_method
from methods.toolkit import chat, generating, models
from tasks.stages import EventTail, StageCancelled
from tests.methods.stage_jobs import curve, open_job, run_method, signal_running, training_job
from tests.methods.test_sft_training import EFFECTS
from tests.methods.training_bench import Bench, interrupt_at, losses, weights

pytestmark = pytest.mark.methods

TECHNIQUES = sorted(techniques.TECHNIQUES)
RATES = {
    "lora": 5e-3,
    "dora": 5e-3,
    "rslora": 5e-3,
    "adalora": 2e-2,
    "ia3": 2e-2,
    "prompt_tuning": 0.1,
    "p_tuning": 5e-3,
    "prefix_tuning": 3e-2,
    "llama_adapter": 3e-2,
}
"""Learning rates at which the tiny model learns within a few steps."""
PROMPTS = ["p_tuning", "prefix_tuning", "prompt_tuning"]
# 21 rows in batches of 6: four steps an epoch, the last one short; dropout draws random numbers at every step.
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 6, "lora_dropout": 0.3, "checkpoint_steps": 3}
OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "p_tuning": {"encoder_type": "lstm", "encoder_hidden_size": 16, "encoder_dropout": 0.3},
    "prefix_tuning": {"prefix_projection": True, "encoder_hidden_size": 16},
}
"""What makes a resume hardest: weights that the saved adapter does not hold."""


@pytest.fixture
def bench(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Bench:
    return Bench("peft", tiny_model, tiny_rows, tmp_path)


def given(technique: str, **more: Any) -> dict[str, Any]:
    return {"technique": technique, "learning_rate": RATES[technique], **more}


def warnings_of(folder: Path) -> list[str]:
    events = EventTail(folder / contract.EVENTS_FILE).read()
    return [event["text"] for event in events if event["type"] == "warning"]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_learns_and_resumes_to_the_same_curves_and_weights(
    bench: Bench, tmp_path: Path, technique: str
) -> None:
    parameters = given(technique, **SHORT, **OF_ITS_OWN.get(technique, {}), keep_checkpoints=9)
    alone = bench.train(validation=True, **parameters)
    measured = [values[0] for _, values in sorted(curve(alone, "eval_loss").items())]
    before = bench.build(validation=True, **parameters).evaluate()["eval_loss"]
    print(f"{technique}: evaluation loss {before:.3f} before, then {measured}")
    assert measured[1] < measured[0] < before

    checkpoint = tmp_path / "resumed" / "checkpoints" / "checkpoint-3"
    shutil.copytree(alone / "checkpoints" / "checkpoint-3", checkpoint)
    job = bench.stage_job(tmp_path / "resumed", validation=True, resume=checkpoint, **parameters)
    result = training.main(open_job(tmp_path / "resumed", job))
    assert result["steps"] == 8
    for name in ("loss", "grad_norm", "learning_rate", "tokens", "eval_loss"):
        expected, found = curve(alone, name), curve(tmp_path / "resumed", name)
        assert found == {step: values for step, values in expected.items() if step > 3}, name
    expected_weights, found_weights = weights(alone), weights(tmp_path / "resumed")
    assert expected_weights.keys() == found_weights.keys()
    assert all(torch.equal(found_weights[name], tensor) for name, tensor in expected_weights.items())


def test_a_checkpoint_and_the_end_save_the_prompt_itself_and_draw_no_random_numbers(bench: Bench) -> None:
    parameters = given("p_tuning", epochs=2, batch_size=6, **OF_ITS_OWN["p_tuning"])
    often = bench.train(checkpoint_steps=1, keep_checkpoints=9, **parameters)
    seldom = bench.train(checkpoint_steps=100, **parameters)
    assert curve(often, "loss") == curve(seldom, "loss")
    saved = load_file(often / "checkpoints" / "checkpoint-8" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(saved, weights(often)["prompt_embeddings"])


def test_a_cancelled_train_resumes_in_a_process_of_its_own_to_the_same(bench: Bench, tmp_path: Path) -> None:
    parameters = given("p_tuning", epochs=8, batch_size=4, **OF_ITS_OWN["p_tuning"])
    folder = tmp_path / "cancelled"
    canceller = interrupt_at(folder, 5, lambda: signal_running(folder))
    with pytest.raises(StageCancelled):
        run_method(folder, bench.stage_job(folder, **parameters), method="peft")
    canceller.join()
    newest = contract.complete_checkpoints(folder / "checkpoints")[-1]
    run_method(folder, bench.stage_job(folder, resume=newest, **parameters), method="peft")
    alone = bench.train(**parameters)
    assert losses(folder) == losses(alone)
    assert torch.equal(weights(folder)["prompt_embeddings"], weights(alone)["prompt_embeddings"])


def test_prompt_tuning_lowers_the_evaluation_loss_with_less_than_a_hundredth_of_the_parameters(
    bench: Bench,
) -> None:
    # Half of the rows are held back; the rate is the one that Qianfan documents as its default.
    lines = bench.rows.read_text(encoding="utf-8").splitlines(keepends=True)
    train, held_back = bench.root / "train.jsonl", bench.root / "held_back.jsonl"
    train.write_text("".join(lines[::2]), encoding="utf-8")
    held_back.write_text("".join(lines[1::2]), encoding="utf-8")
    parameters: dict[str, Any] = {"num_virtual_tokens": 8, "epochs": 60, "batch_size": 11, "evaluation_steps": 60}
    parameters |= {"technique": "prompt_tuning", "learning_rate": 0.03, "lr_scheduler": "constant"}
    folder = bench.root / "tuned"
    job = open_job(folder, training_job(folder, bench.base, train, validation=held_back, method="peft", **parameters))
    tokenizer, _ = chat.load_tokenizer(str(bench.base))
    rows, validation = training.prepare_data(job, tokenizer)
    trainer = training.build_trainer(job, training.prepare_model(job, tokenizer), tokenizer, rows, validation)
    before = trainer.evaluate()["eval_loss"]
    training.main(job)
    after = curve(folder, "eval_loss")[60][0]
    counts = json.loads((folder / "preflight.json").read_text(encoding="utf-8"))
    share = counts["trainable"] / counts["total"]
    print(f"evaluation loss {before:.2f} before and {after:.2f} after, {share:.2%} trained")
    assert share < 0.01
    assert after < 0.75 * before


@pytest.mark.parametrize("technique", PROMPTS)
def test_a_trained_prompt_gives_the_same_answers_in_a_batch_as_alone(bench: Bench, technique: str) -> None:
    model = bench.build(technique=technique, num_virtual_tokens=4).model
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    tokenizer, _ = chat.load_tokenizer(str(bench.base))
    texts = ["on", "switch the light in the kitchen on and off please please", "off", "is the light on?"]
    prompts = [chat.render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    sampling = generating.Sampling(max_new_tokens=12)
    model.eval()
    model.config.use_cache = True
    alone = [generating.generate(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]
    assert generating.generate(model, tokenizer, prompts, sampling) == alone
    assert alone[0].text == teacher_forced(model, tokenizer, prompts[0], 12)
    untrained = models.load_with_adapter(str(bench.base), None, "float32")
    assert generating.generate(untrained, tokenizer, prompts, sampling) != alone


def teacher_forced(model: Any, tokenizer: Any, prompt: list[int], tokens: int) -> str:
    """The greedy answer by whole forward passes, as in training: the prompt, the question, and nothing cached."""
    ids = list(prompt)
    for _ in range(tokens):
        batch = torch.tensor([ids])
        with torch.no_grad():
            best = int(model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return str(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)).strip()


# --- AdaLoRA --------------------------------------------------------------------------------------------------------


def test_adalora_ends_with_the_ranks_it_was_asked_for(bench: Bench) -> None:
    folder = bench.train(**given("adalora", adalora_init_r=6, adalora_target_r=2, max_steps=8, batch_size=6))
    config = json.loads((folder / "output" / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = [sum(left) for left in config["rank_pattern"].values()]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1  # more where it counts
    sizes = {name: len(tensor) for name, tensor in weights(folder).items() if name.endswith("lora_E")}
    assert sorted(sizes.values()) == sorted(ranks)


def test_the_loss_of_adalora_holds_its_vectors_orthogonal(bench: Bench) -> None:
    apart = adalora.orthogonality(bench.build(technique="adalora").model)
    free, held = (
        bench.losses(**given("adalora", adalora_orthogonality=weight, max_steps=2, batch_size=6))[0]
        for weight in (0.0, 0.25)
    )
    assert held - free == pytest.approx(0.25 * float(apart), rel=1e-4)
    parts = bench.losses(**given("adalora", adalora_orthogonality=0.25, max_steps=2, batch_size=3, grad_accum_steps=2))
    assert parts[0] == pytest.approx(held, rel=1e-4)


def test_the_term_of_adalora_equals_the_librarys_own(bench: Bench) -> None:
    trainer = bench.build(technique="adalora", adalora_orthogonality=1.0)
    model = trainer.model.base_model
    batch = next(iter(trainer.get_train_dataloader()))
    plain = model.model(**batch).loss.detach().clone()
    assert float(model(**batch).loss - plain) == pytest.approx(float(adalora.orthogonality(trainer.model)), rel=1e-4)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"adalora_init_r": 4, "adalora_target_r": 4}, r"adalora_target_r \(4\) must be below adalora_init_r \(4\)"),
        ({"adalora_start": 0.6, "adalora_end": 0.5}, "together they must be below 1"),
        ({"max_steps": 1}, "cannot reduce ranks in 1 steps"),
    ],
)
def test_a_schedule_of_ranks_that_cannot_be_is_refused(bench: Bench, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(contract.Refused, match=said):
        bench.train(technique="adalora", **parameters)


# --- what is refused and what is told -------------------------------------------------------------------------------


def test_parameters_that_the_technique_does_not_use_are_told_by_name(bench: Bench) -> None:
    folder = bench.train(
        technique="prompt_tuning", learning_rate=0.03, max_steps=1, lora_rank=16, encoder_hidden_size=7, adapter_len=3
    )
    assert warnings_of(folder) == [
        "prompt_tuning does not use adapter_len (3), encoder_hidden_size (7), lora_rank (16): no effect"
    ]


@pytest.mark.parametrize(("rate", "told"), [(0.03, False), (0.0001, True), (0.5, True)])
def test_a_learning_rate_outside_of_the_documented_range_is_told(bench: Bench, rate: float, told: bool) -> None:
    trainer = bench.build(technique="prompt_tuning", learning_rate=rate)
    found = [text for text in warnings_of(trainer.job.folder) if "Baidu Qianfan" in text]
    assert bool(found) == told


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"technique": "prompt_tuning", "prompt_init": "text"}, "prompt_init_text is not set"),
        ({"technique": "prefix_tuning", "gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"technique": "llama_adapter", "adapter_layers": 3}, "adapter_layers is 3, and the model has 2"),
        ({"technique": "ia3", "ia3_feedforward": ["down_proj"]}, "ia3_targets, which are not set"),
        ({"technique": "ia3", "ia3_targets": ["queries"]}, "ia3_targets names queries, which this model"),
        ({"technique": "lora", "lora_targets": ["queries"]}, "lora_targets names queries, which this model"),
        ({"technique": "adalora", "lora_targets": ["embed_tokens"]}, "set lora_targets to other layers, of down_proj"),
        ({"technique": "dora", "lora_targets": ["lm_head"]}, "lora_targets names lm_head, the output head"),
        (
            {"technique": "ia3", "ia3_targets": ["v_proj"], "ia3_feedforward": ["down_proj"]},
            "ia3_feedforward names down_proj, which ia3_targets does not",
        ),
        ({"technique": "prompt_tuning", "num_virtual_tokens": 500}, "500 virtual tokens and a row of"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_parameter(
    bench: Bench, parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(contract.Refused, match=f"(?s){said}"):
        bench.build(**parameters)


EXPERTS = {"head_dim": 16, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    "phi3": ("Phi3Config", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32}),
    "gpt_oss": ("GptOssConfig", {**EXPERTS, "num_local_experts": 4}),
}


def bench_of(family: str, bench: Bench, folder: Path) -> Bench:
    """Trains of a tiny model of another family, with the tokenizer of the bench's."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(bench.base)
    name, own = FAMILIES[family]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, name)(**sizes, **ids, num_key_value_heads=2, **own)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
    tokenizer.save_pretrained(folder / family)
    return Bench("peft", folder / family, bench.rows, folder / "jobs")


@pytest.mark.parametrize(
    ("family", "technique", "said"),
    [
        ("qwen2", "llama_adapter", "models of the types llama, mistral, gpt2, and this one is qwen2; set technique to"),
        (
            "phi3",
            "ia3",
            r"models of the type phi3; set ia3_targets.*ia3_targets: \[qkv_proj, down_proj\], "
            r"ia3_feedforward: \[down_proj\]. Layers of this model: down_proj, embed_tokens, gate_up_proj, o_proj",
        ),
        ("qwen3_moe", "dora", r"use_dora=True. To fix it, set lora_targets to other layers, of embed_tokens, k_proj"),
        ("qwen3_moe", "ia3", r"set ia3_targets.*for example ia3_targets: \[k_proj, v_proj\]"),
    ],
)
def test_a_technique_that_a_family_does_not_take_is_refused_with_the_fix(
    bench: Bench, tmp_path: Path, family: str, technique: str, said: str
) -> None:
    with pytest.raises(contract.Refused, match=f"(?s)technique {technique}.*: .*{said}"):
        bench_of(family, bench, tmp_path).build(technique=technique)


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "gpt_oss"])
def test_a_technique_that_fails_in_a_familys_own_code_is_refused_before_the_train(
    bench: Bench, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = bench_of(family, bench, tmp_path)
    assert curve(other.train(technique="prefix_tuning", max_steps=1, learning_rate=0.01), "loss")

    def broken(*_: Any, **__: Any) -> Any:
        raise AttributeError("no cache of this kind")

    monkeypatch.setattr(PeftModelForCausalLM, "get_prompt", broken)
    said = f"technique prefix_tuning does not work with this model .{family}.: AttributeError: no cache.*Set technique"
    with pytest.raises(contract.Refused, match=said):
        other.build(technique="prefix_tuning")


def test_ia3_trains_fused_layers_that_are_named(bench: Bench, tmp_path: Path) -> None:
    other = bench_of("phi3", bench, tmp_path)
    named = {"ia3_targets": ["qkv_proj", "down_proj"], "ia3_feedforward": ["down_proj"]}
    folder = other.train(technique="ia3", max_steps=2, learning_rate=0.01, **named)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in weights(folder)} == {"qkv_proj", "down_proj"}


# --- every parameter reaches what it is for -------------------------------------------------------------------------


def _config(name: str, expected: Any, **parameters: Any) -> Callable[[Bench], None]:
    """The adapter's configuration has the value."""

    def check(bench: Bench) -> None:
        config = bench.build(**parameters).model.peft_config["default"]
        assert getattr(config, name) == expected

    return check


def _technique(bench: Bench) -> None:
    kinds = {name: bench.build(technique=name).model.peft_config["default"] for name in TECHNIQUES}
    assert {name: config.peft_type.value for name, config in kinds.items()} == {
        name: technique.kind for name, technique in techniques.TECHNIQUES.items()
    }
    assert [name for name in TECHNIQUES if getattr(kinds[name], "use_dora", False)] == ["dora"]
    assert [name for name in TECHNIQUES if getattr(kinds[name], "use_rslora", False)] == ["rslora"]


def _prompt(bench: Bench, **parameters: Any) -> torch.Tensor:
    model = bench.build(technique="prompt_tuning", num_virtual_tokens=3, **parameters).model
    found: torch.Tensor = model.prompt_encoder["default"].embedding.weight.detach()
    return found


def _vocabulary(bench: Bench) -> torch.Tensor:
    return dict(load_file(bench.base / "model.safetensors"))["model.embed_tokens.weight"]


def _prompt_init(bench: Bench) -> None:
    words = _vocabulary(bench)
    drawn, random = _prompt(bench), _prompt(bench, prompt_init="random")
    assert all(any(torch.equal(row, word) for word in words) for row in drawn)
    assert not any(any(torch.equal(row, word) for word in words) for row in random)


def _prompt_init_text(bench: Bench) -> None:
    tokenizer, _ = chat.load_tokenizer(str(bench.base))
    ids = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    words = _vocabulary(bench)
    started = _prompt(bench, prompt_init="text", prompt_init_text="ab")
    assert torch.equal(started, words[[*ids, ids[0]]])
    cut = tokenizer("abcdef", add_special_tokens=False)["input_ids"][:3]
    assert torch.equal(_prompt(bench, prompt_init="text", prompt_init_text="abcdef"), words[cut])


def _hidden(bench: Bench) -> None:
    for technique, extra in (("p_tuning", {}), ("prefix_tuning", {"prefix_projection": True})):
        for size, expected in ((24, 24), (None, 64)):
            model = bench.build(technique=technique, encoder_hidden_size=size, **extra).model
            assert model.peft_config["default"].encoder_hidden_size == expected


def _lstm(bench: Bench) -> Any:
    parameters = {"encoder_type": "lstm", "encoder_layers": 3, "encoder_dropout": 0.25, "encoder_hidden_size": 8}
    return bench.build(technique="p_tuning", **parameters).model.prompt_encoder["default"].lstm_head


def _encoder_type(bench: Bench) -> None:
    assert isinstance(_lstm(bench), torch.nn.LSTM)
    assert not hasattr(bench.build(technique="p_tuning").model.prompt_encoder["default"], "lstm_head")


def _encoder_layers(bench: Bench) -> None:
    assert _lstm(bench).num_layers == 3


def _encoder_dropout(bench: Bench) -> None:
    assert _lstm(bench).dropout == 0.25


def _prefix_init(bench: Bench) -> None:
    for first, zero in (("zero", True), ("random", False)):
        encoder = bench.build(technique="prefix_tuning", prefix_init=first).model.prompt_encoder["default"]
        assert bool((encoder.embedding.weight == 0).all()) == zero


def _adapted_layers(bench: Bench) -> None:
    for layers, expected in ((1, {"1"}), (None, {"0", "1"})):
        model = bench.build(technique="llama_adapter", adapter_layers=layers).model
        found = {n.split("layers.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert found == expected


def _ia3(bench: Bench) -> None:
    parameters = {"ia3_targets": ["v_proj", "down_proj"], "ia3_feedforward": ["down_proj"]}
    model = bench.build(technique="ia3", **parameters).model
    shapes = {n.split(".")[-3]: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert shapes == {"v_proj": (32, 1), "down_proj": (1, 128)}  # outputs are scaled, and inputs of the feed-forward
    default = bench.build(technique="ia3").model
    found = {n.split(".")[-3] for n, p in default.named_parameters() if p.requires_grad}
    assert found == {"k_proj", "v_proj", "down_proj"}


def _rank_schedule(bench: Bench) -> None:
    parameters = {"adalora_start": 0.25, "adalora_end": 0.5, "max_steps": 8, "batch_size": 6}
    folder = bench.train(technique="adalora", **parameters)
    config = json.loads((folder / "output" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (8, 2, 4)


OWN: dict[str, Callable[[Bench], None]] = {
    "technique": _technique,
    "num_virtual_tokens": _config("num_virtual_tokens", 7, technique="prefix_tuning", num_virtual_tokens=7),
    "prompt_init": _prompt_init,
    "prompt_init_text": _prompt_init_text,
    "encoder_type": _encoder_type,
    "encoder_hidden_size": _hidden,
    "encoder_layers": _encoder_layers,
    "encoder_dropout": _encoder_dropout,
    "prefix_projection": _config("prefix_projection", True, technique="prefix_tuning", prefix_projection=True),
    "prefix_init": _prefix_init,
    "adapter_len": _config("adapter_len", 5, technique="llama_adapter", adapter_len=5),
    "adapter_layers": _adapted_layers,
    "ia3_targets": _ia3,
    "ia3_feedforward": _ia3,
    "adalora_init_r": _config("init_r", 5, technique="adalora", adalora_init_r=5, adalora_target_r=2),
    "adalora_target_r": _config("target_r", 3, technique="adalora", adalora_target_r=3),
    "adalora_start": _rank_schedule,
    "adalora_end": _rank_schedule,
    "adalora_interval": _config("deltaT", 4, technique="adalora", adalora_interval=4),
    "adalora_beta1": _config("beta1", 0.7, technique="adalora", adalora_beta1=0.7),
    "adalora_beta2": _config("beta2", 0.6, technique="adalora", adalora_beta2=0.6),
    "adalora_orthogonality": _config("orth_reg_weight", 0.2, technique="adalora", adalora_orthogonality=0.2),
}


@pytest.mark.parametrize("name", find_method("peft").parameters)
def test_every_own_parameter_reaches_what_it_is_for(bench: Bench, name: str) -> None:
    OWN[name](bench)


@pytest.mark.parametrize("name", find_method("peft").hyperparameter_names)
def test_every_common_parameter_reaches_what_it_is_for(bench: Bench, name: str) -> None:
    EFFECTS[name](bench)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_learns_on_a_4bit_base_and_in_bfloat16(bench: Bench, technique: str) -> None:
    for parameters in ({"load_in_4bit": True}, {"dtype": "bfloat16"}):
        found = bench.losses(**given(technique, max_steps=16, batch_size=21, lr_scheduler="constant", **parameters))
        assert found[-1] < found[0], parameters


@pytest.mark.parametrize("technique", sorted(set(TECHNIQUES) - {"prefix_tuning"}))
def test_gradient_checkpointing_changes_no_loss(bench: Bench, technique: str) -> None:
    parameters = given(technique, max_steps=4, batch_size=8)
    assert bench.losses(gradient_checkpointing=True, **parameters) == pytest.approx(
        bench.losses(**parameters), rel=1e-5
    )
