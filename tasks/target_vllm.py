"""The target `vllm`: `vllm serve` on a host with GPUs, for complete models and LoRA adapters.

Written against vLLM's documentation; we have not run it on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.endpoints import Deployment, Probe
from configs.errors import UserError
from configs.settings import load_settings
from tasks.http_backends import posted_tokens
from tasks.model_folders import base_of_adapter, check_model_folder, is_adapter, read_json
from tasks.model_server import EndpointWork, guarded, is_alive, server_environment, start_model_server, stop_server
from tasks.remote_code import refuse_code
from tasks.tool_messages import sent

PROMPTS_NEED_SERVER = True
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` can be."""

_HIDDEN = (
    "VLLM_API_KEY",  # the gateway keeps the endpoint's key; with one of its own the server would refuse the gateway
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",  # clients could load other adapters
    "VLLM_SERVER_DEV_MODE",
)


def ready() -> str | None:
    """Why this host cannot serve so; None: it can."""
    if _program() is not None:
        return None
    return "no environment with vLLM; TUNELINE_VLLM names its folder (a GPU host: python -m venv ENV; pip install vllm)"


def check(deployment: Deployment) -> None:
    """Refuse what cannot be served, before anything is started. Raises UserError."""
    check_model_folder(deployment.model_path)
    refuse_code(deployment.model_path, "vllm")
    if is_adapter(deployment.model_path):
        refuse_code(base_of_adapter(deployment.model_path), "vllm")
        _check_adapter(deployment.model_path)
    _needed()


def prepare(work: EndpointWork, deployment: Deployment) -> Path:
    """The folder to serve, which is the model's own."""
    (work.folder / "deployments" / deployment.model).mkdir(parents=True, exist_ok=True)
    if _dtype(deployment) != deployment.dtype:
        deployment.notes = ["vLLM adds adapters in 16 bits only: the base model is not held in float32"]
    return deployment.model_path


def start(work: EndpointWork, deployment: Deployment, served: Path, timeout: float) -> None:
    """Start the server and wait until it is healthy. Raises UserError."""
    start_model_server(
        work,
        deployment,
        lambda: guarded(work, command(deployment, served)),
        environment(),
        work.folder / "deployments" / deployment.model,
        timeout,
    )


def prompt_tokens(deployment: Deployment, served: Path, probes: Sequence[Probe], timeout: float) -> list[list[int]]:
    """Token ids that the server makes of each probe; as in its chat route, the template brings all special tokens."""
    return [
        posted_tokens(
            deployment,
            "/tokenize",
            {
                "model": deployment.model,
                **sent(probe.messages, probe.tools),
                "add_generation_prompt": True,
                "add_special_tokens": False,
            },
            timeout,
        )
        for probe in probes
    ]


def is_up(deployment: Deployment) -> bool:
    """Whether the server runs."""
    return is_alive(deployment.process)


def stop(deployment: Deployment, grace: float) -> None:
    """End the server; requests under way get `grace` seconds."""
    stop_server(deployment.process, grace=grace)
    deployment.process = None


def command(deployment: Deployment, served: Path) -> list[str]:
    """The command line of the server. No key in it: argv can be read by everybody on the host."""
    adapter = is_adapter(served)
    base = base_of_adapter(served) if adapter else served
    words = [str(_needed()), "serve", str(base), "--host", "127.0.0.1", "--port", str(deployment.port)]
    words += ["--dtype", _dtype(deployment)]
    # The base under an adapter gets a name of its own: a request can reach it only by mistake.
    words += ["--served-model-name", f"{deployment.model}.base" if adapter else deployment.model]
    if adapter:
        words += ["--enable-lora", "--lora-modules", f"{deployment.model}={served}"]
        words += ["--max-lora-rank", str(_rank_to_allow(served))]
        if (served / "tokenizer_config.json").is_file():
            words += ["--tokenizer", str(served)]
    return words + (["--quantization", deployment.quantization] if deployment.quantization else [])


def environment() -> dict[str, str]:
    """Environment of the server: offline, telling nobody of its use, and no key."""
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return {name: value for name, value in server_environment(own).items() if name not in _HIDDEN}


def _dtype(deployment: Deployment) -> str:
    """The type of the weights; vLLM's kernels for LoRA take 16 bits only, and `auto` makes 16 bits of float32."""
    return "auto" if deployment.dtype == "float32" and is_adapter(deployment.model_path) else deployment.dtype


def _program() -> Path | None:
    folder = load_settings().vllm
    program = folder.expanduser().absolute() / "bin" / "vllm" if folder is not None else None
    return program if program is not None and program.is_file() else None


def _needed() -> Path:
    program = _program()
    if program is None:
        raise UserError(
            "there is no vLLM on this host",
            field="TUNELINE_VLLM",
            value=str(load_settings().vllm or "") or None,
            expected="the folder of an environment that has bin/vllm",
            mend="python -m venv ENV && ENV/bin/pip install vllm, on a host with GPUs; export TUNELINE_VLLM=ENV",
        )
    return program


def _check_adapter(path: Path) -> None:
    """vLLM adds low-rank matrices to the layers it knows, and nothing else that an adapter may hold."""
    config = read_json(path / "adapter_config.json")
    file = path / "adapter_config.json"
    allowed: dict[str, tuple[object, ...]] = {
        "peft_type": ("LORA",),
        "use_dora": (None, False),
        "bias": (None, "none"),
        "modules_to_save": (None, []),
        "target_parameters": (None, []),
    }
    for field, fine in allowed.items():
        if config.get(field) not in fine:
            raise UserError(
                "vLLM cannot serve an adapter of this kind",
                file=file,
                field=field,
                value=config.get(field),
                expected=str(fine[0]),
                mend="`tuneline save` makes a complete model of it, which can be served",
            )
    _rank_to_allow(path)


def _rank_to_allow(path: Path) -> int:
    config = read_json(path / "adapter_config.json")
    rank = max([int(config.get("r") or 8), *map(int, (config.get("rank_pattern") or {}).values())])
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(
        "the adapter's rank is higher than vLLM can serve",
        file=path / "adapter_config.json",
        field="r",
        value=rank,
        expected=f"at most {LORA_RANKS[-1]}",
        mend="`tuneline save` makes a complete model of it",
    )
