"""Endpoints: deploy a model at a stable address, verify it before the switch, roll back, undeploy, status,
logs.

Every operation holds the endpoint's lock. The record (`endpoint.json`) is replaced atomically, and replacing
it *is* the switch: the gateway reads it, and a server whose starter dies stays only if the record names it as
current.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, get_args

import psutil
from pydantic import TypeAdapter, ValidationError

from configs.endpoints import (
    API_KEY_VARIABLE,
    LOOPBACK_HOSTS,
    Deployment,
    Endpoint,
    EndpointName,
    EndpointStatus,
    Gateway,
    ModelName,
    Probe,
    ProcessReference,
    Quantization,
    Target,
    Verification,
)
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings, load_settings

_TOOLKIT = PROJECT_ROOT / "methods" / "toolkit"
_GATEWAY_PORTS = range(8100, 9000)
_LOCK_TIMEOUT = 600.0
_SHORTEST_KEY = 16
_PORT_ATTEMPTS = 3
_DRAIN_SECONDS = 30.0  # what requests under way get to finish when their server is stopped
_TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
# What `transformers` cannot put into a model it serves: these are prompts in front of the input, not layers.
_PROMPT_ADAPTERS = frozenset(
    {"ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}
)


@dataclass
class _Work:
    """One operation under the endpoint's lock: its folder, its record, and the servers it started itself."""

    folder: Path
    endpoint: Endpoint
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def record(self) -> Path:
        return self.folder / "endpoint.json"

    def save(self) -> None:
        _write_atomically(self.record, self.endpoint.model_dump_json(indent=2))


# --- verbs --------------------------------------------------------------------------------------------------


def deploy(
    endpoint: str,
    model_name: str,
    model_path: str | Path,
    *,
    probes: Sequence[Probe],
    target: Target = "transformers",
    quantization: Quantization | None = None,
    settings: Settings | None = None,
    python: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    host: str | None = None,
    port: int | None = None,
    start_timeout: float = 900.0,
) -> Endpoint:
    """Serve a model at the endpoint, switching to it only once it is proved to be the model that was trained.

    `model_path` is a self-contained Hugging Face folder, or an adapter folder whose base is a folder on this
    host. Each probe's prompt tokens are compared with what the server renders, and its answer with the
    server's greedy answer (not after quantising here, which changes answers). `host` and `port` are those of
    the endpoint's address; an API key is taken from the environment variable TUNELINE_ENDPOINT_KEY, so that
    it is stored nowhere in clear. `start_timeout` is in seconds. Raises UserError; the deployment that was
    current then stays up and current.
    """
    if not probes:
        raise UserError("a deployment needs at least one probe to be verified with", field="probes")
    key = _key_of_environment()
    with _working_on(endpoint, settings, create=True) as work:
        _set_address(work, host, port, key)
        deployment = _new_deployment(
            work, model_name, model_path, target, quantization, _interpreter(python), device, dtype
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
        return work.endpoint


def set_api_key(endpoint: str, *, settings: Settings | None = None) -> Endpoint:
    """Set the key in TUNELINE_ENDPOINT_KEY, or remove it if that is not set; the running gateway follows at
    once."""
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
    model_up = current is not None and _alive(current.process)
    gateway_up = gateway is not None and _alive(gateway.process)
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
    """The last lines of a server's log: of the deployed model named, else of the current, else of the latest
    one."""
    record = load_endpoint(endpoint, settings=settings)
    if source == "gateway":
        return _tail(record.gateway.log, lines) if record.gateway is not None else ""
    deployment = record.deployment(model) if model else record.current_deployment
    if model and deployment is None:
        known = ", ".join(each.model for each in record.deployments)
        raise UserError(f"'{model}' was never deployed at '{endpoint}'", field="model", expected=f"one of: {known}")
    if deployment is None and record.deployments:
        deployment = record.deployments[-1]
    return _tail(deployment.log, lines) if deployment is not None else ""


# --- from a deployment to the switch ------------------------------------------------------------------------


def _bring_up(
    work: _Work,
    deployment: Deployment,
    *,
    start_timeout: float,
    probes: Sequence[Probe] = (),
    key: str | None = None,
) -> None:
    """Start the deployment's server, verify it, switch to it, then stop the one before."""
    work.save()
    before = work.endpoint.current_deployment
    try:
        with ThreadPoolExecutor(1) as pool:
            model_folder = _serving_folder(work, deployment)
            rendered = pool.submit(_rendered_prompts, deployment, model_folder, probes, start_timeout)
            _start_backend(work, deployment, model_folder, start_timeout)
            if probes:
                _verify_prompts(probes, rendered.result())
                deployment.verification = _verify_answers(deployment, probes, start_timeout)
        _ensure_gateway(work)
        _switch(work, deployment, key)
    except BaseException as error:
        _give_up(work, deployment, error)
        raise
    finally:
        _let_go(work)
    if before is not None and before.model != deployment.model:
        _retire(work, before)


def _switch(work: _Work, deployment: Deployment, key: str | None) -> None:
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


def _give_up(work: _Work, deployment: Deployment, error: BaseException) -> None:
    """Stop what this operation started; the record says why, and what was current stays so."""
    for process in work.started:
        _stop(_reference(process.pid), grace=5)
    record = Endpoint.model_validate_json(work.record.read_text(encoding="utf-8"))
    kept = record.deployment(deployment.model)
    if kept is None:
        raise RuntimeError(f"{work.record} lost the deployment {deployment.model}") from error
    kept.process = None
    kept.failure = str(error) or type(error).__name__
    kept.state = "failed" if kept.switched_at is None else kept.state
    if not any(each.switched_at for each in record.deployments):
        record.gateway = None  # an address is promised only once something has answered there
    elif record.gateway is not None and not _alive(record.gateway.process):
        record.gateway.process = None
    work.endpoint = record
    work.save()


def _let_go(work: _Work) -> None:
    """Close the pipes that tie servers to this process: from here on they live or die by the record."""
    for process in work.started:
        if process.stdin is not None:
            process.stdin.close()
    work.started.clear()


def _retire(work: _Work, deployment: Deployment) -> None:
    _stop(deployment.process, grace=_DRAIN_SECONDS)
    deployment.process = None
    work.save()


def _sweep(work: _Work) -> None:
    """Stop servers that the record no longer keeps, left by an operation that was killed half-way."""
    endpoint = work.endpoint
    if endpoint.current is None and endpoint.gateway is not None:
        _stop(endpoint.gateway.process, grace=_DRAIN_SECONDS)
        endpoint.gateway.process = None
        if not any(each.switched_at for each in endpoint.deployments):
            endpoint.gateway = None
    for deployment in endpoint.deployments:
        if deployment.model == endpoint.current:
            continue
        _stop(deployment.process, grace=_DRAIN_SECONDS)
        deployment.process = None
        if deployment.state == "starting":
            deployment.state = "failed"
            deployment.failure = "the process that deployed it ended before the switch"
    if work.record.is_file():
        work.save()


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
    work: _Work,
    model_name: str,
    model_path: str | Path,
    target: Target,
    quantization: Quantization | None,
    python: Path,
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
    if quantization is not None and quantization not in get_args(Quantization):
        raise UserError(
            "this target cannot quantise so",
            field="quantization",
            value=quantization,
            expected=f"none, or one of: {', '.join(get_args(Quantization))}",
        )
    path = Path(model_path).expanduser().resolve()
    _check_model_folder(path)
    model = _deployed_name(work, _checked(ModelName, "model_name", model_name), quantization)
    return Deployment(
        model=model,
        model_name=model_name,
        model_path=path,
        target=target,
        quantization=quantization,
        python=python,
        device=device,
        dtype=dtype,
        log=work.folder / "deployments" / model / "server.log",
        created_at=datetime.now(UTC),
    )


def _deployed_name(work: _Work, model_name: str, quantization: str | None) -> str:
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
            else "letters, digits, '.', '_' and '-', starting with a letter or digit, at most 200"
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


def _set_address(work: _Work, host: str | None, port: int | None, key: str | None) -> None:
    """Choose the endpoint's address, or keep the one it has."""
    gateway = work.endpoint.gateway
    chosen = host or (gateway.host if gateway is not None else "127.0.0.1")
    _refuse_open_address(chosen, key or work.endpoint.api_key_sha256)
    if gateway is None:
        log = work.folder / "gateway.log"
        work.endpoint.gateway = Gateway(host=chosen, port=port or _gateway_port(work, chosen, _GATEWAY_PORTS), log=log)
        return
    if port is not None and port != gateway.port:
        raise UserError(
            "the port of an endpoint is kept for good",
            field="port",
            value=port,
            expected=str(gateway.port),
            mend="leave it out, or deploy to an endpoint of another name",
        )
    if chosen != gateway.host and _alive(gateway.process):
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


def _check_model_folder(path: Path) -> None:
    if not path.is_dir():
        raise UserError("there is no model folder here", file=path, mend="name the folder that holds config.json")
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise UserError(
            "this folder holds no model",
            file=path,
            expected="config.json (self-contained model) or adapter_config.json (adapter on a base model)",
        )
    if _is_adapter(path):
        _base_of_adapter(path)


def _is_adapter(path: Path) -> bool:
    # With a config.json of its own the folder is a model, and transformers adds an embedded adapter by
    # itself.
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _base_of_adapter(path: Path) -> Path:
    """Folder of the base model that the adapter is for."""
    file = path / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, named = str(config.get("peft_type")), str(config.get("base_model_name_or_path") or "")
    except (ValueError, AttributeError) as error:
        raise UserError("the adapter's configuration is not a JSON object", file=file) from error
    if kind in _PROMPT_ADAPTERS:
        raise UserError(
            "an adapter of this kind cannot be served by the target 'transformers'",
            file=file,
            field="peft_type",
            value=kind,
            expected="an adapter of layers, such as LORA or IA3",
        )
    base = (path / Path(named).expanduser()).resolve()
    if not named or not (base / "config.json").is_file():
        raise UserError(
            "the base model of this adapter is not on this host",
            file=file,
            field="base_model_name_or_path",
            value=named,
            expected="the folder of a complete model, with config.json",
            mend="write the base model's folder there, or merge the adapter and deploy the complete model",
        )
    return base


# --- servers ------------------------------------------------------------------------------------------------


def _serving_folder(work: _Work, deployment: Deployment) -> Path:
    """Make `serve/MODEL` out of links, so that the model's id is its name and no path leaks.

    An adapter alone cannot be served: `transformers serve` asks the folder for config.json. It gets the base
    model's files with the adapter's laid over them, which transformers loads as a model with an embedded
    adapter.
    """
    _check_model_folder(deployment.model_path)
    root = work.folder / "deployments" / deployment.model
    (root / "hf" / "hub").mkdir(parents=True, exist_ok=True)
    serve = root / "serve"
    serve.mkdir(exist_ok=True)
    view = serve / deployment.model
    if _is_adapter(deployment.model_path):
        _link_adapter_over_base(deployment.model_path, view)
    elif not view.is_symlink():
        view.symlink_to(deployment.model_path, target_is_directory=True)
    return view


def _link_adapter_over_base(adapter: Path, view: Path) -> None:
    base = _base_of_adapter(adapter)
    view.mkdir(exist_ok=True)
    for old in view.iterdir():
        old.unlink()
    files = {file.name: file for file in base.iterdir() if file.is_file()}
    if (adapter / "tokenizer_config.json").is_file():
        # All of one tokenizer or all of the other: a chat template left over from the base would win in
        # silence.
        files = {name: file for name, file in files.items() if name not in _TOKENIZER_FILES}
    files |= {file.name: file for file in adapter.iterdir() if file.is_file()}
    for name, file in files.items():
        (view / name).symlink_to(file)


def _serving_environment(model_folder: Path) -> dict[str, str]:
    """Environment of the serving interpreter: offline, a hub cache of its own, no secret, nothing of our own
    paths."""
    hidden = {API_KEY_VARIABLE, "PYTHONPATH", "PYTHONHOME"}
    cache = model_folder.parent.parent / "hf"
    return {name: value for name, value in os.environ.items() if name not in hidden} | {
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "PYTHONSAFEPATH": "1",  # or the modules beside the program would shadow installed ones
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _start_backend(work: _Work, deployment: Deployment, model_folder: Path, start_timeout: float) -> None:
    """Start the model's server and wait until it is healthy, unless it already runs."""
    if deployment.model == work.endpoint.current and _alive(deployment.process):
        return
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        deployment.port = _free_port()
        offset = deployment.log.stat().st_size if deployment.log.exists() else 0
        process = _spawn(
            work,
            _backend_command(work, deployment),
            deployment.log,
            model_folder.parent,
            _serving_environment(model_folder),
        )
        deployment.process = _reference(process.pid)
        work.save()
        if _wait_until_listening(process, deployment.port, start_timeout, health=True):
            return
        said = _tail(deployment.log, 30, offset)
        _stop(deployment.process, grace=5)
        if "address already in use" not in said.lower() or attempt == _PORT_ATTEMPTS:
            ended = f"ended with exit code {process.poll()}" if process.poll() is not None else "was stopped"
            raise UserError(
                f"the server of '{deployment.model}' was not healthy within {start_timeout:g} s; it {ended}. "
                f"The end of its log:\n{said}",
                file=deployment.log,
            )


def _backend_command(work: _Work, deployment: Deployment) -> list[str]:
    command = [str(deployment.python), str(_TOOLKIT / "serve_model.py"), str(work.record), deployment.model]
    command += ["--host", "127.0.0.1", "--port", str(deployment.port)]
    command += ["--device", deployment.device, "--dtype", deployment.dtype]
    return command + (["--quantization", deployment.quantization] if deployment.quantization else [])


def _ensure_gateway(work: _Work) -> None:
    """Start the endpoint's gateway unless it runs. Its port may still move while nobody has been told of
    it."""
    gateway = work.endpoint.gateway
    if gateway is None:
        raise RuntimeError(f"{work.record}: the address was not chosen")
    if _alive(gateway.process):
        return
    new = not any(each.switched_at for each in work.endpoint.deployments)
    environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        work.save()
        offset = gateway.log.stat().st_size if gateway.log.exists() else 0
        command = [sys.executable, "-m", "tasks.gateway", str(work.record)]
        process = _spawn(work, command, gateway.log, PROJECT_ROOT, environment)
        gateway.process = _reference(process.pid)
        if _wait_until_listening(process, gateway.port, 60.0):
            return
        _stop(gateway.process, grace=5)
        gateway.process = None
        said = _tail(gateway.log, 30, offset)
        if not new or "address already in use" not in said.lower() or attempt == _PORT_ATTEMPTS:
            raise UserError(
                f"the gateway of the endpoint '{work.endpoint.name}' could not listen on "
                f"{gateway.host}:{gateway.port}. The end of its log:\n{said}",
                file=gateway.log,
                mend="end whatever else listens on that port",
            )
        gateway.port = _gateway_port(work, gateway.host, range(gateway.port + 1, _GATEWAY_PORTS.stop))


def _spawn(
    work: _Work, command: list[str], log: Path, folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a server detached, in a process group of its own, tied to this process only by its standard
    input."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    work.started.append(process)
    return process


def _wait_until_listening(process: subprocess.Popen[bytes], port: int, timeout: float, *, health: bool = False) -> bool:
    """Whether this very process came to listen on the port (and answers `/health`) before it ended or time
    was up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if _listens(process.pid, port) and (not health or _healthy(port)):
            return True
        time.sleep(0.1)
    return False


def _listens(pid: int, port: int) -> bool:
    # By the process, not by connecting: on a port taken in the meantime, somebody else would answer.
    with suppress(psutil.NoSuchProcess):
        connections = psutil.Process(pid).net_connections("tcp")
        return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections)
    return False


def _healthy(port: int) -> bool:
    import httpx

    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=10, trust_env=False).is_success
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _gateway_port(work: _Work, host: str, ports: range) -> int:
    """The first port that is free now and promised to no other endpoint.

    Not one the system hands out by itself: while the endpoint is down, any outgoing connection might be given
    it.
    """
    records = [path for path in work.folder.parent.glob("*/endpoint.json") if path != work.record]
    others = [Endpoint.model_validate_json(path.read_text(encoding="utf-8")).gateway for path in records]
    promised = {gateway.port for gateway in others if gateway is not None}
    for port in ports:
        if port not in promised and _can_bind(host, port):
            return port
    raise UserError(
        f"no port from {ports.start} to {ports.stop - 1} is free on {host}", field="port", mend="name a port"
    )


def _can_bind(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError("this host cannot be listened on", field="host", value=host) from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
        return True


# --- verification -------------------------------------------------------------------------------------------


def _rendered_prompts(
    deployment: Deployment, model_folder: Path, probes: Sequence[Probe], timeout: float
) -> list[list[int]]:
    """Token ids that the served folder's chat template makes of each probe, by the interpreter that
    serves."""
    if not probes:
        return []
    deployment.log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, deployment.log.open("ab") as log:
        asked, answered = Path(scratch, "messages.json"), Path(scratch, "rendered.json")
        asked.write_text(json.dumps([probe.messages for probe in probes]), encoding="utf-8")
        program = _TOOLKIT / "render_prompts.py"
        try:
            subprocess.run(
                [str(deployment.python), str(program), str(model_folder), str(asked), str(answered)],
                env=_serving_environment(model_folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=True,
            )
        except subprocess.SubprocessError as error:
            said = _tail(deployment.log, 30)
            raise UserError(
                f"the prompts could not be rendered with the model's chat template. End of the log:\n{said}",
                file=deployment.log,
            ) from error
        return [[int(each) for each in ids] for ids in json.loads(answered.read_text(encoding="utf-8"))]


def _verify_prompts(probes: Sequence[Probe], rendered: list[list[int]]) -> None:
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


def _verify_answers(deployment: Deployment, probes: Sequence[Probe], timeout: float) -> Verification:
    """Ask the running server every probe: number of prompt tokens, and the greedy answer where it is
    known."""
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
        said = _tail(deployment.log, 30)
        raise UserError(
            f"the server of '{deployment.model}' did not answer a chat completion: {error!r}. "
            f"The end of its log:\n{said}",
            file=deployment.log,
        ) from error


# --- processes ----------------------------------------------------------------------------------------------


def _reference(pid: int) -> ProcessReference | None:
    with suppress(psutil.NoSuchProcess):
        return ProcessReference(pid=pid, started=psutil.Process(pid).create_time())
    return None


def _process(reference: ProcessReference | None) -> psutil.Process | None:
    """The process itself, or None if it ended (its pid may be somebody else's by now)."""
    if reference is None:
        return None
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(reference.pid)
        # The start is computed from the boot time, which shifts a little when the clock is set.
        same = abs(process.create_time() - reference.started) < 2
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    return None


def _alive(reference: ProcessReference | None) -> bool:
    return _process(reference) is not None


def _stop(reference: ProcessReference | None, *, grace: float) -> None:
    """End a server's whole group: SIGTERM, `grace` seconds to finish requests, SIGKILL."""
    leader = _process(reference)
    if leader is None:
        return
    tree = [leader]
    with suppress(psutil.NoSuchProcess):
        tree += leader.children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(tree, timeout=grace)
    if left:
        with suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)


# --- files --------------------------------------------------------------------------------------------------


def _folder(endpoint: str, settings: Settings | None) -> Path:
    return (settings or load_settings()).endpoints / _checked(EndpointName, "endpoint", endpoint)


def _endpoint_names(settings: Settings | None) -> list[str]:
    root = (settings or load_settings()).endpoints
    return sorted(path.parent.name for path in root.glob("*/endpoint.json"))


@contextmanager
def _working_on(name: str, settings: Settings | None, *, create: bool = False) -> Iterator[_Work]:
    """Hold the endpoint's lock, with its record read and the leftovers of killed operations swept."""
    folder = _folder(name, settings)
    if not create:
        load_endpoint(name, settings=settings)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        _lock(stack.enter_context((folder / "lock").open("a")), name)
        exists = (folder / "endpoint.json").is_file()
        work = _Work(folder, load_endpoint(name, settings=settings) if exists else Endpoint(name=name))
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


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _tail(log: Path, lines: int, offset: int = 0) -> str:
    """The last lines of a log, read from `offset` bytes on and at most 1 MB of it."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(offset, log.stat().st_size - 1_000_000))
        text = file.read().decode("utf-8", errors="replace")
    return "\n".join(text.splitlines()[-lines:]) if lines > 0 else ""
