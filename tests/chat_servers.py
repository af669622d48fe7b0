"""A server that speaks OpenAI's chat completions on loopback and answers as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answering = Callable[[dict[str, Any]], str | int]


class ChatServer:
    """Answers each request with the text, or the HTTP status, that `answering` gives for it; keeps what it was sent."""

    def __init__(self, answering: Answering) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                server.keys.append(self.headers["Authorization"])
                said = answering(body) if self.path == "/v1/chat/completions" else 404
                content: dict[str, Any] = {"error": "refused"}
                if isinstance(said, str):
                    choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
                    content = {"choices": [choice], "usage": {"completion_tokens": len(said.split())}}
                self.send_response(200 if isinstance(said, str) else said)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def prompts(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.asked]


@contextmanager
def chat_server(answering: Answering) -> Iterator[ChatServer]:
    """Serve while the block runs."""
    found = ChatServer(answering)
    threading.Thread(target=found.server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        found.server.shutdown()
        found.server.server_close()
