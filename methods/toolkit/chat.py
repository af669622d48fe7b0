"""Turns conversations into token ids with the model's own chat template, and says which tokens are trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.contract import Job, Refused
from methods.toolkit import remote_code, thoughts, token_templates
from methods.toolkit.chat_template import (
    TemplateSettings,
    find_style,
    found_once,
    prepare,
    set_thinking,
    strip_date,
)

IGNORED = -100

Message = dict[str, Any]
"""A turn as OpenAI's interface has it: `role`, `content`; an answer may have `reasoning_content`, `tool_calls` and a
`weight` of 0, with which it is not trained."""

Tools = Sequence[Mapping[str, Any]] | None


class RenderError(ValueError):
    """The chat template refuses a conversation, or renders it so that no prompt comes before an answer."""


class RewrittenError(RenderError):
    """The chat template renders earlier turns of a conversation otherwise once another turn follows."""


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens; `labels` holds the ids of trained tokens and -100 elsewhere (same length).

    `prompt_length`: tokens before the last trained answer.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int

    @property
    def supervised(self) -> int:
        """Number of trained tokens."""
        return sum(label != IGNORED for label in self.labels)


def text_of(content: Any) -> str:
    """What the content of a message says, without its images: it is a text, or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])


def load_tokenizer(path: str, settings: TemplateSettings | None = None) -> tuple[Any, list[str]]:
    """Load the tokenizer of a model folder or hub id, ready to train and to answer with.

    Returns the tokenizer and what had to be added to it, one sentence each. Raises Refused if the model has no
    end-of-sequence token: it could never learn to stop.
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
    settings = settings or TemplateSettings()
    added += prepare(tokenizer, settings)
    tokenizer.configured_ends = configured_ends(path)
    tokenizer.thinking = settings.thinking
    return tokenizer, added


def training_tokenizer(job: Job) -> Any:
    """The tokenizer of the job's base model; warns of each thing that had to be added to it. Raises Refused.

    With `thinking: auto` the template leaves thoughts out by default unless the training rows hold some.
    """
    settings = TemplateSettings.of_job(job.parameters, job.inputs)
    tokenizer, added = load_tokenizer(job.inputs["base_model"], settings)
    thinks = follow_rows(tokenizer, settings, Path(job.inputs["train_rows"]))
    if thinks is not None:
        how = "with thoughts, as training rows have them" if thinks else "without thoughts: no training row holds one"
        print(f"thinking: the model is trained and served {how}", flush=True)
    for text in added:
        job.warning(text)
    return tokenizer


def follow_rows(tokenizer: Any, settings: TemplateSettings, rows: Path) -> bool | None:
    """With `thinking: auto`, make the template's default what stored rows have: thoughts, or none.

    Returns the default; None where the settings decide it, or where the template cannot leave thoughts out.
    """
    switch = find_style(tokenizer).switch
    if settings.thinking != "auto" or switch is None or switch in settings.variables:
        return None
    on = thoughts.rows_have_thoughts(rows)
    set_thinking(tokenizer, on)
    return on


def job_tokenizer(job: Job, path: str) -> Any:
    """The tokenizer of a model that answers in a job of inference, with the job's settings. Raises Refused."""
    return load_tokenizer(path, TemplateSettings.of_job(job.parameters, job.inputs))[0]


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer with its template; a template that prints the date prints the day of rendering again."""
    template = tokenizer.chat_template
    strip_date(tokenizer)
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = template


def end_tokens(tokenizer: Any) -> list[int]:
    """Ids of every token that ends an answer of this model.

    Those of the tokenizer, of the model's generation settings, and what the chat template writes after an answer.
    """
    ends = {tokenizer.eos_token_id, *getattr(tokenizer, "configured_ends", ())}
    written = _end_of_turn(tokenizer)
    return sorted(ends | ({tokenizer.convert_tokens_to_ids(written)} if written else set()))


def answer_end(tokenizer: Any) -> str:
    """The token that ends every answer in training."""
    talk = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
    end: str = tokenizer.convert_ids_to_tokens(render_conversation(tokenizer, talk).input_ids[-1])
    return end


def configured_ends(path: str) -> list[int]:
    """The end tokens of the generation settings of a model folder or hub id; empty without such settings."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation settings
        return []
    return configured if isinstance(configured, list) else [] if configured is None else [configured]


def _end_of_turn(tokenizer: Any) -> str | None:
    """The special token that the template writes behind the last answer; None where it writes none."""
    found: str | None = found_once(tokenizer, "end_of_turn", _find_end_of_turn)
    return found


def shows_tools(tokenizer: Any) -> bool:
    """Whether the chat template shows the model the tools that it may call."""
    return bool(found_once(tokenizer, "shows_tools", _find_tools_shown))


def _find_tools_shown(tokenizer: Any) -> bool:
    function = {"name": "shown_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
    user, tools = [{"role": "user", "content": "Question"}], [{"type": "function", "function": function}]
    try:
        return "shown_tool" in _apply(tokenizer, user, True, tools, {})
    except RenderError:
        return False


def _find_end_of_turn(tokenizer: Any) -> str | None:
    talk = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
    try:
        behind = _text(tokenizer, talk, prompt=False).rpartition("Answer")[2].lstrip()
    except RenderError:
        return None
    special = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
    return max((token.content for token in special if behind.startswith(token.content)), key=len, default=None)


# --- texts --------------------------------------------------------------------------------------------------


def _text(
    tokenizer: Any, messages: Sequence[Message], *, prompt: bool, tools: Tools = None, thinking: bool | None = None
) -> str:
    """What the template makes of messages; `prompt`: with the header that makes the model answer. Raises RenderError.

    `thinking` switches thoughts on or off where the template can; None: its default.
    """
    if tools and not shows_tools(tokenizer):
        raise RenderError("the chat template of this model shows no tools: take another model, or remove the tools")
    style = find_style(tokenizer)
    named = {} if thinking is None or style.switch is None else {style.switch: thinking}
    shown = [_shown(message, inline=style.place == "text") for message in messages]
    try:
        return _apply(tokenizer, shown, prompt, tools, named)
    except RenderError:
        # Some templates join the arguments of a call to text, others write them as JSON.
        if not any("tool_calls" in message for message in shown):
            raise
        return _apply(tokenizer, [_with_text_arguments(message) for message in shown], prompt, tools, named)


def _apply(tokenizer: Any, shown: list[Message], prompt: bool, tools: Tools, named: Mapping[str, bool]) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            shown, tools=list(tools) if tools else None, add_generation_prompt=prompt, tokenize=False, **named
        )
    except Exception as error:  # a template is a program of somebody else: whatever it raises is about this row
        raise RenderError(f"the chat template refuses the conversation: {error or type(error).__name__}") from error
    return text


def _shown(message: Message, *, inline: bool) -> Message:
    """A message as templates expect it: the thought apart, or in the text where the template has no place for it."""
    kept = {name: value for name, value in message.items() if name not in ("weight", *thoughts.FIELDS)}
    if message["role"] != "assistant" or not isinstance(message.get("content") or "", str):
        return kept
    thought, content = thoughts.split_message(message)
    if thought is None:
        return kept
    if inline:
        return {**kept, "content": f"{thoughts.OPEN}\n{thought}\n{thoughts.CLOSE}\n\n{content}"}
    return {**kept, "content": content, thoughts.FIELDS[0]: thought}


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _answer_text(
    tokenizer: Any, messages: Sequence[Message], prompt: str, tools: Tools, thinking: bool | None, follower: Message
) -> str:
    """What the model has to write after `prompt` to give the last of `messages`, up to its end token."""
    whole = _text(tokenizer, messages, prompt=False, tools=tools, thinking=thinking)
    body = _after_prompt(whole, prompt, messages[-1])
    missing = [name for name in _called(messages[-1]) if name not in body]
    if missing:
        raise RenderError(f"the chat template of this model leaves the call of {missing[0]} out of the answer")
    content = text_of(thoughts.split_message(messages[-1])[1]).strip()
    said = body.find(content) + len(content) if content in body else 0
    ends = [text for text in tokenizer.convert_ids_to_tokens(end_tokens(tokenizer)) if isinstance(text, str)]
    found = [(body.index(end, said), end) for end in ends if end in body[said:]]
    if found:
        place, end = min(found)
        return body[:place] + end
    return body + _written_next(tokenizer, messages, tools, follower, ends)


def _after_prompt(whole: str, prompt: str, message: Message) -> str:
    """The part of a rendered conversation that follows the prompt of its last message. Raises RenderError."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    header = thoughts.without_markup(prompt)
    thought, content = thoughts.split_message(message)
    if whole.startswith(header):
        answer = thoughts.without_block(whole[len(header) :])
    elif _called(message):
        raise RenderError("the chat template renders the prompt of a tool call otherwise when the call follows")
    else:  # the template writes the prompt otherwise once it is answered: the answer is what the row says
        answer = content
    return f"{thought or ''}\n{thoughts.CLOSE}\n\n{answer}" if thoughts.leaves_open(prompt) else answer


def _written_next(
    tokenizer: Any, messages: Sequence[Message], tools: Tools, follower: Message, ends: Iterable[str]
) -> str:
    """The end token of an answer behind which the template writes none: the one that the next turn begins with."""
    plain = _kept(messages, thinking=False)  # thoughts would go once another turn follows
    try:
        whole, longer = (_text(tokenizer, talk, prompt=False, tools=tools) for talk in (plain, [*plain, follower]))
    except RenderError:
        whole, longer = "", ""
    following = longer[len(whole) :] if longer.startswith(whole) else ""
    begun = [end for end in ends if following.startswith(end)]
    return max(begun, key=len, default=_end_of_turn(tokenizer) or str(tokenizer.eos_token))


# --- tokens -------------------------------------------------------------------------------------------------


def render_prompt(
    tokenizer: Any, messages: Sequence[Message], tools: Tools = None, thinking: bool | None = None
) -> list[int]:
    """Token ids of `messages` with the header that makes the model answer. Raises RenderError."""
    return _ids(tokenizer, _text(tokenizer, messages, prompt=True, tools=tools, thinking=thinking))


def render_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    start: int = 0,
    tools: Tools = None,
    thinking: bool | None = None,
) -> Rendered:
    """Token ids of a whole conversation; every answer from message `start` on is trained up to its end token.

    The tokens before an answer are those that a server renders for the messages before it. What the template writes
    after the end token of the last answer (a newline, mostly) is left out: at inference the model stops before it.
    `thinking` switches the thoughts of the answers; None: as each answer has one, or as the tokenizer was loaded for.
    Raises RewrittenError if the template renders earlier turns otherwise than the prompts of their answers, and
    RenderError for any other reason.
    """
    parts: list[tuple[str, bool]] = []
    done = ""
    for position in answers_of(messages, start):
        flag = _thinks(tokenizer, messages[position]) if thinking is None else thinking
        upto = _kept(messages[: position + 1], flag)
        prompt = _text(tokenizer, upto[:-1], prompt=True, tools=tools, thinking=flag)
        if not prompt.startswith(done):
            raise RewrittenError(f"the chat template rewrites the turns before message {position + 1}")
        follower = messages[position + 1] if position + 1 < len(messages) else _follower(upto[-1])
        answer = _answer_text(tokenizer, upto, prompt, tools, flag, follower)
        parts += [(prompt[len(done) :], False), (answer, True)]
        done = prompt + answer
    return _tokens(tokenizer, parts)


def answers_of(messages: Sequence[Message], start: int = 0) -> list[int]:
    """Positions of the answers from message `start` on that are trained."""
    return [
        position
        for position, message in enumerate(messages)
        if position >= start and message["role"] == "assistant" and message.get("weight", 1) != 0
    ]


def has_thought(message: Message) -> bool:
    """Whether an answer holds a thought."""
    return thoughts.split_message(message)[0] is not None


def _thinks(tokenizer: Any, answer: Message) -> bool:
    setting = getattr(tokenizer, "thinking", "auto")
    return has_thought(answer) if setting == "auto" else setting == "on"


def _kept(messages: Sequence[Message], thinking: bool) -> list[Message]:
    """The messages; without thoughts where they are to be left out."""
    if thinking:
        return list(messages)
    return [_without_thought(message) if message["role"] == "assistant" else message for message in messages]


def _without_thought(message: Message) -> Message:
    thought, content = thoughts.split_message(message)
    if thought is None:
        return message
    return {**{name: value for name, value in message.items() if name not in thoughts.FIELDS}, "content": content}


def _called(message: Message) -> list[str]:
    """The names of the functions that an answer calls."""
    return [call["function"]["name"] for call in message.get("tool_calls") or []]


def _follower(answer: Message) -> Message:
    """A message that may follow an answer."""
    if called := _called(answer):
        return {"role": "tool", "name": called[0], "content": "Result"}
    return {"role": "user", "content": "Question"}


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _tokens(tokenizer: Any, parts: Sequence[tuple[str, bool]]) -> Rendered:
    """Token ids of texts in a row, each trained or not; a token never belongs to two of them."""
    prompt = _ids(tokenizer, "".join(text for text, _ in parts[:-1]))
    split = _split(tokenizer, [text for text, _ in parts], prompt)
    ids = [token for piece in split for token in piece]
    labels = [
        token if trained else IGNORED for piece, (_, trained) in zip(split, parts, strict=True) for token in piece
    ]
    return Rendered(ids, labels, len(ids) - len(split[-1]) if split else 0)


def _split(tokenizer: Any, texts: list[str], prompt: list[int]) -> list[list[int]]:
    """The token ids of each text; together those of the whole where it divides so, with `prompt` at its start."""
    if not texts:
        return []
    if tokenizer.is_fast:
        found = _split_whole(tokenizer, texts)
        if found is not None and [token for piece in found[:-1] for token in piece] == prompt:
            return found
    whole = _ids(tokenizer, "".join(texts))
    answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else _ids(tokenizer, texts[-1])
    if len(texts) == 2:
        return [prompt, answer]
    return [_ids(tokenizer, text) for text in texts[:-1]] + [answer]


def _split_whole(tokenizer: Any, texts: list[str]) -> list[list[int]] | None:
    """The tokens of the joined text, divided between the texts; None if a token reaches over a border."""
    encoded = tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    found, first, border = [], 0, 0
    for text in texts:
        border += len(text)
        last = first
        while last < len(ids) and offsets[last][0] < border:
            last += 1
        if last > first and offsets[last - 1][1] > border:
            return None
        found.append(ids[first:last])
        first = last
    if first != len(ids):
        found[-1] += ids[first:]
    return found
