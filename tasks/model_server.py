"""The processes behind an endpoint: the server of a model and the gateway, from the folder served to their end.

The server of a model is `transformers serve`; the gateway (`tasks.gateway`) keeps the endpoint's address.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from configs.endpoints import API_KEY_VARIABLE, Deployment, Endpoint, ProcessReference
from configs.errors import UserError
from configs.settings import PROJECT_ROOT
from tasks.files import last_lines, write_record
from tasks.processes import find_process, process_start, with_descendants

TOOLKIT = PROJECT_ROOT / "methods" / "toolkit"
"""Folder of the programs that the serving interpreter runs."""

_GATEWAY_PORTS = range(8100, 9000)
_PORT_ATTEMPTS = 3
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
class EndpointWork:
    """One operation under the endpoint's lock: its folder, its record, and the servers it started itself."""

    folder: Path
    endpoint: Endpoint
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def record(self) -> Path:
        """The file of the record."""
        return self.folder / "endpoint.json"

    def save(self) -> None:
        """Replace the record on disk, which is what switches the endpoint."""
        write_record(self.record, self.endpoint, private=True)


# --- the folder it serves from ------------------------------------------------------------------------------


def serving_folder(work: EndpointWork, deployment: Deployment) -> Path:
    """Make `serve/MODEL` out of links, so that the model's id is its name and no path leaks.

    An adapter alone cannot be served: `transformers serve` asks the folder for config.json. It gets the base
    model's files with the adapter's laid over them, which transformers loads as a model with an embedded
    adapter. Raises UserError if the model cannot be served.
    """
    check_model_folder(deployment.model_path)
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


def check_model_folder(path: Path) -> None:
    """Refuse a folder that cannot be served: no model, or an adapter without its base. Raises UserError."""
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
    # With a config.json of its own the folder is a model, and transformers adds an embedded adapter by itself.
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


# --- the server of a model ----------------------------------------------------------------------------------


def start_model_server(work: EndpointWork, deployment: Deployment, model_folder: Path, start_timeout: float) -> None:
    """Start the model's server and wait until it is healthy, unless it already runs.

    `start_timeout` is in seconds. Raises UserError with the end of the server's log.
    """
    if deployment.model == work.endpoint.current and is_alive(deployment.process):
        return
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        deployment.port = _free_port()
        offset = deployment.log.stat().st_size if deployment.log.exists() else 0
        process = _spawn(
            work,
            _backend_command(work, deployment),
            deployment.log,
            model_folder.parent,
            serving_environment(model_folder),
        )
        deployment.process = _reference(process.pid)
        work.save()
        if _wait_until_listening(process, deployment.port, start_timeout, health=True):
            return
        said = last_lines(deployment.log, 30, offset)
        code = process.poll()  # asked before it is stopped, which leaves nothing to ask
        stop_server(deployment.process, grace=5)
        if "address already in use" not in said.lower() or attempt == _PORT_ATTEMPTS:
            ended = "was stopped" if code is None else f"ended with exit code {code}"
            raise UserError(
                f"the server of '{deployment.model}' was not healthy within {start_timeout:g} s; it {ended}. "
                f"The end of its log:\n{said}",
                file=deployment.log,
            )


def _backend_command(work: EndpointWork, deployment: Deployment) -> list[str]:
    command = [str(deployment.python), str(TOOLKIT / "serve_model.py"), str(work.record), deployment.model]
    command += ["--host", "127.0.0.1", "--port", str(deployment.port)]
    command += ["--device", deployment.device, "--dtype", deployment.dtype]
    return command + (["--quantization", deployment.quantization] if deployment.quantization else [])


def serving_environment(model_folder: Path) -> dict[str, str]:
    """Environment of the serving interpreter: offline, a hub cache of its own, no key, nothing of our own paths."""
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


# --- the gateway --------------------------------------------------------------------------------------------


def start_gateway(work: EndpointWork) -> None:
    """Start the endpoint's gateway unless it runs. Raises UserError with the end of its log.

    Its port may still move while nobody has been told of it.
    """
    gateway = work.endpoint.gateway
    if gateway is None:
        raise RuntimeError(f"{work.record}: the address was not chosen")
    if is_alive(gateway.process):
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
        stop_server(gateway.process, grace=5)
        gateway.process = None
        said = last_lines(gateway.log, 30, offset)
        if not new or "address already in use" not in said.lower() or attempt == _PORT_ATTEMPTS:
            raise UserError(
                f"the gateway of the endpoint '{work.endpoint.name}' could not listen on "
                f"{gateway.host}:{gateway.port}. The end of its log:\n{said}",
                file=gateway.log,
                mend="end whatever else listens on that port",
            )
        gateway.port = free_gateway_port(work, gateway.host, first=gateway.port + 1)


# --- starting and waiting -----------------------------------------------------------------------------------


def _spawn(
    work: EndpointWork, command: list[str], log: Path, folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a server detached, in a process group of its own, tied to this process only by its standard input."""
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
    """Whether this very process came to listen on the port (and answers `/health`) before it ended or time was up."""
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


# --- ending -------------------------------------------------------------------------------------------------


def let_go(work: EndpointWork) -> None:
    """Close the pipes that tie servers to this process: from here on they live or die by the record."""
    for process in work.started:
        if process.stdin is not None:
            process.stdin.close()
    work.started.clear()


def stop_started(work: EndpointWork) -> None:
    """End what this operation has started itself, at once."""
    for process in work.started:
        stop_server(_reference(process.pid), grace=5)


def stop_server(reference: ProcessReference | None, *, grace: float) -> None:
    """End a server's whole group: SIGTERM, `grace` seconds to finish requests, SIGKILL."""
    leader = _process(reference)
    if leader is None:
        return
    tree = with_descendants([leader])
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


# --- process identity ---------------------------------------------------------------------------------------------


def _reference(pid: int) -> ProcessReference | None:
    with suppress(psutil.NoSuchProcess):
        return ProcessReference(pid=pid, started=process_start(psutil.Process(pid)))
    return None


def is_alive(reference: ProcessReference | None) -> bool:
    """Whether the recorded process runs; false if its id belongs to another process by now."""
    return _process(reference) is not None


def _process(reference: ProcessReference | None) -> psutil.Process | None:
    return find_process(reference.pid, reference.started) if reference is not None else None


# --- ports --------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_gateway_port(work: EndpointWork, host: str, *, first: int = _GATEWAY_PORTS.start) -> int:
    """The first port from `first` on that is free now and promised to no other endpoint. Raises UserError.

    Not one the system hands out by itself: while the endpoint is down, any outgoing connection might be given it.
    """
    ports = range(first, _GATEWAY_PORTS.stop)
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
