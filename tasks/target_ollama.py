"""The target `ollama`: an Ollama server (OLLAMA_HOST, by default on this host) gets the model as a GGUF file.

The file is uploaded under its digest, the model created with template, system message, parameters and quantisation,
and deleted when it is no longer served. Written against Ollama's documented HTTP interface; we have had no Ollama to
run it on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configs.endpoints import Deployment, Probe
from configs.errors import UserError
from tasks.files import last_lines
from tasks.gguf_files import make_gguf
from tasks.go_templates import CONVERSATIONS, Pieces, derive, verify, without_bos
from tasks.llama_cpp import installed, needed
from tasks.model_folders import check_model_folder, complete_model_only, read_json
from tasks.model_server import TOOLKIT, EndpointWork, server_environment

PROMPTS_NEED_SERVER = True
HOST_VARIABLE = "OLLAMA_HOST"
_PORT = 11434
_LONGEST_CONTEXT = 8192  # Ollama's own default cuts prompts at 4096 tokens in silence; more costs memory
# The names that Ollama takes for a model.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


def ready() -> str | None:
    """Why this host cannot serve so; None: it can."""
    if installed() is None:
        return "llama.cpp's converter is not there; `tuneline targets install llama.cpp` brings it"
    try:
        _request("GET", f"{server_address()}/api/version", timeout=2)
    except UserError as error:
        return f"{error.problem}; {HOST_VARIABLE} says where it is"
    return None


def check(deployment: Deployment) -> None:
    """Refuse what cannot be served, before anything is started. Raises UserError."""
    check_model_folder(deployment.model_path)
    complete_model_only(deployment.model_path, "ollama")
    needed()
    _request("GET", f"{server_address()}/api/version", timeout=10)


def prepare(work: EndpointWork, deployment: Deployment) -> Path:
    """Make the GGUF file as the weights are: Ollama quantises it. Raises UserError."""
    # Older versions of Ollama quantise float16 and float32 only.
    file, _ = make_gguf(work, deployment, needed(), None, bfloat16=deployment.quantization is None)
    deployment.name_there = None if _NAME.fullmatch(deployment.model) else _plain_name(deployment)
    return file


def start(work: EndpointWork, deployment: Deployment, served: Path, timeout: float) -> None:
    """Upload the file and create the model there, unless it is there. Raises UserError."""
    if deployment.model == work.endpoint.current and is_up(deployment):
        return
    deployment.server = server_address()
    work.uploaded.append(deployment)
    work.save()  # before it is made: whoever comes after a kill knows what to delete
    pieces, stop_words = _template(deployment, served)
    if pieces.before_system is None:
        note = "the model's chat template knows no system message: one in a request is left out"
        deployment.notes = [note]
    digest = _upload(deployment, served, timeout)
    asked: dict[str, Any] = {
        "model": deployment.backend_model,
        "files": {served.name: digest},
        "template": pieces.go(),
        "parameters": {"num_ctx": _context(deployment.model_path), "stop": stop_words},
    }
    asked |= {"system": pieces.system} if pieces.system is not None else {}
    asked |= {"quantize": deployment.quantization} if deployment.quantization is not None else {}
    _create(deployment, asked, timeout)


def prompt_tokens(deployment: Deployment, served: Path, probes: Sequence[Probe], timeout: float) -> None:
    """Ollama tells no tokens: their number, and the answers, are all that is compared."""


def is_up(deployment: Deployment) -> bool:
    """Whether the Ollama server answers and has the model."""
    if deployment.server is None:
        return False
    try:
        _request("POST", f"{deployment.server}/api/show", content={"model": deployment.backend_model}, timeout=5)
    except UserError:
        return False
    return True


def stop(deployment: Deployment, grace: float) -> None:
    """Delete the model there; where nobody answers it stays noted, and the next operation tries again."""
    if deployment.server is None:
        return
    try:
        asked = {"model": deployment.backend_model}
        _request("DELETE", f"{deployment.server}/api/delete", content=asked, timeout=grace + 10, fine=(404,))
        deployment.server = None
    except UserError as error:
        _tell(deployment, f"the model could not be deleted there, the next operation tries again: {error.problem}")


def server_address() -> str:
    """The base URL that OLLAMA_HOST means: a host, a host and port, or an address. Raises UserError."""
    told = os.environ.get(HOST_VARIABLE, "").strip()
    parts = urlsplit(told if "://" in told else f"http://{told or '127.0.0.1'}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError("this is no address", field=HOST_VARIABLE, value=told, expected="HOST:PORT") from error
    if not host or parts.scheme not in ("http", "https") or parts.username or parts.path.strip("/"):
        raise UserError("this is no address", field=HOST_VARIABLE, value=told, expected="HOST:PORT")
    # What a server listens on everywhere with is not where one reaches it.
    host = "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104
    default = {"http": _PORT, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port or default}"


def _plain_name(deployment: Deployment) -> str:
    """A name that Ollama takes, for one of another script or too long: a digest, and the end that tells it apart."""
    digest = hashlib.sha256(deployment.model.encode()).hexdigest()[:12]
    return f"tuneline-{digest}_d_{deployment.model.rpartition('_d_')[2]}"


def _context(model: Path) -> int:
    longest = read_json(model / "config.json").get("max_position_embeddings")
    return min(int(longest), _LONGEST_CONTEXT) if longest else _LONGEST_CONTEXT


def _template(deployment: Deployment, served: Path) -> tuple[Pieces, list[str]]:
    """The model's chat template in pieces, proved on the prompts of training too, and the words that end an answer."""
    probes = deployment.model_path / "probes.json"
    stored = read_json(probes)["probes"] if probes.is_file() else []
    if any("tools" in probe for probe in stored):
        raise UserError(
            "the model was trained with tools, which the template that Tuneline writes for Ollama does not show",
            file=probes,
            field="target",
            value="ollama",
            expected="transformers, vllm or llama.cpp",
        )
    trained = [probe["messages"] for probe in stored]
    rendered = _rendered(deployment, [*CONVERSATIONS, *trained])
    adds_bos = _adds_bos(served)
    pieces = derive(rendered["texts"][: len(CONVERSATIONS)], rendered["bos"], adds_bos)
    for messages, text in zip(trained, rendered["texts"][len(CONVERSATIONS) :], strict=True):
        verify(pieces, messages, without_bos(text, rendered["bos"], adds_bos))
    return pieces, [rendered["eos"]] if rendered["eos"] else []


def _rendered(deployment: Deployment, conversations: list[list[dict[str, str]]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch, deployment.log.open("ab") as log:
        asked, answered = Path(scratch, "messages.json"), Path(scratch, "rendered.json")
        asked.write_text(json.dumps(conversations), encoding="utf-8")
        words = [deployment.python, TOOLKIT / "render_texts.py", deployment.model_path, asked, answered]
        environment = server_environment({"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"})
        try:
            subprocess.run(
                list(map(str, words)),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
                timeout=300,
            )
        except subprocess.SubprocessError as error:
            said = last_lines(deployment.log, 12)
            raise UserError(f"the chat template could not be rendered: {said}", file=deployment.log) from error
        content: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return content


def _adds_bos(file: Path) -> bool:
    """Whether the GGUF file asks its server to put the first token in front of every prompt."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    return bool(field.contents()) if field is not None else False


def _upload(deployment: Deployment, file: Path, timeout: float) -> str:
    """Upload the file unless the server has it; returns its digest."""
    with file.open("rb") as content:
        digest = f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"
    url = f"{deployment.server}/api/blobs/{digest}"
    if _request("HEAD", url, timeout=60, fine=(404,)).status_code == 404:
        _tell(deployment, f"uploading {file.stat().st_size / 1e6:.0f} MB as {digest}")
        _request("POST", url, content=_chunks(file), timeout=timeout)
    return digest


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            yield chunk


def _create(deployment: Deployment, asked: dict[str, Any], timeout: float) -> None:
    """Create the model. Ollama streams its progress, and an error may come in the stream of an answer that began well.

    Raises UserError with what it said.
    """
    answer = _request("POST", f"{deployment.server}/api/create", content=asked, timeout=timeout)
    said = [json.loads(line) for line in answer.text.splitlines() if line.strip()]
    for each in said:
        _tell(deployment, json.dumps(each))
    errors = [str(each["error"]) for each in said if "error" in each]
    if errors or not said or said[-1].get("status") != "success":
        raise UserError(
            "Ollama has the files but could not create the model: " + ("; ".join(errors) or answer.text[-500:]),
            file=deployment.log,
        )


def _tell(deployment: Deployment, line: str) -> None:
    deployment.log.parent.mkdir(parents=True, exist_ok=True)
    with deployment.log.open("a", encoding="utf-8") as log:
        log.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}\n")


def _request(
    method: str, url: str, *, timeout: float, content: dict[str, Any] | Iterator[bytes] | None = None, fine: Any = ()
) -> Any:
    """The answer of the Ollama server. Raises UserError if there is none, or an error that is not `fine`."""
    import httpx

    body = {"json": content} if isinstance(content, dict) else {"content": content}
    try:
        answer = httpx.request(method, url, timeout=timeout, trust_env=False, **body)
    except httpx.HTTPError as error:
        raise UserError(
            f"no Ollama server answers at {url.partition('/api/')[0]} ({error!r})",
            field=HOST_VARIABLE,
            mend=f"start it, or set {HOST_VARIABLE} to its HOST:PORT",
        ) from error
    if answer.is_error and answer.status_code not in fine:
        said = answer.text[:500]
        raise UserError(f"Ollama refused {method} /api/{url.partition('/api/')[2]}: {answer.status_code} {said}")
    return answer
