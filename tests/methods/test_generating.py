"""How answers are made in batches: the progress within one, and how many rows a batch holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from methods import contract
from methods.sft import inference_complete
from methods.toolkit import answering, chat, generating, hardware, models
from methods.toolkit.generating import Sampling, batch_by_memory, generate
from tasks.inference import Generation
from tasks.stages import EventTail, StageJob
from tests.methods.stage_jobs import open_job

QUESTIONS = ["on", "switch the light in the kitchen on and off please", "off", "switch", "is the light on?"]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(str(tiny_model))[0]


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return models.load_with_adapter(str(tiny_model), None, "float32")


@pytest.fixture
def prompts(tokenizer: Any) -> list[list[int]]:
    return [chat.render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]


def test_progress_goes_on_token_by_token_within_a_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generating, "_NOTE_SECONDS", 0.0)
    seen: list[tuple[float, str]] = []
    sampling = Sampling(max_new_tokens=12)
    watched = generate(model, tokenizer, prompts, sampling, batch_size=4, on_progress=lambda *told: seen.append(told))
    done = [each for each, _ in seen]
    assert done == sorted(done)
    assert done[-1] == len(prompts)
    assert done[0] == pytest.approx(4 / 12)  # one token of at most twelve, in each of four rows
    assert seen[0][1].startswith("token 1 of at most 12, 4 rows at a time, ")
    assert all(note.endswith("tokens/s") for _, note in seen)
    assert watched == generate(model, tokenizer, prompts, sampling)


def test_what_progress_raises_ends_the_work_within_a_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generating, "_NOTE_SECONDS", 0.0)
    seen: list[float] = []

    def cancel(done: float, _note: str) -> None:
        seen.append(done)
        raise contract.Cancelled

    with pytest.raises(contract.Cancelled):
        generate(model, tokenizer, prompts, Sampling(max_new_tokens=12), on_progress=cancel)
    assert len(seen) == 1
    assert seen[0] < 1


TEXT = SimpleNamespace(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=32,
    vocab_size=128_000,
)
LARGE = SimpleNamespace(get_text_config=lambda: TEXT)


def rows(free: float | None, prompt: int = 1000, dtype: torch.dtype = torch.float32) -> int:
    return batch_by_memory(LARGE, dtype, prompt, Sampling(max_new_tokens=1000), free)


def test_a_batch_is_as_large_as_the_free_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "inference_device", lambda: "cpu")
    assert [rows(free) for free in (0.1, 1.0, 4.0, 1000.0)] == [1, 1, 2, 32]
    assert rows(4.0, prompt=100) > rows(4.0)
    assert rows(8.0, dtype=torch.bfloat16) > rows(8.0)
    assert rows(None) == 16


@pytest.mark.parametrize(("by_memory", "expected"), [(True, 2), (False, 3)])
def test_the_stage_goes_by_the_memory_or_by_the_number_it_is_given(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_memory: bool, expected: int
) -> None:
    monkeypatch.setattr(answering, "batch_by_memory", lambda *_: 2)
    widths: list[int] = []
    made = generating._generate_batch

    def counted(*given: Any, **named: Any) -> Any:
        widths.append(len(given[2]))
        return made(*given, **named)

    monkeypatch.setattr(generating, "_generate_batch", counted)
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in QUESTIONS]
    (tmp_path / "requests.jsonl").write_text("".join(lines), encoding="utf-8")
    generation = Generation(max_new_tokens=4, batch_size="auto" if by_memory else 3)
    job = StageJob(
        stage="inference-complete",
        parameters={**generation.parameters(), "dtype": "auto"},
        inputs={"requests": str(tmp_path / "requests.jsonl"), "model": str(tiny_model)},
        output=tmp_path / "output",
        seed=1,
    )
    monkeypatch.setenv(hardware.NATIVE_VARIABLE, "no")
    result = inference_complete.main(open_job(tmp_path, job))
    assert widths[0] == result["batch_size"] == expected
    assert sum(widths) == len(QUESTIONS)
    tokens, speed, seconds = (float(str(result[name])) for name in ("tokens", "tokens_per_second", "seconds"))
    assert speed >= tokens / seconds > 0
    assert result["dtype"] == "float32"
    last = [event for event in EventTail(tmp_path / contract.EVENTS_FILE).read() if event["type"] == "progress"][-1]
    assert (last["step"], last["total"]) == (len(QUESTIONS), len(QUESTIONS))
