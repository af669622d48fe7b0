"""Mixtures of experts: what 4-bit loading and adapters leave out is said, and experts that are named are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from methods import contract
from methods.sft import saving
from methods.toolkit import adapter_targets, chat, expert_weights, generating, memory, models
from tests.methods.stage_jobs import open_job
from tests.methods.test_sft_saving import saving_job
from tests.methods.training_bench import Bench
from tests.tiny_models import make_tiny_chat_model

pytestmark = pytest.mark.methods

TRAINED: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def mixture(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers of four experts each, with the tokenizer of the tiny model."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("models") / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(3)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **ids, initializer_range=0.2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bench(mixture: Path, tiny_rows: Path, tmp_path: Path) -> Bench:
    return Bench("sft", mixture, tiny_rows, tmp_path / "jobs")


def warnings_of(folder: Path) -> list[str]:
    events = map(json.loads, (folder / contract.EVENTS_FILE).read_text(encoding="utf-8").splitlines())
    return [event["text"] for event in events if event["type"] == "warning"]


def test_experts_that_stay_unquantised_are_told_and_counted_as_they_are_loaded(bench: Bench) -> None:
    folder = bench.train(**TRAINED, load_in_4bit=True, lora_targets=["q_proj", "v_proj"])
    told = warnings_of(folder)
    (unquantised,) = [text for text in told if "load_in_4bit quantises linear layers only" in text]
    assert "the experts (down_proj, gate_up_proj), 61% of the weights" in unquantised
    assert "stay in float32" in unquantised
    (untrained,) = [text for text in told if "the adapter is on linear layers only" in text]
    assert "add experts.down_proj and experts.gate_up_proj to lora_targets" in untrained
    model = models.load_model(str(bench.base), "float32", load_in_4bit=True)
    experts = sum(each.nbytes for each in expert_weights.expert_parameters(model).values())
    assert experts == 2 * 4 * (128 * 64 + 64 * 64) * 4
    whole = memory.loaded_bytes(models.load_model(str(bench.base), "float32"))
    assert whole == 4 * models.parameter_counts(models.load_model(str(bench.base), "float32"))["total"] + 2 * 8 * 4
    assert experts < memory.loaded_bytes(model) < whole


def test_experts_that_are_named_are_trained_merged_and_verified(bench: Bench, tmp_path: Path) -> None:
    folder = bench.train(**TRAINED, lora_targets=["q_proj", "experts.down_proj"])
    assert not [text for text in warnings_of(folder) if "the adapter is on linear layers only" in text]
    assert [text for text in warnings_of(folder) if "adapters on experts make a copy of them" in text]
    adapter = load_file(folder / "output" / "adapter_model.safetensors")
    on_experts = [weight for name, weight in adapter.items() if ".experts." in name and "lora_B" in name]
    assert len(on_experts) == 2
    assert all(float(weight.abs().max()) > 0 for weight in on_experts)
    result = saving.main(open_job(tmp_path / "saving", saving_job(tmp_path / "saving", bench.base, folder / "output")))
    figures: Any = result["verification"]
    assert figures["merged_to_reference"] <= figures["tolerance"] < figures["merged_to_base"]


def test_a_fully_trained_mixture_is_saved_without_a_switch_of_its_training(bench: Bench, tmp_path: Path) -> None:
    folder = bench.train(**{**TRAINED, "learning_rate": 1e-3}, tuning="full", validation=True, num_generations=1)
    saving.main(open_job(tmp_path / "saving", saving_job(tmp_path / "saving", bench.base, folder / "output")))
    output = tmp_path / "saving" / "output"
    assert json.loads((output / "config.json").read_text())["output_router_logits"] is False
    whole, (tokenizer, _) = models.load_with_adapter(str(output), None, "float32"), chat.load_tokenizer(str(output))
    prompt = chat.render_prompt(tokenizer, [{"role": "user", "content": "on"}])
    assert generating.generate(whole, tokenizer, [prompt], generating.Sampling(4))[0].tokens <= 4


def test_dropout_on_experts_is_refused_with_its_parameter(bench: Bench) -> None:
    said = r"lora_dropout is 0.1, and lora_targets names experts \(mlp.experts.down_proj\).*set lora_dropout to 0"
    with pytest.raises(contract.Refused, match=said):
        bench.build(lora_targets=["experts.down_proj"], lora_dropout=0.1)


def test_a_model_without_experts_is_told_nothing(tmp_path: Path, tiny_rows: Path) -> None:
    base = make_tiny_chat_model(tmp_path / "plain", seed=1)
    folder = Bench("sft", base, tiny_rows, tmp_path / "jobs").train(**TRAINED, load_in_4bit=True)
    assert not [text for text in warnings_of(folder) if "experts" in text]
    assert adapter_targets.layer_names(models.load_model(str(base), "float32"))[0] == "down_proj"
