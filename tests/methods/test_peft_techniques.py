"""What each technique uses of the parameters, and what can be made of its result: a merged model, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import contract
from methods.peft import saving, techniques
from methods.registry import find_method
from methods.toolkit import models
from tests.methods.stage_jobs import open_job
from tests.methods.test_peft_training import RATES
from tests.methods.test_sft_saving import saving_job
from tests.methods.training_bench import Bench

MERGED = sorted(name for name, technique in techniques.TECHNIQUES.items() if technique.mergeable)
PROMPTS = sorted(set(techniques.TECHNIQUES) - set(MERGED))


@pytest.fixture
def bench(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Bench:
    return Bench("peft", tiny_model, tiny_rows, tmp_path)


@pytest.mark.parametrize(
    ("parameters", "unused"),
    [
        ({"technique": "lora"}, {}),
        ({"technique": "lora", "lora_rank": 4, "lora_alpha": 3}, {}),
        ({"technique": "ia3", "lora_alpha": 3}, {"lora_alpha": 3}),
        ({"technique": "adalora", "lora_rank": 4}, {"lora_rank": 4}),
        ({"technique": "prompt_tuning", "prompt_init_text": "on"}, {"prompt_init_text": "on"}),
        ({"technique": "prompt_tuning", "prompt_init": "text", "prompt_init_text": "on"}, {}),
        ({"technique": "p_tuning", "encoder_layers": 3}, {"encoder_layers": 3}),
        ({"technique": "p_tuning", "encoder_layers": 3, "encoder_type": "lstm"}, {}),
        ({"technique": "prefix_tuning", "encoder_hidden_size": 8}, {"encoder_hidden_size": 8}),
        ({"technique": "prefix_tuning", "encoder_hidden_size": 8, "prefix_projection": True}, {}),
        ({"technique": "llama_adapter", "num_virtual_tokens": 9}, {"num_virtual_tokens": 9}),
    ],
)
def test_only_what_was_set_and_counts_for_nothing_is_told(
    bench: Bench, parameters: dict[str, Any], unused: dict[str, Any]
) -> None:
    assert techniques.unused_settings(bench.job(**parameters).parameters) == unused


def test_every_own_parameter_belongs_to_a_technique() -> None:
    used = {name for technique in techniques.TECHNIQUES.values() for name in technique.uses}
    method = find_method("peft")
    assert set(method.parameters) - {"technique"} == used - set(method.hyperparameter_names)
    assert set(method.parameters["technique"]["enum"]) == set(techniques.TECHNIQUES)


def test_techniques_that_train_layers_are_mergeable_and_those_that_train_prompts_are_told_to_stay_customized() -> None:
    assert MERGED == ["adalora", "dora", "ia3", "lora", "rslora"]
    assert sorted(find_method("peft").stays_customized["technique"]) == PROMPTS


@pytest.mark.methods
@pytest.mark.parametrize("technique", MERGED)
def test_a_merged_model_equals_base_and_adapter_and_not_the_base(bench: Bench, tmp_path: Path, technique: str) -> None:
    trained = bench.train(technique=technique, learning_rate=RATES[technique], max_steps=4, batch_size=8) / "output"
    job = saving_job(tmp_path / "saving", bench.base, trained)
    result = saving.main(open_job(tmp_path / "saving", job))
    assert result["dtype"] == "float32"
    ids = torch.tensor([[5, 90, 17, 200, 33]])

    def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = models.load_with_adapter(str(base), adapter and str(adapter), "float32")(ids).logits
        return found

    merged, expected, untouched = logits(job.output), logits(bench.base, trained), logits(bench.base)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert float((merged - untouched).abs().max()) > 0.01
    files = {path.name for path in job.output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "probes.json"} <= files
    assert "adapter_config.json" not in files


@pytest.mark.parametrize("technique", PROMPTS)
def test_a_trained_prompt_is_refused_before_anything_is_done(bench: Bench, tmp_path: Path, technique: str) -> None:
    kind = techniques.TECHNIQUES[technique].kind
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "adapter_config.json").write_text(json.dumps({"peft_type": kind}), encoding="utf-8")
    job = open_job(tmp_path / "saving", saving_job(tmp_path / "saving", bench.base, tmp_path / "trained"))
    with pytest.raises(contract.Refused, match=r"cannot be merged into its weights.*target custom"):
        saving.main(job)
    assert not list(job.output.iterdir())
    assert not (job.folder / contract.EVENTS_FILE).read_text()
