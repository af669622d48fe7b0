"""Answers of tiny models: the same in a batch as alone, in order, repeatable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from methods import contract
from methods.sft import inference_complete, inference_customized
from methods.toolkit import chat, generating, likelihood, models
from methods.toolkit.generating import Sampling, generate
from tasks.inference import Generation
from tasks.stages import StageJob
from tests.methods.stage_jobs import open_job, run_method
from tests.tiny_models import greedy_answer, make_tiny_adapter

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


def inference_job(folder: Path, weights: dict[str, str], texts: list[str] = QUESTIONS, **generation: Any) -> StageJob:
    """An inference job as `tasks.inference` makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = Generation(**{"max_new_tokens": 12, **generation})
    lines = [json.dumps({"messages": [{"role": "user", "content": t}]}, ensure_ascii=False) + "\n" for t in texts]
    (folder / "requests.jsonl").write_text("".join(lines), encoding="utf-8")
    return StageJob(
        stage="inference-customized" if "adapter" in weights else "inference-complete",
        parameters={**chosen.parameters(), "dtype": "float32"},
        inputs={"requests": str(folder / "requests.jsonl"), **weights},
        output=folder / "output",
        seed=chosen.seed,
    )


def answers(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "output" / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def ask(folder: Path, model: Path, texts: list[str] = QUESTIONS, **generation: Any) -> list[str]:
    inference_complete.main(open_job(folder, inference_job(folder, {"model": str(model)}, texts, **generation)))
    return [row["answer"] for row in answers(folder)]


def test_answers_in_batches_equal_those_one_by_one_and_keep_their_order(
    model: Any, tokenizer: Any, prompts: list[list[int]], tiny_model: Path
) -> None:
    sampling = Sampling(max_new_tokens=12)
    alone = [generate(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]
    assert len({answer.text for answer in alone}) == len(prompts)
    for size in (2, 3, 16):
        assert generate(model, tokenizer, prompts, sampling, batch_size=size) == alone
    assert alone[1].text == greedy_answer(tiny_model, [{"role": "user", "content": QUESTIONS[1]}], 12).strip()


def test_batches_are_made_of_prompts_of_like_length(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    widths: list[tuple[int, int]] = []
    original = model.generate

    def record(input_ids: Any, **rest: Any) -> Any:
        widths.append(tuple(input_ids.shape))
        return original(input_ids=input_ids, **rest)

    model.generate = record
    done: list[float] = []
    sampling = Sampling(max_new_tokens=2)
    generate(model, tokenizer, prompts, sampling, batch_size=2, on_progress=lambda rows, _: done.append(rows))
    lengths = sorted(map(len, prompts), reverse=True)
    assert widths == [(2, lengths[0]), (2, lengths[2]), (1, lengths[4])]
    assert done == [2, 4, 5]


def test_hit_limit_is_true_only_for_answers_that_were_cut(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    tokens = [tokenizer(text)["input_ids"][0] for text in ("a", "b", "c")]
    ends = [tokenizer.eos_token_id]
    read = generating.as_answer
    assert read(tokenizer, [*tokens, ends[0]], ends, 4) == generating.Answer("abc", 3, hit_limit=False, marked="abc")
    assert read(tokenizer, tokens, ends, 3) == generating.Answer("abc", 3, hit_limit=True, marked="abc")
    assert all(answer.hit_limit for answer in generate(model, tokenizer, prompts, Sampling(max_new_tokens=3)))


def test_an_answer_ends_at_every_end_token_the_model_names(
    model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_new_tokens=12)
    plain = generate(model, tokenizer, prompts, sampling)
    ids = tokenizer(plain[0].text)["input_ids"]
    other = ids[3]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    tokenizer.pad_token = "a"  # not an end token: padding behind a short answer must not be read as its text
    found = generate(model, tokenizer, prompts, sampling)
    assert found[0].tokens == ids.index(other)
    assert not found[0].hit_limit
    assert plain[0].text.startswith(found[0].text)


def test_sampling_is_repeated_by_its_seed_and_changed_by_another(tiny_model: Path, tmp_path: Path) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "top_k": 0}
    first = ask(tmp_path / "1", tiny_model, seed=3, **hot)
    assert ask(tmp_path / "2", tiny_model, seed=3, **hot) == first
    assert ask(tmp_path / "3", tiny_model, seed=4, **hot) != first
    assert ask(tmp_path / "4", tiny_model, seed=3) != first


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"temperature": 1e-4, "top_k": 0}])
def test_each_way_of_narrowing_the_choice_reaches_the_model(
    tiny_model: Path, tmp_path: Path, narrow: dict[str, Any]
) -> None:
    # Narrowed to one token, sampling is greedy.
    greedy = ask(tmp_path / "greedy", tiny_model)
    assert ask(tmp_path / "narrow", tiny_model, **{"temperature": 2.0, **narrow}) == greedy
    assert ask(tmp_path / "wide", tiny_model, temperature=2.0, top_k=0) != greedy


def test_lines_inside_of_a_message_do_not_cut_the_request(tiny_model: Path, tmp_path: Path) -> None:
    assert len(ask(tmp_path, tiny_model, ["switch\u2028the\u0085light", "a\nb"])) == 2


def test_no_request_gives_no_answer(tiny_model: Path, tmp_path: Path) -> None:
    assert ask(tmp_path, tiny_model, []) == []


def test_a_result_row_holds_the_prompt_as_the_model_saw_it(
    tiny_model: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    job = open_job(tmp_path, inference_job(tmp_path, {"model": str(tiny_model)}))
    result = inference_complete.main(job)
    rows = answers(tmp_path)
    assert [row["prompt_token_ids"] for row in rows] == prompts
    assert result["rows"] == 5
    assert result["tokens"] == sum(row["tokens"] for row in rows)
    assert result["hit_limit"] == sum(row["hit_limit"] for row in rows)


def test_a_cancelled_inference_ends_after_its_batch(tiny_model: Path, tmp_path: Path) -> None:
    job = open_job(tmp_path, inference_job(tmp_path, {"model": str(tiny_model)}, batch_size=1))
    job.cancelled = True
    with pytest.raises(contract.Cancelled):
        inference_complete.main(job)


def test_an_adapter_answers_as_a_process_of_its_own_and_unlike_its_base(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_tiny_adapter(tmp_path / "adapter", tiny_model, seed=5)
    chat.load_tokenizer(str(tiny_model))[0].save_pretrained(adapter)
    weights = {"base_model": str(tiny_model), "adapter": str(adapter)}
    assert run_method(tmp_path / "a", inference_job(tmp_path / "a", weights))["rows"] == 5
    expected = [greedy_answer(tiny_model, [{"role": "user", "content": t}], 12, adapter).strip() for t in QUESTIONS]
    assert [row["answer"] for row in answers(tmp_path / "a")] == expected
    inference_customized.main(open_job(tmp_path / "b", inference_job(tmp_path / "b", weights)))
    assert answers(tmp_path / "b") == answers(tmp_path / "a")
    assert expected != ask(tmp_path / "c", tiny_model)


def test_references_are_as_likely_as_transformers_says(tiny_model: Path, tmp_path: Path, model: Any) -> None:
    import torch

    references = ["on", "the light is off", "", "switch the light in the kitchen on and off please"]
    job = inference_job(tmp_path, {"model": str(tiny_model)}, QUESTIONS[:4])
    lines = (tmp_path / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [{**json.loads(line), "reference": text} for line, text in zip(lines, references, strict=True)]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    inference_complete.main(open_job(tmp_path, job))
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    for row, request in zip(answers(tmp_path), asked, strict=True):
        messages = [*request["messages"], {"role": "assistant", "content": request["reference"]}]
        rendered = chat.render_conversation(tokenizer, messages)
        labels = [-100] * rendered.prompt_length + rendered.input_ids[rendered.prompt_length :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([rendered.input_ids]), labels=torch.tensor([labels])).loss
        # The library's loss is the mean over the trained tokens, of which the first has a predecessor here.
        tokens = len(rendered.input_ids) - rendered.prompt_length
        assert row["reference_tokens"] == tokens
        assert row["reference_logprob"] == pytest.approx(-float(loss) * tokens, rel=1e-4)


def test_likelihoods_in_small_batches_equal_those_in_one(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [[{"role": "user", "content": text}, {"role": "assistant", "content": text * 2}] for text in QUESTIONS]
    done: list[int] = []
    whole = likelihood.answer_likelihoods(model, tokenizer, asked, on_progress=done.append)
    assert done == [len(QUESTIONS)]
    monkeypatch.setattr(likelihood, "_LOGITS", 1)
    alone = likelihood.answer_likelihoods(model, tokenizer, asked)
    assert [each.tokens for each in alone] == [each.tokens for each in whole]
    assert [each.logprob for each in alone] == pytest.approx([each.logprob for each in whole], rel=1e-4)
