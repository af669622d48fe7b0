"""Turns conversations into token ids with the model's own chat template, and says which tokens are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from methods.contract import Job, Refused
from methods.toolkit import remote_code, token_templates

IGNORED = -100

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)
"""For base models that bring no template of their own: it is saved with the model, so serving renders the same."""

Message = dict[str, str]


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens; `labels` holds the ids of trained tokens and -100 elsewhere (same length)."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int

    @property
    def supervised(self) -> int:
        """Number of trained tokens."""
        return sum(label != IGNORED for label in self.labels)


def text_of(content: Any) -> str:
    """What the content of a message says, without its images: it is a text, or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def load_tokenizer(path: str) -> tuple[Any, list[str]]:
    """Load the tokenizer of a model folder or hub id, ready to train with.

    Returns the tokenizer and what had to be added to it, one sentence each.
    Raises Refused if the model has no end-of-sequence token: it could never learn to stop.
    """
    from transformers import AutoTokenizer

    with remote_code.explained(path):
        tokenizer = AutoTokenizer.from_pretrained(path, **remote_code.loading(path))
    added = []
    if tokenizer.eos_token_id is None:
        raise Refused(f"the tokenizer of {path} names no eos_token; add one to its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        # Safe although it is also a real token: batches are masked by attention and labels, never by token id.
        tokenizer.pad_token = tokenizer.eos_token
        added.append(f"the tokenizer has no pad token: {tokenizer.eos_token!r} is used")
    if tokenizer.chat_template is None and (template := token_templates.of_generation_config(path, tokenizer)):
        tokenizer.chat_template = template
        added.append("the model has no chat template: one of its own user and assistant tokens is used and saved")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        added.append("the model has no chat template: Tuneline's plain one is used and saved with the model")
    return tokenizer, added


def training_tokenizer(job: Job) -> Any:
    """The tokenizer of the job's base model; warns of each thing that had to be added to it. Raises Refused."""
    tokenizer, added = load_tokenizer(job.inputs["base_model"])
    for text in added:
        job.warning(text)
    return tokenizer


def render_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of `messages` with the header that makes the model answer."""
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def render_conversation(tokenizer: Any, messages: list[Message], start: int = 0) -> Rendered:
    """Token ids of a whole conversation; every answer from message `start` on is trained up to its end token.

    What the template writes after the end token of the last answer (a newline, mostly) is left out: at inference
    the model stops before it. Raises ValueError if the template rewrites earlier turns, since then the tokens
    before an answer would differ between training and inference.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    prompt_length = 0
    for position, message in enumerate(messages):
        if message["role"] != "assistant" or position < start:
            continue
        before = render_prompt(tokenizer, messages[:position])
        after = _ids(tokenizer, messages[: position + 1])
        if after[: len(before)] != before or before[: len(input_ids)] != input_ids:
            # Some templates (reasoning models) rewrite earlier turns: tokenise the answer apart from its prompt.
            after = before + _answer_ids(tokenizer, message["content"])
            if before[: len(input_ids)] != input_ids:
                raise ValueError(f"the chat template rewrites the turns before message {position + 1}")
        answer = _up_to_end(after[len(before) :], tokenizer.eos_token_id)
        prompt_length = len(before)
        labels += [IGNORED] * (len(before) - len(input_ids)) + answer
        input_ids = before + answer
    return Rendered(input_ids, labels, prompt_length)


def _ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=False)
    return ids


def _answer_ids(tokenizer: Any, content: str) -> list[int]:
    ids: list[int] = tokenizer(content, add_special_tokens=False)["input_ids"]
    return ids


def _up_to_end(answer: list[int], eos: int) -> list[int]:
    """The answer with exactly one end token as its last."""
    for position in range(len(answer) - 1, -1, -1):
        if answer[position] == eos:
            return answer[: position + 1]
    return [*answer, eos]
