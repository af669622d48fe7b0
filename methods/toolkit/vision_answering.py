"""Answers conversations with images: for inference, as samples during training, and for the proofs of later stages."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from methods import contract
from methods.toolkit import images, probing
from methods.toolkit.answering import progress_of, read_requests, sampling_of, write_predictions
from methods.toolkit.generating import Answer, Sampling, as_answer, end_tokens, generation_config, record
from methods.toolkit.likelihood import Likelihood
from methods.toolkit.tokenizing import Conversation
from methods.toolkit.vision_rows import Renderer, read_rows

_PROBE_PIXELS = 256 * 256


def answer_requests(job: contract.Job, model: Any, renderer: Renderer) -> dict[str, object]:
    """Answer `inputs.requests` (JSON lines with `messages` and `images`) into `predictions.jsonl` of the output.

    Result lines and result are those of `answering.answer_requests`; the prompt's token ids include the images'.
    """
    requests = read_requests(job)
    talks = [images.conversation(request["messages"], request.get("images", [])) for request in requests]
    expected = {index: request["reference"] for index, request in enumerate(requests) if "reference" in request}
    torch.manual_seed(job.seed)
    started = time.monotonic()
    on_progress = progress_of(job, len(talks) + len(expected))
    prompts, answers = generate(model, renderer, talks, sampling_of(job), job.parameters["batch_size"], on_progress)
    likelihoods = {}
    for index, reference in expected.items():
        likelihoods[index] = likelihood(model, renderer, talks[index], reference)
        on_progress(len(talks) + len(likelihoods))
    return {
        **write_predictions(job, prompts, answers, started, likelihoods),
        "generation": record(model, sampling_of(job)),
    }


def likelihood(model: Any, renderer: Renderer, prompt: list[dict[str, Any]], reference: str) -> Likelihood:
    """How likely the model finds an answer to the prompt, with the end token that the template writes after it."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": reference}]}
    batch = renderer.encode([[*prompt, answer]], prompt=False).to(model.device)
    ids = batch["input_ids"][0]
    begin = renderer.encode([prompt], prompt=True)["input_ids"].shape[1]
    ends = end_tokens(model, renderer.processor.tokenizer)
    stop = next((place + 1 for place in range(begin, len(ids)) if int(ids[place]) in ends), len(ids))
    with torch.inference_mode():
        logits = model(**batch).logits[0, begin - 1 : stop - 1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[begin:stop], reduction="sum")
    return Likelihood(-float(loss), stop - begin)


def generate(
    model: Any,
    renderer: Renderer,
    conversations: list[list[dict[str, Any]]],
    sampling: Sampling,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[list[int]], list[Answer]]:
    """Answer each conversation, in batches of their order; returns the token ids of the prompts, and the answers."""
    tokenizer = renderer.processor.tokenizer
    ends = end_tokens(model, tokenizer)
    prompts: list[list[int]] = []
    answers: list[Answer] = []
    for start in range(0, len(conversations), batch_size):
        chosen = conversations[start : start + batch_size]
        batch = renderer.encode(chosen, prompt=True, side="left").to(model.device)
        with torch.inference_mode(), generation_config(model, tokenizer, sampling) as chosen_settings:
            output = model.generate(**batch, generation_config=chosen_settings)
        width = batch["input_ids"].shape[1]
        # Padded on the left, and told by position: the pad token may be a real one.
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        prompts += [row[width - length :].tolist() for row, length in zip(batch["input_ids"], lengths, strict=True)]
        answers += [as_answer(tokenizer, row[width:].tolist(), ends, sampling.max_new_tokens) for row in output]
        on_progress(len(answers))
    return prompts, answers


def write_probes(folder: Path, renderer: Renderer, rows: list[dict[str, Any]]) -> None:
    """Store the prompt of each row as OpenAI's interface takes it, and the token ids it was trained with.

    The images are in it, made small: a probe proves how a model is asked, not how well it sees.
    """
    probes = []
    for row in rows:
        messages = _as_openai(images.conversation(row["messages"], row["images"])[:-1])
        ids = renderer.encode([images.conversation(messages, [])], prompt=True)["input_ids"][0]
        probes.append({"messages": messages, "prompt_token_ids": ids.tolist()})
    contract.write_json(folder / probing.PROBES_FILE, {"probes": probes})


def _as_openai(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def part(each: dict[str, Any]) -> dict[str, Any]:
        if each["type"] == "text":
            return each
        return {"type": "image_url", "image_url": {"url": images.data_url(images.shrunk(each["image"], _PROBE_PIXELS))}}

    return [{"role": each["role"], "content": [part(every) for every in each["content"]]} for each in conversation]


class SampleWriter(probing.SampleWriter):
    """After each evaluation, answers the first `num_generations` validation prompts and keeps the answers."""

    def __init__(self, job: contract.Job, renderer: Renderer) -> None:
        self.job, self.renderer = job, renderer
        rows = list(read_rows(Path(job.inputs["validation_rows"]), job.parameters["num_generations"]))
        self.conversations = [Conversation(row["line"], row["messages"]) for row in rows]
        self.talks = [images.conversation(row["messages"], row["images"])[:-1] for row in rows]

    def answer(self, model: Any, sampling: Sampling) -> list[Answer]:
        """The model's answers to the last message of each."""
        return generate(model, self.renderer, self.talks, sampling, self.job.parameters["batch_size"])[1]
