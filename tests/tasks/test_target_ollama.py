"""The target `ollama` against a stand-in for its documented HTTP interface (no Ollama can be had here).

The stand-in refuses what Ollama's documentation does not know, checks the digest of what is uploaded, and answers from
the model's own weights.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from configs.endpoints import Probe
from configs.errors import UserError
from configs.settings import Settings
from tasks import endpoints, llama_cpp, target_ollama
from tests.serving.tiny_answers import Answering
from tests.tiny_models import greedy_answer, make_tiny_chat_model, prompt_tokens

pytestmark = pytest.mark.targets  # the GGUF file is made by llama.cpp's converter

QUESTION = [{"role": "user", "content": "switch the light on"}]
_KNOWN = {"model", "files", "template", "system", "parameters", "quantize", "stream", "license", "adapters", "messages"}


class Ollama:
    """What the server holds, and what it was asked."""

    def __init__(self, model: Path) -> None:
        self.answering = Answering(model, model, {})
        self.blobs: set[str] = set()
        self.models: dict[str, dict[str, Any]] = {}
        self.created: list[dict[str, Any]] = []
        self.fails_at_creation = False

    def create(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        assert asked.keys() <= _KNOWN
        assert set(asked["files"].values()) <= self.blobs
        if self.fails_at_creation:
            return [{"status": "reading model metadata"}, {"error": "unsupported architecture"}]
        self.created.append(asked)
        self.models[asked["model"]] = asked
        return [{"status": "reading model metadata"}, {"status": "writing manifest"}, {"status": "success"}]


def serve(ollama: Ollama) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self, code: int, lines: list[dict[str, Any]] | None = None, text: str = "") -> None:
            body = "".join(json.dumps(line) + "\n" for line in lines or []) or text
            self.send_response(code)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body.encode())

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def _handle(self) -> None:
            body = self._body()
            path = self.path
            if path == "/":
                self._reply(200, text="Ollama is running")
            elif path == "/api/version":
                self._reply(200, [{"version": "0.12.0"}])
            elif path.startswith("/api/blobs/"):
                self._blob(path.removeprefix("/api/blobs/"), body)
            else:
                self._json(path, json.loads(body or b"{}"))

        def _blob(self, digest: str, body: bytes) -> None:
            if self.command == "HEAD":
                self._reply(200 if digest in ollama.blobs else 404)
            elif digest != f"sha256:{hashlib.sha256(body).hexdigest()}" or not body.startswith(b"GGUF"):
                self._reply(400, [{"error": "digest mismatch"}])
            else:
                ollama.blobs.add(digest)
                self._reply(201)

        def _json(self, path: str, asked: dict[str, Any]) -> None:
            known = asked.get("model") in ollama.models
            if path == "/api/create":
                self._reply(200, ollama.create(asked))
            elif not known:
                self._reply(404, [{"error": "model not found"}])
            elif (self.command, path) == ("POST", "/api/show"):
                self._reply(200, [{"template": ollama.models[asked["model"]]["template"]}])
            elif (self.command, path) == ("DELETE", "/api/delete"):
                del ollama.models[asked["model"]]
                self._reply(200)
            elif (self.command, path) == ("POST", "/v1/chat/completions"):
                self._reply(*_as_lines(ollama.answering.chat(asked)))
            else:
                self._reply(405)

        do_GET = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _as_lines(reply: tuple[int, dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    return reply[0], [reply[1]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama_cpp.install()
    return make_tiny_chat_model(tmp_path_factory.mktemp("ollama") / "model", seed=1)


@pytest.fixture
def ollama(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ollama]:
    made = Ollama(model)
    server = serve(made)
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
    yield made
    server.shutdown()


def probe_of(model: Path) -> Probe:
    answer = greedy_answer(model, QUESTION, 8)
    return Probe(messages=QUESTION, prompt_token_ids=prompt_tokens(model, QUESTION), answer=answer, max_new_tokens=8)


def test_a_model_is_uploaded_once_created_asked_and_deleted(model: Path, ollama: Ollama, tmp_path: Path) -> None:
    settings, probe = Settings(home=tmp_path / "home"), probe_of(model)
    endpoint = endpoints.deploy("desk", "lights", model, probes=[probe], target="ollama", settings=settings)
    current = endpoint.current_deployment
    assert current is not None
    assert current.verification is not None
    assert (current.verification.prompts_compared, current.verification.answers_checked) == ("counts", 1)
    (asked,) = ollama.created
    assert asked["model"] == current.model
    assert list(asked["files"]) == [f"{current.model}.gguf"]
    assert asked["parameters"] == {"num_ctx": 512, "stop": ["<|im_end|>"]}
    assert "{{ range .Messages }}" in asked["template"]
    assert "quantize" not in asked
    client = openai.OpenAI(base_url=endpoint.address, api_key="none needed", max_retries=0)
    said = client.chat.completions.create(model="desk", messages=QUESTION, temperature=0, max_tokens=8)
    assert (said.choices[0].message.content or "").strip() == str(probe.answer).strip()

    endpoints.deploy("desk", "lights", model, probes=[probe], target="ollama", quantization="q4_K_M", settings=settings)
    assert ollama.created[1]["quantize"] == "q4_K_M"
    assert ollama.created[1]["model"].endswith("_q4_K_M")
    endpoints.undeploy("desk", settings=settings)
    assert ollama.models == {}


def test_files_without_a_model_are_told_of(model: Path, ollama: Ollama, tmp_path: Path) -> None:
    ollama.fails_at_creation = True
    settings = Settings(home=tmp_path / "home")
    with pytest.raises(UserError, match=r"has the files but could not create the model: unsupported architecture"):
        endpoints.deploy("desk", "lights", model, probes=[probe_of(model)], target="ollama", settings=settings)
    assert endpoints.load_endpoint("desk", settings=settings).current is None


def test_without_a_server_nothing_is_begun(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert "OLLAMA_HOST" in str(target_ollama.ready())
    settings = Settings(home=tmp_path / "home")
    with pytest.raises(UserError, match="no Ollama server answers"):
        endpoints.deploy("desk", "lights", model, probes=[probe_of(model)], target="ollama", settings=settings)


@pytest.mark.parametrize(
    ("told", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),  # noqa: S104 - an address to read
        ("gpu-host:9000", "http://gpu-host:9000"),
        ("https://ollama.example", "https://ollama.example:443"),
        ("[::1]:11500", "http://[::1]:11500"),
    ],
)
def test_the_address_is_read_as_ollama_reads_it(told: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", told)
    assert target_ollama.server_address() == address


@pytest.mark.parametrize("told", ["http://user:secret@host", "host:port", "ftp://host", "host/path"])
def test_no_address_is_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", told)
    with pytest.raises(UserError, match="no address"):
        target_ollama.server_address()
