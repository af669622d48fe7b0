"""Proof that what is served is what was trained: the prompt tokens it renders, and the greedy answers it gives."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from configs.endpoints import Deployment, Probe, Verification
from configs.errors import UserError
from tasks.files import last_lines
from tasks.model_server import TOOLKIT, serving_environment


def rendered_prompts(
    deployment: Deployment, model_folder: Path, probes: Sequence[Probe], timeout: float
) -> list[list[int]]:
    """Token ids that the served folder's chat template makes of each probe, by the interpreter that serves.

    `timeout` is in seconds. Raises UserError if they cannot be rendered.
    """
    if not probes:
        return []
    deployment.log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, deployment.log.open("ab") as log:
        asked, answered = Path(scratch, "messages.json"), Path(scratch, "rendered.json")
        asked.write_text(json.dumps([probe.messages for probe in probes]), encoding="utf-8")
        program = TOOLKIT / "render_prompts.py"
        try:
            subprocess.run(
                [str(deployment.python), str(program), str(model_folder), str(asked), str(answered)],
                env=serving_environment(model_folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=True,
            )
        except subprocess.SubprocessError as error:
            said = last_lines(deployment.log, 30)
            raise UserError(
                f"the prompts could not be rendered with the model's chat template. End of the log:\n{said}",
                file=deployment.log,
            ) from error
        return [[int(each) for each in ids] for ids in json.loads(answered.read_text(encoding="utf-8"))]


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


def verify_answers(deployment: Deployment, probes: Sequence[Probe], timeout: float) -> Verification:
    """Ask the running server every probe: number of prompt tokens, and the greedy answer where it is known.

    `timeout` is in seconds, for each answer. Raises UserError at the first that is another one.
    """
    comparable = deployment.quantization is None
    answers = 0
    for number, probe in enumerate(probes, start=1):
        compared = comparable and probe.answer is not None
        content, prompt_tokens = _ask(deployment, probe, probe.max_new_tokens if compared else 1, timeout)
        where = f"probe {number} of {len(probes)}"
        if prompt_tokens != len(probe.prompt_token_ids):
            raise UserError(
                f"{where}: the server made {prompt_tokens} prompt tokens of it",
                field="usage.prompt_tokens",
                expected=f"{len(probe.prompt_token_ids)}, as trained on",
            )
        # White space around an answer is the decoder's doing, not the model's.
        if compared and content.strip() != (probe.answer or "").strip():
            raise UserError(
                f"{where}: the server's greedy answer is another one: {content!r}",
                field="answer",
                expected=repr(probe.answer),
            )
        answers += compared
    return Verification(
        prompts_checked=len(probes),
        answers_checked=answers,
        answers_skipped=_why_skipped(deployment, len(probes) - answers),
    )


def _why_skipped(deployment: Deployment, skipped: int) -> str | None:
    if skipped == 0:
        return None
    if deployment.quantization is not None:
        return f"quantised here ({deployment.quantization}), which changes answers"
    return f"{skipped} probes came without a known answer"


def _ask(deployment: Deployment, probe: Probe, max_tokens: int, timeout: float) -> tuple[str, int]:
    """The server's greedy answer to the probe, and how many prompt tokens it counted."""
    import httpx

    body = {
        "model": deployment.model,
        "messages": probe.messages,
        "temperature": 0.0,
        "max_tokens": max_tokens,
    }
    url = f"http://127.0.0.1:{deployment.port}/v1/chat/completions"
    try:
        response = httpx.post(url, json=body, timeout=timeout, trust_env=False)
        response.raise_for_status()
        answer = response.json()
        return answer["choices"][0]["message"].get("content") or "", int(answer["usage"]["prompt_tokens"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        said = last_lines(deployment.log, 30)
        raise UserError(
            f"the server of '{deployment.model}' did not answer a chat completion: {error!r}. "
            f"The end of its log:\n{said}",
            file=deployment.log,
        ) from error
