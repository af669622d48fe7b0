"""Prompts that go with a model so that later stages can prove they treat it as training did."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from methods import contract
from methods.toolkit import generating, processes, tool_parsing
from methods.toolkit.chat import Message, RenderError, render_prompt, text_of
from methods.toolkit.chat_template import fixed_date
from methods.toolkit.tokenizing import Conversation, read_conversations

PROBE_ROWS = 4
_PROBE_SEARCH = 1000
PROBES_FILE = "probes.json"

Read = Callable[[Path, int], Iterable[Conversation]]
"""Yields the conversations of at most so many rows of a stored dataset."""


def write_probes(folder: Path, tokenizer: Any, conversations: Iterable[Conversation]) -> None:
    """Store the prompts of the first conversations, with their tools, and the token ids they were trained with.

    One that the template refuses was not trained and is no probe. Where the first ones have no tools, but one of the
    next has, it is among them: a server has to show the model its tools.
    """
    probes: list[dict[str, Any]] = []
    for _, messages, tools in islice(conversations, _PROBE_SEARCH):
        full = len(probes) == PROBE_ROWS
        if full and (not tools or any("tools" in probe for probe in probes)):
            continue
        try:
            ids = render_prompt(tokenizer, messages[:-1], tools)
        except RenderError:
            continue
        probe: dict[str, Any] = {"messages": messages[:-1], **({"tools": tools} if tools else {})}
        probes[PROBE_ROWS - 1 :] = [{**probe, "prompt_token_ids": ids}]
    contract.write_json(folder / PROBES_FILE, {"probes": probes, "date": fixed_date(tokenizer)})


def write_scored(folder: Path, texts: list[tuple[list[Message], list[int]]]) -> None:
    """Store conversations that were scored in training, and the token ids that they were scored as."""
    probes = [{"messages": messages, "prompt_token_ids": ids} for messages, ids in texts]
    contract.write_json(folder / PROBES_FILE, {"probes": probes})


def read_probes(folder: Path) -> list[dict[str, Any]]:
    """The probes stored with a model; empty for one that was not trained here."""
    path = folder / PROBES_FILE
    probes: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["probes"] if path.exists() else []
    return probes


class SampleWriter(TrainerCallback):
    """After each evaluation, answers the first `num_generations` validation prompts and keeps the answers."""

    def __init__(self, job: contract.Job, tokenizer: Any, read: Read = read_conversations) -> None:
        self.job, self.tokenizer = job, tokenizer
        rows = Path(job.inputs["validation_rows"]) if job.inputs.get("validation_rows") else None
        wanted = job.parameters["num_generations"]
        self.conversations = list(read(rows, wanted)) if rows else []

    def answer(self, model: Any, sampling: generating.Sampling) -> list[generating.Answer]:
        """The model's answers to the last message of each."""
        prompts = [render_prompt(self.tokenizer, messages[:-1], tools) for _, messages, tools in self.conversations]
        return generating.generate(model, self.tokenizer, prompts, sampling)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if not self.job.is_main and not processes.is_parted(model):
            return
        sampling = generating.Sampling(max_new_tokens=self.job.parameters["max_new_tokens"])
        config = model.config.get_text_config()
        training, cached = model.training, config.use_cache
        model.eval()
        config.use_cache = True
        answers = self.answer(model, sampling)
        config.use_cache = cached
        model.train(training)
        if not self.job.is_main:
            return
        path = self.job.folder / "samples.jsonl"
        with path.open("a", encoding="utf-8") as file:
            for talk, answer in zip(self.conversations, answers, strict=True):
                messages = talk.messages
                row = {
                    "step": state.global_step,
                    "prompt": _said(messages[-2]) if len(messages) > 1 else "",
                    "reference": _said(messages[-1]),
                    "answer": answer.text,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.job.artifact(path)


def _said(message: Message) -> str:
    return tool_parsing.as_text(text_of(message["content"]), tool_parsing.calls_of_message(message))
