"""What dpo, kto and orpo leave: saved, merged, proved, asked, and measured on pairs of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from methods import contract
from methods.toolkit import chat, models, probing
from tasks.inference import Generation
from tasks.stages import StageJob
from tests.methods.preference_data import asked, pair_rows, preferences, write_rows
from tests.methods.stage_jobs import run_method
from tests.methods.training_bench import Bench
from tests.tiny_models import greedy_answer

pytestmark = pytest.mark.methods

NAMES = ("dpo", "kto", "orpo")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pair_rows())


def inference_job(folder: Path, **inputs: str) -> StageJob:
    """An inference job as `tasks.inference` makes it."""
    generation = Generation(max_new_tokens=8).parameters()
    return StageJob(
        stage="inference-customized" if "adapter" in inputs else "inference-complete",
        parameters={**generation, "dtype": "float32"},
        inputs=inputs,
        output=folder / "output",
        seed=0,
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_saved_whole_and_answers_and_judges_alike(
    tiny_model: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    trained = Bench(name, tiny_model, rows, tmp_path / "jobs").train(max_steps=6, learning_rate=1e-2) / "output"
    assert not (trained / "ref").exists()  # only what was trained, not the reference
    probes = probing.read_probes(trained)
    tokenizer, _ = chat.load_tokenizer(str(trained))
    for probe, row in zip(probes, pair_rows(), strict=False):
        assert probe["messages"] == [*row["prompt"], *row["chosen"]][:-1]
        assert probe["prompt_token_ids"] == chat.render_prompt(tokenizer, probe["messages"])
    assert len(probes) == 4
    saving = StageJob(
        stage="saving",
        parameters={"dtype": "auto"},
        inputs={"base_model": str(tiny_model), "trained": str(trained), "adapter": True},
        output=tmp_path / "save" / "output",
        seed=0,
    )
    figures: Any = run_method(tmp_path / "save", saving, method=name)["verification"]
    assert figures["merged_to_reference"] <= figures["tolerance"] < figures["merged_to_base"]

    weights = {
        "customized": {"base_model": str(tiny_model), "adapter": str(trained)},
        "complete": {"model": str(saving.output)},
    }
    questions = ["on", "switch the light in the hall off"]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps({"messages": asked(text)}) + "\n" for text in questions))
    expected = [greedy_answer(tiny_model, asked(text), 8, trained).strip() for text in questions]
    model = models.load_with_adapter(str(tiny_model), str(trained), "float32")
    margins = preferences(model, tokenizer, rows)
    for stage, given in weights.items():
        folder = tmp_path / stage
        run_method(folder, inference_job(folder, requests=str(requests), **given), method=name)
        lines = (folder / "output" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["answer"] for line in lines] == expected
        folder = tmp_path / f"{stage}-pairs"
        result = run_method(folder, inference_job(folder, evaluation_rows=str(rows), **given), method=name)
        assert result["pairs"] == 21
        assert result["figures"] == {
            "preference_accuracy": sum(margin > 0 for margin in margins) / 21,
            "preference_margin": pytest.approx(sum(margins) / 21, abs=1e-3),
        }


def test_measuring_on_pairs_ends_when_it_is_asked_to(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    from methods.dpo import inference_complete
    from tests.methods.stage_jobs import open_job

    job = open_job(tmp_path, inference_job(tmp_path, evaluation_rows=str(rows), model=str(tiny_model)))
    job.cancelled = True
    with pytest.raises(contract.Cancelled):
        inference_complete.main(job)
