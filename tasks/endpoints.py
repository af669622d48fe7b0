"""Endpoints: deploy a model at a stable address, verify it before the switch, roll back, undeploy, status, logs.

Every operation holds the endpoint's lock. The record (`endpoint.json`) is replaced atomically, and replacing
it *is* the switch: the gateway reads it, and a server whose starter dies stays only if the record names it as
current. The processes are those of `model_server`, the proof before the switch that of `serving_checks`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from configs.endpoints import (
    API_KEY_VARIABLE,
    LOOPBACK_HOSTS,
    MODEL_NAME_BYTES,
    QUANTIZATIONS,
    Deployment,
    Endpoint,
    EndpointName,
    EndpointStatus,
    Gateway,
    ModelName,
    Probe,
    Quantization,
    RequestProbe,
    Target,
)
from configs.errors import UserError
from configs.settings import Settings, load_settings
from tasks.files import last_lines
from tasks.gguf_files import discard_gguf
from tasks.model_server import (
    EndpointWork,
    free_gateway_port,
    is_alive,
    let_go,
    start_gateway,
    stop_server,
    stop_started,
)
from tasks.serving_checks import verify_answers, verify_prompts
from tasks.serving_requests import verify_requests
from tasks.serving_settings import settings_notes
from tasks.targets import TARGETS, TargetFile

_LOCK_TIMEOUT = 600.0
_SHORTEST_KEY = 16
_DRAIN_SECONDS = 30.0  # what requests under way get to finish when their server is stopped


# --- verbs --------------------------------------------------------------------------------------------------


def deploy(
    endpoint: str,
    model_name: str,
    model_path: str | Path,
    *,
    probes: Sequence[Probe] | Sequence[RequestProbe],
    target: Target = "transformers",
    quantization: Quantization | None = None,
    settings: Settings | None = None,
    python: str | Path | None = None,
    program: Path | None = None,
    base_path: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    host: str | None = None,
    port: int | None = None,
    start_timeout: float = 900.0,
) -> Endpoint:
    """Serve a model at the endpoint, switching to it only once it is proved to be the model that was trained.

    `model_path` is a self-contained Hugging Face folder, or an adapter folder whose base is a folder on this
    host. Each probe's prompt tokens are compared with what the server renders, and its answer with the
    server's greedy answer (not after quantising here, which changes answers). `python` is the interpreter of the
    targets transformers and custom, `program` the deploying file of the target custom and `base_path` the base model of
    an adapter for it. Models that do not chat are proved by the answers to requests. `host` (by default that of the
    settings) and `port` are those of the endpoint's address; an API key is taken from the environment variable
    TUNELINE_ENDPOINT_KEY, so that it is stored nowhere in clear. `start_timeout` is in seconds. Raises UserError; the
    deployment that was current then stays up and current.
    """
    if not probes:
        raise UserError("a deployment needs at least one probe to be verified with", field="probes")
    key = _key_of_environment()
    with _working_on(endpoint, settings, create=True) as work:
        _set_address(work, host or (settings or load_settings()).endpoint_host, port, key)
        deployment = _new_deployment(
            work, model_name, model_path, target, quantization, _interpreter(python), program, base_path, device, dtype
        )
        work.endpoint.deployments.append(deployment)
        _bring_up(work, deployment, probes=probes, key=key, start_timeout=start_timeout)
        return work.endpoint


def roll_back(
    endpoint: str, *, to: str | None = None, settings: Settings | None = None, start_timeout: float = 900.0
) -> Endpoint:
    """Go back to the deployment before the current one (after `undeploy`: to the last one), or to the one
    named.

    Its server is started again and must be healthy before the switch. Raises UserError if there is none to go
    back to or if it does not start; the current deployment then stays.
    """
    with _working_on(endpoint, settings) as work:
        deployment = _earlier_deployment(work.endpoint, to)
        _bring_up(work, deployment, start_timeout=start_timeout)
        return work.endpoint


def restart(endpoint: str, *, settings: Settings | None = None, start_timeout: float = 900.0) -> Endpoint:
    """Start again what is down of the endpoint, e.g. after the host was restarted. Raises UserError."""
    with _working_on(endpoint, settings) as work:
        deployment = work.endpoint.current_deployment
        if deployment is None:
            raise UserError(
                f"nothing is deployed at the endpoint '{endpoint}'", mend="deploy a model or roll back to one"
            )
        _bring_up(work, deployment, start_timeout=start_timeout)
        return work.endpoint


def undeploy(endpoint: str, *, settings: Settings | None = None) -> Endpoint:
    """Stop the endpoint's servers; its address and history are kept. Doing it twice changes nothing."""
    with _working_on(endpoint, settings) as work:
        if work.endpoint.current_deployment is not None:
            work.endpoint.current_deployment.state = "retired"
        work.endpoint.current = None
        work.save()
        _sweep(work)
        left = [each for each in work.endpoint.deployments if each.server is not None]
        if left:
            raise UserError(
                f"the endpoint answers no more, but {left[0].backend} does not answer, which still holds the model",
                field="endpoint",
                value=left[0].backend_model,
                mend="undeploy again once it answers",
            )
        return work.endpoint


def set_api_key(endpoint: str, *, settings: Settings | None = None) -> Endpoint:
    """Set the key in TUNELINE_ENDPOINT_KEY, or remove it if that is not set; the running gateway follows at once."""
    key = _key_of_environment()
    with _working_on(endpoint, settings) as work:
        gateway = work.endpoint.gateway
        if key is None and gateway is not None:
            _refuse_open_address(gateway.host, key)
        work.endpoint.api_key_sha256 = key
        work.save()
        return work.endpoint


def load_endpoint(endpoint: str, *, settings: Settings | None = None) -> Endpoint:
    """The endpoint's record. Raises UserError naming the endpoints there are."""
    record = _folder(endpoint, settings) / "endpoint.json"
    if not record.is_file():
        known = ", ".join(_endpoint_names(settings)) or "none yet"
        raise UserError(f"there is no endpoint '{endpoint}'", field="endpoint", expected=f"one of: {known}")
    try:
        return Endpoint.model_validate_json(record.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"the record of the endpoint cannot be read: {error}", file=record) from error


def endpoint_status(endpoint: str, *, settings: Settings | None = None) -> EndpointStatus:
    """The endpoint as it is now. Raises UserError if there is none of that name."""
    record = load_endpoint(endpoint, settings=settings)
    current, gateway = record.current_deployment, record.gateway
    model_up = current is not None and TARGETS[current.target].is_up(current)
    gateway_up = gateway is not None and is_alive(gateway.process)
    state: Literal["up", "gateway down", "model down", "down", "undeployed"]
    if current is None:
        state = "undeployed"
    elif model_up:
        state = "up" if gateway_up else "gateway down"
    else:
        state = "model down" if gateway_up else "down"
    return EndpointStatus(
        name=record.name,
        address=record.address,
        current=record.current,
        state=state,
        api_key_required=record.api_key_sha256 is not None,
        history=[each.model for each in record.deployments if each.switched_at is not None],
    )


def list_endpoints(*, settings: Settings | None = None) -> list[EndpointStatus]:
    """Every endpoint as it is now, by name."""
    return [endpoint_status(name, settings=settings) for name in _endpoint_names(settings)]


def endpoint_log(
    endpoint: str,
    *,
    source: Literal["model", "gateway"] = "model",
    model: str | None = None,
    lines: int = 200,
    settings: Settings | None = None,
) -> str:
    """The last lines of a server's log: of the deployed model named, else of the current, else of the latest one."""
    record = load_endpoint(endpoint, settings=settings)
    if source == "gateway":
        return last_lines(record.gateway.log, lines) if record.gateway is not None else ""
    deployment = record.deployment(model) if model else record.current_deployment
    if model and deployment is None:
        known = ", ".join(each.model for each in record.deployments)
        raise UserError(f"'{model}' was never deployed at '{endpoint}'", field="model", expected=f"one of: {known}")
    if deployment is None and record.deployments:
        deployment = record.deployments[-1]
    return last_lines(deployment.log, lines) if deployment is not None else ""


# --- from a deployment to the switch ------------------------------------------------------------------------


def _bring_up(
    work: EndpointWork,
    deployment: Deployment,
    *,
    start_timeout: float,
    probes: Sequence[Probe] | Sequence[RequestProbe] = (),
    key: str | None = None,
) -> None:
    """Start the deployment's server, verify it, switch to it, then stop the one before."""
    work.save()
    before = work.endpoint.current_deployment
    target = TARGETS[deployment.target]
    try:
        served = target.prepare(work, deployment)
        chats = [probe for probe in probes if isinstance(probe, Probe)]
        requests = [probe for probe in probes if isinstance(probe, RequestProbe)]
        rendered = _start(work, deployment, target, served, chats, start_timeout)
        deployment.notes = list(dict.fromkeys([*deployment.notes, *settings_notes(deployment)]))
        if chats:
            if rendered is not None:
                verify_prompts(chats, rendered)
            known = rendered is not None
            deployment.verification = verify_answers(deployment, chats, start_timeout, tokens_known=known)
        if requests:
            deployment.verification = verify_requests(deployment, requests, start_timeout)
        start_gateway(work)
        _switch(work, deployment, key)
    except BaseException as error:
        _give_up(work, deployment, error)
        raise
    finally:
        let_go(work)
    if before is not None and before.model != deployment.model:
        _retire(work, before)


def _start(
    work: EndpointWork,
    deployment: Deployment,
    target: TargetFile,
    served: Path,
    probes: Sequence[Probe],
    timeout: float,
) -> list[list[int]] | None:
    """Have the model served; returns the token ids made of each probe, None if there are none to be had."""
    if not probes or target.PROMPTS_NEED_SERVER:
        target.start(work, deployment, served, timeout)
        return target.prompt_tokens(deployment, served, probes, timeout) if probes else None
    with ThreadPoolExecutor(1) as pool:
        rendered = pool.submit(target.prompt_tokens, deployment, served, probes, timeout)
        target.start(work, deployment, served, timeout)
        return rendered.result()


def _switch(work: EndpointWork, deployment: Deployment, key: str | None) -> None:
    """The moment of the switch is the replacement of the record in `save`."""
    before = work.endpoint.current_deployment
    if before is not None:
        before.state = "retired"
    deployment.state = "current"
    deployment.failure = None
    deployment.switched_at = datetime.now(UTC)
    work.endpoint.current = deployment.model
    work.endpoint.api_key_sha256 = key or work.endpoint.api_key_sha256
    work.save()


def _give_up(work: EndpointWork, deployment: Deployment, error: BaseException) -> None:
    """Stop what this operation started; the record says why, and what was current stays so."""
    stop_started(work)
    for uploaded in work.uploaded:
        TARGETS[uploaded.target].stop(uploaded, grace=0)
    record = Endpoint.model_validate_json(work.record.read_text(encoding="utf-8"))
    kept = record.deployment(deployment.model)
    if kept is None:
        raise RuntimeError(f"{work.record} lost the deployment {deployment.model}") from error
    kept.process = None
    kept.server = deployment.server
    kept.failure = str(error) or type(error).__name__
    if kept.switched_at is None:
        _fail(kept)
    if not any(each.switched_at for each in record.deployments):
        record.gateway = None  # an address is promised only once something has answered there
    elif record.gateway is not None and not is_alive(record.gateway.process):
        record.gateway.process = None
    work.endpoint = record
    work.save()


def _retire(work: EndpointWork, deployment: Deployment) -> None:
    TARGETS[deployment.target].stop(deployment, grace=_DRAIN_SECONDS)
    work.save()


def _sweep(work: EndpointWork) -> None:
    """Stop what the record no longer keeps, left by an operation that was killed half-way."""
    endpoint = work.endpoint
    if endpoint.current is None and endpoint.gateway is not None:
        stop_server(endpoint.gateway.process, grace=_DRAIN_SECONDS)
        endpoint.gateway.process = None
        if not any(each.switched_at for each in endpoint.deployments):
            endpoint.gateway = None
    for deployment in endpoint.deployments:
        if deployment.model == endpoint.current:
            continue
        TARGETS[deployment.target].stop(deployment, grace=_DRAIN_SECONDS)
        if deployment.state == "starting":
            _fail(deployment)
            deployment.failure = "the process that deployed it ended before the switch"
    if work.record.is_file():
        work.save()


def _fail(deployment: Deployment) -> None:
    """Never current and never to be: nobody can go back to it, so its copy of the weights goes."""
    deployment.state = "failed"
    discard_gguf(deployment)


def _earlier_deployment(endpoint: Endpoint, to: str | None) -> Deployment:
    been_current = [each for each in endpoint.deployments if each.switched_at is not None]
    if to is not None:
        named = next((each for each in been_current if each.model == to), None)
        if named is None:
            known = ", ".join(each.model for each in been_current) or "none yet"
            raise UserError(
                f"'{to}' was never current at the endpoint '{endpoint.name}'",
                field="to",
                expected=f"one of: {known}",
            )
        return named
    if endpoint.current is None and been_current:
        return max(been_current, key=lambda each: each.switched_at or each.created_at)
    models = [each.model for each in been_current]
    earlier = been_current[: models.index(endpoint.current)] if endpoint.current in models else []
    if not earlier:
        raise UserError(f"the endpoint '{endpoint.name}' has no earlier deployment to go back to")
    return earlier[-1]


# --- what is asked for --------------------------------------------------------------------------------------


def _new_deployment(
    work: EndpointWork,
    model_name: str,
    model_path: str | Path,
    target: Target,
    quantization: Quantization | None,
    python: Path,
    program: Path | None,
    base_path: Path | None,
    device: str,
    dtype: str,
) -> Deployment:
    if target not in get_args(Target):
        raise UserError(
            "there is no such deployment target",
            field="target",
            value=target,
            expected=f"one of: {', '.join(get_args(Target))}",
        )
    if quantization is not None and quantization not in QUANTIZATIONS[target]:
        raise UserError(
            f"the target {target} cannot quantise so",
            field="quantization",
            value=quantization,
            expected=", or one of: ".join(filter(None, ["none", ", ".join(QUANTIZATIONS[target])])),
        )
    path = Path(model_path).expanduser().resolve()
    model = _deployed_name(work, _checked(ModelName, "model_name", model_name), quantization)
    deployment = Deployment(
        model=model,
        model_name=model_name,
        model_path=path,
        target=target,
        quantization=quantization,
        python=python,
        program=program,
        base_path=base_path,
        device=device,
        dtype=dtype,
        log=work.folder / "deployments" / model / "server.log",
        created_at=datetime.now(UTC),
    )
    TARGETS[target].check(deployment)
    return deployment


def _deployed_name(work: EndpointWork, model_name: str, quantization: str | None) -> str:
    """`MODEL_d_xxxx[_QUANT]`, free on this installation."""
    while True:
        name = f"{model_name}_d_{secrets.token_hex(2)}" + (f"_{quantization}" if quantization else "")
        if not any(work.folder.parent.glob(f"*/deployments/{name}")):
            return _checked(ModelName, "model_name", name)


def _checked(kind: Any, field_name: str, value: str) -> str:
    try:
        return str(TypeAdapter(kind).validate_python(value))
    except ValidationError as error:
        expected = (
            "lower-case letters, digits and hyphens, at most 63"
            if kind is EndpointName
            else f"letters, digits, '.', '_' and '-', starting with a letter or digit, at most {MODEL_NAME_BYTES} bytes"
        )
        raise UserError("not a usable name", field=field_name, value=value, expected=expected) from error


def _interpreter(python: str | Path | None) -> Path:
    # Not resolved: the python of a virtual environment is a link, and only by that link it finds its
    # packages.
    path = Path(python or sys.executable).expanduser().absolute()
    if not os.access(path, os.X_OK):
        raise UserError("there is no Python interpreter to serve the model with", field="python", value=str(path))
    return path


def _key_of_environment() -> str | None:
    """The sha256 of the API key in the environment, or None."""
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    if not key:
        return None
    if len(key) < _SHORTEST_KEY:
        raise UserError(
            "the API key is too short to protect anything",
            field=API_KEY_VARIABLE,
            expected=f"at least {_SHORTEST_KEY} characters",
            mend="make one with: openssl rand -hex 24",
        )
    return hashlib.sha256(key.encode()).hexdigest()


def _set_address(work: EndpointWork, host: str | None, port: int | None, key: str | None) -> None:
    """Choose the endpoint's address, or keep the one it has."""
    gateway = work.endpoint.gateway
    chosen = host or (gateway.host if gateway is not None else "127.0.0.1")
    _refuse_open_address(chosen, key or work.endpoint.api_key_sha256)
    if gateway is None:
        log = work.folder / "gateway.log"
        work.endpoint.gateway = Gateway(host=chosen, port=port or free_gateway_port(work, chosen), log=log)
        return
    if port is not None and port != gateway.port:
        raise UserError(
            "the port of an endpoint is kept for good",
            field="port",
            value=port,
            expected=str(gateway.port),
            mend="leave it out, or deploy to an endpoint of another name",
        )
    if chosen != gateway.host and is_alive(gateway.process):
        raise UserError(
            f"the endpoint already listens on {gateway.host}",
            field="host",
            value=chosen,
            mend="undeploy it first, then deploy with the new host",
        )
    gateway.host = chosen


def _refuse_open_address(host: str, key: str | None) -> None:
    if host not in LOOPBACK_HOSTS and key is None:
        raise UserError(
            "an endpoint that other hosts can reach needs an API key",
            field="host",
            value=host,
            expected=f"a key in the environment variable {API_KEY_VARIABLE}, or the host 127.0.0.1",
            mend=f"export {API_KEY_VARIABLE}=$(openssl rand -hex 24)",
        )


# --- the record ---------------------------------------------------------------------------------------------


def _folder(endpoint: str, settings: Settings | None) -> Path:
    return (settings or load_settings()).endpoints / _checked(EndpointName, "endpoint", endpoint)


def _endpoint_names(settings: Settings | None) -> list[str]:
    root = (settings or load_settings()).endpoints
    return sorted(path.parent.name for path in root.glob("*/endpoint.json"))


@contextmanager
def _working_on(name: str, settings: Settings | None, *, create: bool = False) -> Iterator[EndpointWork]:
    """Hold the endpoint's lock, with its record read and the leftovers of killed operations swept."""
    folder = _folder(name, settings)
    if not create:
        load_endpoint(name, settings=settings)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        _lock(stack.enter_context((folder / "lock").open("a")), name)
        exists = (folder / "endpoint.json").is_file()
        work = EndpointWork(folder, load_endpoint(name, settings=settings) if exists else Endpoint(name=name))
        _sweep(work)
        yield work


def _lock(file: IO[str], name: str) -> None:
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"another operation on the endpoint '{name}' has been under way for {_LOCK_TIMEOUT:g} s",
                    mend="wait for it, or end the process that does it",
                ) from error
            time.sleep(0.2)
