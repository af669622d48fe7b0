"""The target `llama.cpp`: its server on this host, for complete models as GGUF files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from configs.endpoints import Deployment, Probe
from tasks.gguf_files import make_gguf
from tasks.http_backends import post_json, posted_tokens
from tasks.llama_cpp import installed, needed
from tasks.model_folders import check_model_folder, complete_model_only
from tasks.model_server import EndpointWork, guarded, is_alive, server_environment, start_model_server, stop_server
from tasks.tool_messages import sent

PROMPTS_NEED_SERVER = True


def ready() -> str | None:
    """Why this host cannot serve so; None: it can."""
    return None if installed() is not None else "not built; `tuneline targets install llama.cpp` does it, in minutes"


def check(deployment: Deployment) -> None:
    """Refuse what cannot be served, before anything is started. Raises UserError."""
    check_model_folder(deployment.model_path)
    complete_model_only(deployment.model_path, "llama.cpp")
    needed()


def prepare(work: EndpointWork, deployment: Deployment) -> Path:
    """Make the GGUF file, quantised as asked. Raises UserError."""
    file, deployment.notes = make_gguf(work, deployment, needed(), deployment.quantization)
    return file


def start(work: EndpointWork, deployment: Deployment, served: Path, timeout: float) -> None:
    """Start the server and wait until it is healthy. Raises UserError."""
    start_model_server(
        work, deployment, lambda: guarded(work, command(deployment, served)), environment(), served.parent, timeout
    )


def prompt_tokens(deployment: Deployment, served: Path, probes: Sequence[Probe], timeout: float) -> list[list[int]]:
    """Token ids that the server makes of each probe, with the chat template inside of the GGUF file.

    In two steps, as its chat route does it: the text, then its tokens with special ones recognised.
    """
    rendered = []
    for probe in probes:
        text = post_json(deployment, "/apply-template", sent(probe.messages, probe.tools), timeout)["prompt"]
        asked = {"content": text, "add_special": True, "parse_special": True}
        rendered.append(posted_tokens(deployment, "/tokenize", asked, timeout))
    return rendered


def is_up(deployment: Deployment) -> bool:
    """Whether the server runs."""
    return is_alive(deployment.process)


def stop(deployment: Deployment, grace: float) -> None:
    """End the server; requests under way get `grace` seconds."""
    stop_server(deployment.process, grace=grace)
    deployment.process = None


def command(deployment: Deployment, served: Path) -> list[str]:
    """The command line of the server: no page and no route that tells of others' requests."""
    words = [str(needed().server), "--model", str(served), "--alias", deployment.model, "--jinja", "--offline"]
    words += ["--host", "127.0.0.1", "--port", str(deployment.port), "--no-ui", "--no-slots"]
    return words + (["--device", "none"] if deployment.device == "cpu" else [])


def environment() -> dict[str, str]:
    """Environment of the server. What LLAMA_ARG_… variables say of other servers must not change this one."""
    for_others = [name for name in os.environ if name.startswith(("LLAMA_ARG_", "LLAMA_API_KEY"))]
    return {name: value for name, value in server_environment().items() if name not in for_others}
