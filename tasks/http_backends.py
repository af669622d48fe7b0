"""Questions put to the server behind an endpoint, by HTTP, with errors that show the end of its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.endpoints import Deployment
from configs.errors import UserError
from tasks.files import last_lines

NOT_OFFERED = frozenset({404, 405, 501})
"""What servers answer on routes they do not have."""


def post_json(deployment: Deployment, path: str, content: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """The server's answer to a request in JSON; `timeout` in seconds. Raises UserError."""
    import httpx

    try:
        response = httpx.post(f"{deployment.backend}{path}", json=content, timeout=timeout, trust_env=False)
        if response.is_error:
            raise refused(deployment, path, f"{response.status_code} {response.text[:500]}")
        answer = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise refused(deployment, path, repr(error)) from error
    if not isinstance(answer, dict):
        raise refused(deployment, path, f"no JSON object: {answer!r:.500}")
    return answer


def offers(deployment: Deployment, path: str, content: Mapping[str, Any], timeout: float) -> bool:
    """Whether the server has this route. Raises UserError if it does not answer at all."""
    import httpx

    try:
        response = httpx.post(f"{deployment.backend}{path}", json=content, timeout=timeout, trust_env=False)
    except httpx.HTTPError as error:
        raise refused(deployment, path, repr(error)) from error
    return response.status_code not in NOT_OFFERED


def posted_tokens(deployment: Deployment, path: str, content: Mapping[str, Any], timeout: float) -> list[int]:
    """The list `tokens` of the server's answer. Raises UserError."""
    answer = post_json(deployment, path, content, timeout)
    try:
        return [int(token) for token in answer["tokens"]]
    except (KeyError, TypeError, ValueError) as error:
        raise refused(deployment, path, f"no list `tokens`: {answer!r:.500}") from error


def refused(deployment: Deployment, path: str, said: str) -> UserError:
    """The error to raise for an answer that cannot be used."""
    end = last_lines(deployment.log, 30)
    return UserError(
        f"the server of '{deployment.model}' did not answer {path} as it should: {said}"
        + (f". The end of its log:\n{end}" if end else ""),
        file=deployment.log,
    )
