"""Puts a model behind an endpoint and moves the `deployed` alias with it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, cast

from configs.endpoints import APPLIED_SETTINGS, Endpoint, Probe, Quantization, RequestProbe, Target
from configs.errors import UserError
from configs.records import ModelRecord
from methods.registry import Method, find_method
from tasks import endpoints, models
from tasks.hardware import ask_hardware
from tasks.inference import Answer, Generation, answer_prompts, answer_requests
from tasks.serving_checks import verify_prompts
from tasks.serving_requests import predicted
from tasks.stages import phase_event
from tasks.targets import TARGETS

PROBE_TOKENS = 48
_TOOL_PROBE_TOKENS = 128  # calls are longer than the start of an answer
_PROBES_FILE = "probes.json"
_PROBE_SEED = 42
_UNTRAINED_REQUESTS: dict[str, list[dict[str, Any]]] = {
    "embedding": [{"texts": ["What is the capital of France?", "A boat on the sea"]}],
    "image-generation": [{"caption": "a boat on the sea"}],
}
_UNTRAINED_PROBES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write one sentence about the sea."}],
]


def deploy_model(
    model: ModelRecord,
    endpoint: str | None,
    target: str | None,
    quantization: str | None,
    port: int | None,
    on_events: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> Endpoint:
    """Serve the model at the endpoint (by default one named after its line) by the target (the method's first).

    The switch happens only after the server was seen to render the trained prompt tokens and to give the model's
    own greedy answers. Raises UserError; what was deployed before then stays up.
    """
    if model.stage == "trained":
        raise UserError("these weights are not saved yet", field="model", value=model.name, mend="save them first")
    method = find_method(model.method)
    chosen = check_target(method, target)
    missing = TARGETS[chosen].ready()
    if missing is not None:  # told before the model has answered its probes, which takes a while
        raise UserError(f"the target {chosen} is not ready on this host: {missing}", field="target", value=chosen)
    custom = chosen == "custom"
    python = method.stage_python("deploying") if custom else None
    program = method.stage_file("deploying") if custom else None
    if model.stage != "base":
        # Before the switch: a registry that does not answer must not be left behind what is deployed.
        model = models.register_model(model)
    on_events([phase_event("asking the model for its own answers")])
    probes = collect_probes(model, chosen, on_events)
    on_events([phase_event("starting the server and comparing its prompts and answers")])
    served = endpoints.deploy(
        endpoint or endpoint_name(model.line),
        model.name,
        model.path,
        probes=probes,
        target=chosen,
        quantization=cast(Quantization | None, quantization),
        python=python,
        program=program,
        base_path=model.base_path if model.adapter else None,
        port=port,
        dtype=_served_dtype(model, chosen),
    )
    models.set_alias(model, "deployed")
    return served


def _served_dtype(model: ModelRecord, target: Target) -> str:
    """The number type that the server loads the model in: that of the model's own answers.

    `auto` means the checkpoint's own to `transformers serve`, which a processor may only emulate.
    """
    if model.dtype != "auto" or target != "transformers":
        return model.dtype
    found = ask_hardware(Path(sys.executable))
    return found.auto_inference if found is not None else model.dtype


def check_target(method: Method, target: str | None) -> Target:
    """The target, or the first of the method's. Raises UserError for one that does not serve its models."""
    if not method.deployment_targets or (target is not None and target not in method.deployment_targets):
        raise UserError(
            f"models of the method {method.name} cannot be served{' so' if method.deployment_targets else ''}",
            field="target",
            value=target,
            expected=f"one of {', '.join(method.deployment_targets)}" if method.deployment_targets else None,
        )
    return next((each for each in method.deployment_targets if each == target), method.deployment_targets[0])


def endpoint_name(line: str) -> str:
    """The endpoint of a line of models: its name as lower-case letters, digits and hyphens."""
    name = re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-")[:63].strip("-")
    # A name in another script leaves nothing to spell a host-like name with.
    return name or f"line-{hashlib.sha256(line.encode()).hexdigest()[:8]}"


def collect_probes(
    model: ModelRecord, target: Target, on_events: Callable[[list[dict[str, Any]]], None]
) -> list[Probe] | list[RequestProbe]:
    """Prompts with the token ids of training and the model's own greedy answers; requests if it does not chat.

    The answers are made with the settings of the model's generation_config that the target applies at temperature 0.
    A base model was not trained here: its probes are general ones, answered by its own inference stage.
    """
    file = model.path / _PROBES_FILE
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    stored = content.get("probes", [])
    of_type = _UNTRAINED_REQUESTS.get(find_method(model.method).types[0])
    if of_type is not None or any("request" in probe for probe in stored):
        requests = [probe["request"] for probe in stored if "request" in probe] or of_type or []
        return _request_probes(model, requests, on_events)
    asked = [_asked(probe) for probe in stored] or [{"messages": messages} for messages in _UNTRAINED_PROBES]
    # One at a time, as the server answers them: a batch pads, and padding can turn a near tie of two tokens.
    tokens = _TOOL_PROBE_TOKENS if any("tools" in each for each in asked) else PROBE_TOKENS
    generation = Generation(max_new_tokens=tokens, batch_size=1, model_settings=APPLIED_SETTINGS[target])
    answers = _answers(model, asked, generation, on_events)
    probes = [
        Probe(
            **request,
            prompt_token_ids=answer.prompt_token_ids,
            answer=_known_answer(answer),
            tool_calls=answer.tool_calls or [],
            max_new_tokens=tokens,
        )
        for request, answer in zip(asked, answers, strict=True)
    ]
    _require_trained(model, probes, stored, content.get("date"), on_events)
    return probes


def _require_trained(
    model: ModelRecord,
    probes: list[Probe],
    stored: list[dict[str, Any]],
    trained_on: str | None,
    on_events: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Refuse a model whose template makes other prompts of the probes than it was trained with. Raises UserError.

    A template that prints the date makes other ones every day: it is asked for those of the day of the training run.
    """
    trained = [
        probe.model_copy(update={"prompt_token_ids": each["prompt_token_ids"]})
        for probe, each in zip(probes, stored, strict=False)
    ]
    rendered = [probe.prompt_token_ids for probe in probes]
    if trained_on is not None and rendered != [each.prompt_token_ids for each in trained]:
        dated = Generation(max_new_tokens=1, batch_size=1, template_date=date.fromisoformat(trained_on))
        asked = [_asked(probe.model_dump(exclude_none=True)) for probe in probes]
        rendered = [answer.prompt_token_ids for answer in _answers(model, asked, dated, on_events)]
    if trained:
        verify_prompts(trained, rendered)


def _answers(
    model: ModelRecord,
    asked: list[dict[str, Any]],
    generation: Generation,
    on_events: Callable[[list[dict[str, Any]]], None],
) -> list[Answer]:
    tools = [each.get("tools") for each in asked]
    return answer_prompts(model, [each["messages"] for each in asked], generation, on_events, tools)


def _known_answer(answer: Answer) -> str | None:
    """The answer as a server returns it; None where servers differ: a call that breaks off or cannot be read."""
    if answer.broken_calls:
        return None
    return answer.answer if answer.said is None else answer.said


def _asked(probe: dict[str, Any]) -> dict[str, Any]:
    """What the inference stage and the server are asked for a stored probe."""
    return {name: probe[name] for name in ("messages", "tools") if name in probe}


def _request_probes(
    model: ModelRecord, requests: list[dict[str, Any]], on_events: Callable[[list[dict[str, Any]]], None]
) -> list[RequestProbe]:
    """Requests with what the model's own inference stage makes of them; a picture's with the seed it is made with."""
    asked = [{"seed": _PROBE_SEED, **each} if "caption" in each else each for each in requests]
    with tempfile.TemporaryDirectory() as folder:
        found = answer_requests(model, asked, Generation(seed=_PROBE_SEED), on_events, Path(folder))
        return [
            RequestProbe(request=request, prediction=predicted(each))
            for request, each in zip(asked, found, strict=True)
        ]


def roll_back(endpoint: str, to: str | None = None) -> Endpoint:
    """Go back to an earlier deployment and move the `deployed` alias to its model."""
    before = endpoints.load_endpoint(endpoint)
    served = endpoints.roll_back(endpoint, to=to)
    _move_alias(before, served)
    return served


def undeploy(endpoint: str) -> Endpoint:
    """Stop serving at the endpoint and take the `deployed` alias away."""
    before = endpoints.load_endpoint(endpoint)
    served = endpoints.undeploy(endpoint)
    _move_alias(before, served)
    return served


def _move_alias(before: Endpoint, after: Endpoint) -> None:
    old, new = before.current_deployment, after.current_deployment
    if new is not None:
        models.set_alias(models.find_model(new.model_name), "deployed")
    elif old is not None:
        models.clear_alias(models.find_model(old.model_name).line, "deployed")
