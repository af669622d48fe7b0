"""Answers of OpenAI-compatible servers, asked as their users ask: by address, with a key, a few at a time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from configs.endpoints import API_KEY_VARIABLE, Endpoint
from configs.errors import UserError
from methods.toolkit.thoughts import split_answer
from tasks.inference import Answer, Generation, Message
from tasks.tool_messages import received, sent

if TYPE_CHECKING:
    import httpx

AT_A_TIME = 4
GIVE_UP_AFTER = 5
"""Failures one after the other, after which a server is asked no more."""
_TIMEOUT = 600.0

Question = TypeVar("Question")
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class ChatServer:
    """Where to ask, how the server calls the model, who it is in messages, and where its key comes from."""

    address: str
    model: str
    called: str
    key_variable: str
    timeout: float = _TIMEOUT
    attempts: int = 1

    def client(self) -> httpx.Client:
        """A client that sends the key, if the environment has one. It is stored nowhere."""
        import httpx

        key = os.environ.get(self.key_variable, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(headers=headers, timeout=self.timeout, trust_env=False)

    def ask(
        self,
        client: httpx.Client,
        messages: Sequence[Message],
        temperature: float,
        max_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Answer:
        """The model's answer; `prompt_token_ids` is empty, nobody tells them. Raises UserError."""
        asked = {
            "model": self.model,
            **sent(messages, tools),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        try:
            content = self._post(client, asked)
            choice = content["choices"][0]
            said = (choice["message"].get("content") or "").strip()
            thought, answer = split_answer(said)
            return Answer(
                answer=answer.strip(),
                thought=choice["message"].get("reasoning_content") or thought,
                said=said,
                tokens=int((content.get("usage") or {}).get("completion_tokens") or 0),
                hit_limit=choice.get("finish_reason") == "length",
                prompt_token_ids=[],
                **received(choice["message"]),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{self.called} gave no answer: {error!r}", field="address", value=self.address) from error

    def _post(self, client: httpx.Client, asked: dict[str, Any]) -> Any:
        from httpx import HTTPError, HTTPStatusError

        for attempt in range(1, self.attempts + 1):
            try:
                response = client.post(f"{self.address}/chat/completions", json=asked)
                if response.status_code in (401, 403):
                    raise UserError(
                        f"{self.called} asks for its key, or for another one",
                        field=self.key_variable,
                        mend=f"export {self.key_variable}=…",
                    )
                response.raise_for_status()
                return response.json()
            except HTTPError as error:
                busy = not isinstance(error, HTTPStatusError) or error.response.status_code in (429, 500, 502, 503, 504)
                if attempt == self.attempts or not busy:
                    raise UserError(f"{self.called} did not answer: {_told(error)}", value=self.address) from error
                time.sleep(2.0 ** (attempt - 1))
        raise AssertionError("there is at least one attempt")


def _told(error: Exception) -> str:
    """What went wrong, with the start of what the server said, as servers say there why."""
    response = getattr(error, "response", None)
    return f"{error!r} {response.text[:300]}".strip() if response is not None else repr(error)


def ask_endpoint(
    endpoint: Endpoint,
    requests: Sequence[Mapping[str, Any]],
    generation: Generation,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[Answer | UserError]:
    """The endpoint's answers to requests (`messages`, and `tools` where there are some), in order.

    Where one failed, it is why.

    After `GIVE_UP_AFTER` failures one after the other the rest is not asked and has failed as well.
    """
    server = ChatServer(str(endpoint.address), endpoint.name, f"the endpoint '{endpoint.name}'", API_KEY_VARIABLE)
    with server.client() as client:
        return ask_each(
            requests,
            lambda asked: server.ask(
                client, asked["messages"], generation.temperature, generation.max_new_tokens, asked.get("tools")
            ),
            AT_A_TIME,
            on_events,
        )


def ask_each(
    questions: Sequence[Question],
    ask: Callable[[Question], Reply],
    at_a_time: int,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[Reply | UserError]:
    """What `ask` returns for each question, in order, or the UserError that it raised; see `ask_endpoint`."""
    counting = threading.Lock()
    done, in_a_row = 0, 0
    given_up: UserError | None = None

    def one(question: Question) -> Reply | UserError:
        nonlocal done, in_a_row, given_up
        if given_up is not None:
            return given_up
        reply: Reply | UserError
        try:
            reply = ask(question)
        except UserError as error:
            reply = error
        with counting:
            done += 1
            in_a_row = in_a_row + 1 if isinstance(reply, UserError) else 0
            if isinstance(reply, UserError) and in_a_row >= GIVE_UP_AFTER:
                given_up = reply
            on_events([{"type": "progress", "time": time.time(), "step": done, "total": len(questions)}])
        return reply

    pool = ThreadPoolExecutor(at_a_time)
    try:
        return list(pool.map(one, questions))
    finally:
        pool.shutdown(cancel_futures=True)
