"""Serves a customized or complete model of this method over HTTP, with the chat route of OpenAI's API.

The one way to serve a trained prompt: other servers know adapters of layers only. One answer is made at a time.
Run as: python deploying.py JOB_DIR
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any

from transformers import set_seed

from methods import contract
from methods.toolkit import chat, generating, json_server, models, tool_answers

LONGEST_ANSWER = 512
"""Tokens of an answer whose request names no limit."""

_REFUSED = {
    "n": (None, 1),
    "functions": (None, []),
    "stop": (None, []),
    "logprobs": (None, False),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
}
"""Fields that would change the answer and are not offered, with the values that change nothing."""

_SHAPING = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of sampling that no request can name: the model's generation_config decides them."""


class ChatModel:
    """The model, its tokenizer, and what answers requests with them."""

    def __init__(self, name: str, model: Any, tokenizer: Any, model_settings: Sequence[str] = ()) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.published = generating.own_settings(model)
        self.model_settings = (*model_settings, *_SHAPING)
        self._alone = threading.Lock()

    def tokenize(self, body: json_server.Body) -> json_server.Body:
        """The token ids that the messages of a request become."""
        tokens = self._prompt(body)
        return {"tokens": tokens, "count": len(tokens)}

    def complete(self, body: json_server.Body) -> json_server.Body | Generator[json_server.Body, None, None]:
        """Answer a request of OpenAI's chat route, whole or as a stream."""
        for field, harmless in _REFUSED.items():
            if body.get(field) not in harmless:
                raise json_server.RequestRefused(f"{field} is not offered here", field)
        if body.get("stream") and body.get("tools"):
            raise json_server.RequestRefused("stream is not offered here with tools", "stream")
        prompt, seed = self._prompt(body), _number(body, "seed", None, int, 0, 2**32 - 1)
        sampling = self._sampling(body, self._room(prompt))
        if body.get("stream"):
            counted = bool((body.get("stream_options") or {}).get("include_usage"))
            return self._streamed(prompt, sampling, seed, counted)
        with self._alone:
            _start_at(seed)
            answer = generating.generate(self.model, self.tokenizer, [prompt], sampling)[0]
        message: dict[str, Any] = {"role": "assistant", "content": answer.said}
        calls = self._calls(answer, prompt, body.get("tools"))
        reason = "tool_calls" if calls else _reason(answer)
        choice = {"index": 0, "message": message | calls, "finish_reason": reason, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(prompt, answer)}

    def _calls(self, answer: generating.Answer, prompt: list[int], tools: Any) -> dict[str, Any]:
        """The fields of a message that calls tools; none for one that calls none that can be read."""
        if not tools:
            return {}
        parsed = tool_answers.read_calls(self.tokenizer, answer.marked, prompt, tools)
        if not parsed.calls or parsed.broken:
            return {}
        calls = [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
            for call in parsed.calls
        ]
        return {"content": parsed.content, "tool_calls": calls}

    def _streamed(
        self, prompt: list[int], sampling: generating.Sampling, seed: int | None, counted: bool
    ) -> Generator[json_server.Body, None, None]:
        head = self._head("chat.completion.chunk")

        def chunk(delta: dict[str, str], reason: str | None = None) -> json_server.Body:
            return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]}

        with self._alone:
            _start_at(seed)
            yield chunk({"role": "assistant", "content": ""})
            pieces = generating.stream(self.model, self.tokenizer, prompt, sampling)
            try:
                while True:
                    text = next(pieces)
                    if text:
                        yield chunk({"content": text})
            except StopIteration as end:
                answer = end.value
            finally:
                pieces.close()
        yield chunk({}, _reason(answer))
        if counted:
            yield {**head, "choices": [], "usage": _usage(prompt, answer)}

    def _head(self, kind: str) -> json_server.Body:
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    def _room(self, prompt: list[int]) -> int:
        """How many tokens an answer can have before the positions of the model end."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return LONGEST_ANSWER
        trained = generating.trained_prompt(self.model)
        room = int(positions) - len(prompt) - (0 if trained is None else len(trained))
        if room < 1:
            raise json_server.RequestRefused(
                f"the messages have {len(prompt)} tokens, and the model has {positions} positions", "messages"
            )
        return room

    def _sampling(self, body: json_server.Body, room: int) -> generating.Sampling:
        """How a request is answered; what it does not say is as the model's generation_config has it."""
        limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        return generating.Sampling(
            max_new_tokens=min(room, _number(body, limit, LONGEST_ANSWER, int, 1, 10**6)),
            temperature=_number(body, "temperature", self.published.get("temperature", 1.0), float, 0, 2),
            top_p=_number(body, "top_p", self.published.get("top_p", 1.0), float, 1e-6, 1),
            top_k=self.published.get("top_k", 0),
            model_settings=self.model_settings,
        )

    def _prompt(self, body: json_server.Body) -> list[int]:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise json_server.RequestRefused("messages is a list of at least one message", "messages")
        given = [_message(each) for each in messages]
        tools = body.get("tools") or None
        if tools is not None and not _are_tools(tools):
            raise json_server.RequestRefused("tools is a list of functions, each with a name", "tools")
        try:
            return chat.render_prompt(self.tokenizer, given, tools)
        except Exception as error:  # templates raise errors of their own kinds for roles they do not know
            raise json_server.RequestRefused(
                f"the chat template refuses these messages: {error}", "messages"
            ) from error


def main(job: contract.Job) -> dict[str, object]:
    """Serve until asked to stop."""
    job.phase("loading the model")
    adapter = job.inputs.get("adapter")
    base = job.inputs["base_model"] if adapter else job.inputs["model"]
    tokenizer, _ = chat.load_tokenizer(adapter or base)
    model = models.load_with_adapter(base, adapter, job.parameters["dtype"])
    served = ChatModel(job.inputs["name"], model, tokenizer, job.parameters.get("model_settings", ()))
    json_server.serve(job, {"/v1/chat/completions": served.complete, "/tokenize": served.tokenize})
    return {"served": served.name}


def _message(given: Any) -> chat.Message:
    """A message whose content is text, or a list of parts that are."""
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise json_server.RequestRefused("a message is an object with role and content", "messages")
    content = given.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    calls = given.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise json_server.RequestRefused("the content of a message is text", "messages")
    beside = {name: given[name] for name in ("tool_call_id", "name") if isinstance(given.get(name), str)}
    if calls:
        beside["tool_calls"] = [_call(each) for each in calls]
    return {"role": given["role"], "content": content or "", **beside}


def _call(given: Any) -> dict[str, Any]:
    """A call of a message, with its arguments as an object: templates read them so."""
    try:
        function = given["function"]
        arguments = json.loads(function["arguments"])
        return {**given, "function": {**function, "arguments": arguments}}
    except (LookupError, TypeError, ValueError) as error:
        raise json_server.RequestRefused(
            "a call has a function with a name and arguments as JSON text", "messages"
        ) from error


def _are_tools(tools: Any) -> bool:
    return isinstance(tools, list) and all(
        isinstance(tool, dict) and isinstance(tool.get("function"), dict) and "name" in tool["function"]
        for tool in tools
    )


def _number(body: json_server.Body, field: str, default: Any, kind: type, least: float, most: float) -> Any:
    value = body.get(field)
    if value is None:
        return default
    numeric = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, numeric) or not least <= value <= most:
        raise json_server.RequestRefused(f"{field} is {kind.__name__} from {least:g} to {most:g}", field)
    return kind(value)


def _start_at(seed: int | None) -> None:
    if seed is not None:
        set_seed(seed)


def _reason(answer: generating.Answer) -> str:
    return "length" if answer.hit_limit else "stop"


def _usage(prompt: list[int], answer: generating.Answer) -> dict[str, int]:
    return {
        "prompt_tokens": len(prompt),
        "completion_tokens": answer.tokens,
        "total_tokens": len(prompt) + answer.tokens,
    }


if __name__ == "__main__":
    contract.run(main)
