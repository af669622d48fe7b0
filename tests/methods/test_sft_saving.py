"""Complete models: proved to be what was trained, or refused."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from methods import contract
from methods.sft import saving, training
from methods.toolkit import merging, models, probing, saving_chat
from tasks.stages import StageJob
from tests.methods.stage_jobs import open_job, run_method, training_job

HYPER: dict[str, dict[str, Any]] = {
    "lora": {"epochs": 3, "learning_rate": 1e-2},
    "qlora": {"epochs": 3, "learning_rate": 1e-2, "load_in_4bit": True},
    "full": {"epochs": 3, "learning_rate": 1e-3, "tuning": "full"},
}


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What training leaves: an adapter, one trained on a 4-bit base, full weights."""
    outputs = {}
    for name, hyper in HYPER.items():
        folder = tmp_path_factory.mktemp(name)
        training.main(open_job(folder, training_job(folder, tiny_model, tiny_rows, **hyper)))
        outputs[name] = folder / "output"
    return outputs


def saving_job(folder: Path, base: Path, trained: Path, *, dtype: str = "auto") -> StageJob:
    return StageJob(
        stage="saving",
        parameters={"dtype": dtype},
        inputs={
            "base_model": str(base),
            "trained": str(trained),
            "adapter": (trained / "adapter_config.json").exists(),
        },
        output=folder / "output",
        seed=0,
    )


def logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
    """Logits of the probe prompts' tokens, loaded by the libraries alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    probes = json.loads(((adapter or path) / probing.PROBES_FILE).read_text())["probes"]
    with torch.no_grad():
        return torch.cat([model.eval()(torch.tensor([p["prompt_token_ids"]])).logits[0] for p in probes])


def corrupt(model: Path) -> None:
    """Change one tensor of a saved model."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_merged_model_equals_base_and_adapter_and_not_the_base(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path, name: str
) -> None:
    result = saving.main(open_job(tmp_path, saving_job(tmp_path, tiny_model, trained[name])))
    found, expected = logits(tmp_path / "output"), logits(tiny_model, trained[name])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    shutil.copytree(tiny_model, tmp_path / "base")
    shutil.copy(trained[name] / probing.PROBES_FILE, tmp_path / "base")
    moved = float((found - logits(tmp_path / "base")).abs().max())
    assert moved > 0.01
    figures: Any = result["verification"]
    assert figures["merged_to_base"] == pytest.approx(moved, rel=1e-3)
    assert figures["merged_to_reference"] <= figures["tolerance"]


def tied_model(base: Path, folder: Path) -> Path:
    """The model with one table for its input embeddings and its output head."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_embeddings_is_merged_into_them_alone(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, tied: bool
) -> None:
    base = tied_model(tiny_model, tmp_path / "tied") if tied else tiny_model
    hyper = {**HYPER["lora"], "lora_targets": ["embed_tokens", "q_proj"]}
    training.main(open_job(tmp_path, training_job(tmp_path, base, tiny_rows, **hyper)))
    adapter = load_file(tmp_path / "output" / "adapter_model.safetensors")
    assert {name.split(".lora")[0].rpartition(".")[2] for name in adapter} == {"embed_tokens", "q_proj"}
    saving.main(open_job(tmp_path / "saving", saving_job(tmp_path / "saving", base, tmp_path / "output")))
    saved = tmp_path / "saving" / "output"
    torch.testing.assert_close(logits(saved), logits(base, tmp_path / "output"), atol=1e-3, rtol=1e-4)
    before, after = load_file(base / "model.safetensors"), load_file(saved / "model.safetensors")
    embedded = before["model.embed_tokens.weight"]
    torch.testing.assert_close(after["lm_head.weight"], embedded if tied else before["lm_head.weight"])
    assert float((after["model.embed_tokens.weight"] - embedded).abs().max()) > 0.1
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "lm_head"], "lora_targets names lm_head, the output head"),
        (
            ["q_proj", "w_pack"],
            r"lora_targets names w_pack, which this model \(llama\) does not have.*down_proj, embed",
        ),
    ],
)
@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "kto", "orpo"])
def test_targets_that_cannot_be_trained_are_refused_before_the_train(
    tiny_model: Path, tmp_path: Path, method: str, targets: list[str], said: str
) -> None:
    stage = import_module(f"methods.{method}.training")
    given = {"lora_targets": targets, **({"num_generations": 2} if method == "grpo" else {})}
    job = open_job(tmp_path, training_job(tmp_path, tiny_model, tmp_path / "none", method=method, **given))
    with pytest.raises(contract.Refused, match=said):
        stage.prepare_model(job)


@pytest.mark.parametrize("name", ["lora", "qlora", "full"])
def test_a_complete_model_is_self_contained_unquantised_safetensors(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path, name: str
) -> None:
    saving.main(open_job(tmp_path, saving_job(tmp_path, tiny_model, trained[name])))
    output = tmp_path / "output"
    assert not [path.name for path in output.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["use_cache"] is True
    assert str(tiny_model) not in (output / "config.json").read_text()
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.float32}
    assert {"tokenizer.json", probing.PROBES_FILE} <= {path.name for path in output.iterdir()}
    assert not (output / "adapter_config.json").exists()


def test_the_saving_stage_works_as_a_process_of_its_own(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    result = run_method(tmp_path, saving_job(tmp_path, tiny_model, trained["full"]))
    assert result["model"] == str(tmp_path / "output")
    assert result["dtype"] == "float32"
    torch.testing.assert_close(logits(tmp_path / "output"), logits(trained["full"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_saved_in_the_dtype_asked_for(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    result = saving.main(open_job(tmp_path, saving_job(tmp_path, tiny_model, trained["lora"], dtype=dtype)))
    assert result["dtype"] == dtype
    tensors = load_file(tmp_path / "output" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "output" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_corrupted_model_is_not_called_complete(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path, name: str
) -> None:
    job = open_job(tmp_path, saving_job(tmp_path, tiny_model, trained[name]))
    saving_chat.save_complete(job, "float32")
    saving_chat.verify(job, "float32")
    corrupt(job.output)
    with pytest.raises(contract.Refused, match="the saved weights are not the trained ones"):
        saving_chat.verify(job, "float32")


def test_the_base_itself_is_not_called_complete(tiny_model: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    job = open_job(tmp_path, saving_job(tmp_path, tiny_model, trained["lora"]))
    merging.save_weights(models.load_model(str(tiny_model), "float32"), job.output, "float32")
    with pytest.raises(contract.Refused, match="same outputs as its base"):
        saving_chat.verify(job, "float32")


def test_an_adapter_of_another_train_is_not_taken_for_this_one(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    job = open_job(tmp_path, saving_job(tmp_path, tiny_model, trained["lora"]))
    merging.merge(str(tiny_model), str(trained["qlora"]), job.output, "float32")
    with pytest.raises(contract.Refused, match="the saved weights are not the trained ones"):
        saving_chat.verify(job, "float32")


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_train_that_changed_nothing_is_refused(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, tuning: str
) -> None:
    hyper: dict[str, Any] = {"tuning": tuning, "max_steps": 1, "warmup_steps": 5}  # the first step of a warm-up is 0
    training.main(open_job(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, **hyper)))
    folder = tmp_path / "save"
    with pytest.raises(contract.Refused, match="training has changed nothing"):
        saving.main(open_job(folder, saving_job(folder, tiny_model, tmp_path / "output")))


def test_a_fine_tune_smaller_than_the_rounding_is_refused(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    hyper: dict[str, Any] = {"max_steps": 3, "warmup_steps": 0, "learning_rate": 1e-7}
    training.main(open_job(tmp_path, training_job(tmp_path, tiny_model, tiny_rows, **hyper)))
    folder = tmp_path / "save"
    with pytest.raises(contract.Refused, match=r"the fine-tune would be lost\. Set dtype to float32"):
        saving.main(open_job(folder, saving_job(folder, tiny_model, tmp_path / "output", dtype="bfloat16")))


def test_a_model_without_probes_is_not_saved_unverified(
    tiny_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "trained"
    shutil.copytree(trained["lora"], copy)
    (copy / probing.PROBES_FILE).write_text('{"probes": []}')
    with pytest.raises(UserError, match="cannot be verified"):
        run_method(tmp_path / "save", saving_job(tmp_path / "save", tiny_model, copy))


def test_an_adapter_can_be_given_another_place_of_its_base(trained: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(trained["lora"], copy)
    models.relocate_adapter(copy, "/elsewhere")
    assert json.loads((copy / "adapter_config.json").read_text())["base_model_name_or_path"] == "/elsewhere"
