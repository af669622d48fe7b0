"""A server with the part of Ollama's documented HTTP interface that the target `ollama` uses, on loopback.

Blobs by digest, create with template, system message, parameters and quantisation, show, delete, chat. It renders
prompts with the template that it was given (`tests.go_template`) and has the test's model answer them.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from tests.go_template import execute

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_QUANTIZE = {"q4_K_S", "q4_K_M", "q8_0"}
_FIELDS = {"model", "files", "template", "system", "parameters", "quantize", "stream"}


class Ollama:
    """`answer` gets a prompt as text and the longest answer in tokens, and gives the prompt's tokens and the answer."""

    def __init__(self, answer: Callable[[str, int], tuple[list[int], str]], port: int = 0) -> None:
        self.answer = answer
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.prompts: list[str] = []
        self.fails_to_create: str | None = None
        ollama = self

        class Handler(_Handler):
            server_of = ollama

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = int(self.server.server_port)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def end(self) -> None:
        """Answer no more."""
        self.server.shutdown()
        self.server.server_close()

    def chat(self, asked: dict[str, Any]) -> tuple[list[int], str]:
        """The tokens of the prompt, and the answer, of a model that is there."""
        made = self.models[asked["model"]]
        messages = asked["messages"]
        if made.get("system") and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": made["system"]}, *messages]
        values = [{"Role": each["role"], "Content": each["content"]} for each in messages]
        text = execute(made["template"], {"Messages": values})
        self.prompts.append(text)
        return self.answer(text, int(asked["max_tokens"]))

    def create(self, asked: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """The status and the lines of the answer."""
        if unknown := sorted(set(asked) - _FIELDS):
            return 400, [{"error": f"unknown field {unknown[0]}"}]
        if not _NAME.fullmatch(asked["model"]):
            return 400, [{"error": "invalid model name"}]
        missing = [digest for digest in asked["files"].values() if digest not in self.blobs]
        if missing:
            return 400, [{"error": f"blob {missing[0]} is not there"}]
        (content,) = (self.blobs[digest] for digest in asked["files"].values())
        if content[:4] != b"GGUF":
            return 400, [{"error": "supplied file was not in GGUF format"}]
        execute(asked["template"], {"Messages": []})
        lines: list[dict[str, Any]] = [{"status": "parsing GGUF"}]
        if asked.get("quantize"):
            if asked["quantize"] not in _QUANTIZE:
                return 400, [{"error": f"unsupported quantization type {asked['quantize']}"}]
            if _file_type(content) not in (0, 1):  # F32, F16
                return 200, [*lines, {"error": "quantization is only supported for F16 and F32 models"}]
            lines.append({"status": f"quantizing model to {asked['quantize']}"})
        if self.fails_to_create is not None:
            return 200, [*lines, {"error": self.fails_to_create}]
        self.models[asked["model"]] = asked
        return 200, [*lines, {"status": "writing manifest"}, {"status": "success"}]

    def delete(self, name: str) -> int:
        """The status; the blobs of a deleted model go with it."""
        gone = self.models.pop(name, None)
        if gone is None:
            return 404
        for digest in gone["files"].values():
            self.blobs.pop(digest, None)
        return 200


def _file_type(content: bytes) -> int:
    from gguf import GGUFReader

    with NamedTemporaryFile(suffix=".gguf") as file:
        Path(file.name).write_bytes(content)
        field = GGUFReader(file.name).get_field("general.file_type")
        assert field is not None
        return int(field.contents())


class _Handler(BaseHTTPRequestHandler):
    server_of: Ollama

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, status: int, content: bytes = b"", kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode())

    def _note(self) -> Ollama:
        self.server_of.asked.append((self.command, self.path))
        return self.server_of

    def do_GET(self) -> None:
        self._note()
        if self.path == "/":
            self._send(200, b"Ollama is running", "text/plain")
        elif self.path == "/api/version":
            self._json(200, {"version": "0.13.0"})
        else:
            self._send(404)

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path.removeprefix("/api/blobs/") in self._note().blobs else 404)
        self.end_headers()

    def do_DELETE(self) -> None:
        asked = json.loads(self._body())
        self._send(self._note().delete(asked["model"]) if self.path == "/api/delete" else 404)

    def do_POST(self) -> None:
        ollama, content = self._note(), self._body()
        if self.path.startswith("/api/blobs/"):
            digest = self.path.removeprefix("/api/blobs/")
            if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
                self._json(400, {"error": "digest mismatch"})
                return
            ollama.blobs[digest] = content
            self._send(201)
            return
        asked = json.loads(content)
        if self.path == "/api/create":
            status, lines = ollama.create(asked)
            self._send(status, "".join(json.dumps(line) + "\n" for line in lines).encode(), "application/x-ndjson")
        elif self.path in ("/api/show", "/v1/chat/completions") and asked["model"] not in ollama.models:
            self._json(404, {"error": f"model '{asked['model']}' not found"})
        elif self.path == "/api/show":
            self._json(200, {"template": ollama.models[asked["model"]]["template"]})
        elif self.path == "/v1/chat/completions":
            self._chat(ollama, asked)
        else:
            self._send(404)

    def _chat(self, ollama: Ollama, asked: dict[str, Any]) -> None:
        tokens, answer = ollama.chat(asked)
        told = {"id": "1", "created": 1, "model": asked["model"]}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": answer}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "total_tokens": len(tokens) + 1}
            self._json(200, {**told, "object": "chat.completion", "choices": choices, "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for letter in answer:
            choices = [{"index": 0, "delta": {"content": letter}, "finish_reason": None}]
            chunk = {**told, "object": "chat.completion.chunk", "choices": choices}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        return
