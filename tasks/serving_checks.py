"""Proof that what is served is what was trained: the prompt tokens it renders, and the greedy answers it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.endpoints import Deployment, Probe, Verification
from configs.errors import UserError
from methods.toolkit.tool_parsing import calls_of_message
from tasks.http_backends import post_json, refused
from tasks.text_checks import equal_json
from tasks.tool_messages import sent

_CHAT = "/v1/chat/completions"


def verify_prompts(probes: Sequence[Probe], rendered: list[list[int]]) -> None:
    """Compare what the served chat template makes of each probe with what was trained on. Raises UserError."""
    for number, (probe, ids) in enumerate(zip(probes, rendered, strict=True), start=1):
        if ids == probe.prompt_token_ids:
            continue
        pairs = zip(ids, probe.prompt_token_ids, strict=False)
        first = next((place for place, (got, want) in enumerate(pairs) if got != want), None)
        place = min(len(ids), len(probe.prompt_token_ids)) if first is None else first
        around = slice(max(0, place - 3), place + 5)
        raise UserError(
            f"probe {number} of {len(probes)}: the served chat template renders other prompt tokens than "
            f"were trained on; the first difference is at token {place}: "
            f"{ids[around]} ({len(ids)} tokens in all)",
            field="prompt_token_ids",
            expected=f"{probe.prompt_token_ids[around]} ({len(probe.prompt_token_ids)} tokens in all)",
            mend="serve the tokenizer and chat template that the training stage saved with the model",
        )


def verify_answers(
    deployment: Deployment, probes: Sequence[Probe], timeout: float, *, tokens_known: bool = True
) -> Verification:
    """Ask the running server every probe: number of prompt tokens, and the greedy answer where it is known.

    Quantised here, an answer may be another one: how many are the same is told. `tokens_known`: whether the prompts
    were compared token by token before. `timeout` is in seconds, for each answer. Raises UserError at the first
    prompt or answer that is another one.
    """
    same = 0
    counted = True
    known = [probe for probe in probes if probe.answer is not None]
    for number, probe in enumerate(probes, start=1):
        where = f"probe {number} of {len(probes)}"
        message, prompt_tokens = _ask(deployment, probe, timeout)
        if prompt_tokens is not None and prompt_tokens != len(probe.prompt_token_ids):
            raise UserError(
                f"{where}: the server made {prompt_tokens} prompt tokens of it",
                field="usage.prompt_tokens",
                expected=f"{len(probe.prompt_token_ids)}, as the model's own template makes",
            )
        counted = counted and prompt_tokens is not None
        is_same = probe.answer is not None and _is_same(message, probe)
        if probe.answer is not None and not is_same and deployment.quantization is None:
            given = message.get("tool_calls") or message.get("content") or ""
            raise UserError(
                f"{where}: the server's greedy answer is another one: {given!r}",
                field="answer",
                expected=repr(probe.answer),
            )
        same += is_same
    compared = len(known) if deployment.quantization is None else 0
    return Verification(
        prompts_checked=len(probes) if tokens_known or counted else 0,
        prompts_compared="tokens" if tokens_known else "counts" if counted else "nothing",
        answers_checked=compared,
        answers_skipped=_why_skipped(deployment, len(probes) - compared),
        answers_same=same if deployment.quantization is not None and known else None,
    )


def _why_skipped(deployment: Deployment, skipped: int) -> str | None:
    if skipped == 0:
        return None
    if deployment.quantization is not None:
        return f"quantised here ({deployment.quantization}), which changes answers"
    return f"{skipped} probes came without a known answer"


def _is_same(message: dict[str, Any], probe: Probe) -> bool:
    """Whether the server's message is the probe's answer: the same calls where it reads them, else the same text."""
    if message.get("tool_calls"):
        calls = calls_of_message(message)
        return equal_json(calls, probe.tool_calls)
    # White space around an answer is the decoder's doing, not the model's.
    return str(message.get("content") or "").strip() == str(probe.answer).strip()


def _ask(deployment: Deployment, probe: Probe, timeout: float) -> tuple[dict[str, Any], int | None]:
    """The server's greedy answer to the probe, and how many prompt tokens it counted, if it tells."""
    asked = {
        "model": deployment.backend_model,
        **sent(probe.messages, probe.tools),
        "temperature": 0.0,
        "max_tokens": probe.max_new_tokens if probe.answer is not None else 1,
    }
    answer = post_json(deployment, _CHAT, asked, timeout)
    try:
        counted = (answer.get("usage") or {}).get("prompt_tokens")
        message: dict[str, Any] = answer["choices"][0]["message"]
        calls_of_message(message)
        return message, int(counted) if counted is not None else None
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise refused(deployment, _CHAT, f"{answer!r:.500}") from error
