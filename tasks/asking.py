"""Answers of an endpoint, asked as its users ask: through its address, with its key, a few at a time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from configs.endpoints import API_KEY_VARIABLE, Endpoint
from configs.errors import UserError
from tasks.inference import Answer, Generation, Message

if TYPE_CHECKING:
    import httpx

AT_A_TIME = 4
_TIMEOUT = 600.0


def ask_endpoint(
    endpoint: Endpoint,
    conversations: Sequence[list[Message]],
    generation: Generation,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[Answer]:
    """The endpoint's answers to the conversations, in order; `prompt_token_ids` is empty, nobody tells them.

    Raises UserError at the first that fails.
    """
    import httpx

    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    counting, done = threading.Lock(), 0

    def ask(messages: list[Message]) -> Answer:
        nonlocal done
        answer = _ask(client, endpoint, messages, generation)
        with counting:
            done += 1
            on_events([{"type": "progress", "time": time.time(), "step": done, "total": len(conversations)}])
        return answer

    with httpx.Client(headers=headers, timeout=_TIMEOUT, trust_env=False) as client:
        pool = ThreadPoolExecutor(AT_A_TIME)
        try:
            return list(pool.map(ask, conversations))
        finally:
            pool.shutdown(cancel_futures=True)  # the first failure is enough


def _ask(client: httpx.Client, endpoint: Endpoint, messages: list[Message], generation: Generation) -> Answer:
    from httpx import HTTPError

    asked = {
        "model": endpoint.name,
        "messages": messages,
        "temperature": generation.temperature,
        "max_tokens": generation.max_new_tokens,
    }
    url = f"{endpoint.address}/chat/completions"
    try:
        response = client.post(url, json=asked)
        if response.status_code == 401:
            raise UserError(
                "the endpoint asks for its key", field=API_KEY_VARIABLE, mend=f"export {API_KEY_VARIABLE}=…"
            )
        response.raise_for_status()
        content = response.json()
        choice = content["choices"][0]
        return Answer(
            answer=(choice["message"].get("content") or "").strip(),
            tokens=int((content.get("usage") or {}).get("completion_tokens") or 0),
            hit_limit=choice.get("finish_reason") == "length",
            prompt_token_ids=[],
        )
    except (HTTPError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"the endpoint '{endpoint.name}' did not answer: {error!r}", mend="`tuneline deployments` shows its state"
        ) from error
