"""A small HTTP server for deploying files: JSON in, JSON out, as OpenAI's clients speak it. Standard library only.

It answers `GET /health` and `GET /v1/models` by itself. The endpoint's key, and an address that stays, are the
gateway's; this server listens on the loopback address it is given.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from methods import contract

LARGEST_BODY = 64 * 2**20

Body = dict[str, Any]
Route = Callable[[Body], Body | Generator[Body, None, None]]
"""What answers a POST: one object, or several that are sent one by one as they come (server-sent events)."""


class RequestRefused(Exception):
    """Raised by a route for a request that cannot be answered; `field` is the one at fault."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def serve(job: contract.Job, routes: Mapping[str, Route], largest_body: int = LARGEST_BODY) -> None:
    """Answer requests at the job's `host` and `port` until the stage is asked to stop; those under way are finished.

    A request of more than `largest_body` bytes is refused unread.
    """
    server = _Server((job.inputs["host"], job.inputs["port"]), _Handler)
    server.model, server.routes, server.created = job.inputs["name"], routes, int(time.time())
    server.largest_body = largest_body
    listener = threading.Thread(target=server.serve_forever, args=(0.1,), name="listener")
    listener.start()
    job.phase("serving")
    print(f"serving {server.model} at http://{job.inputs['host']}:{job.inputs['port']}", flush=True)
    while not job.cancelled:
        time.sleep(0.2)
    server.shutdown()
    listener.join()
    server.server_close()  # waits for the requests under way


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128
    model: str
    routes: Mapping[str, Route]
    created: int
    largest_body: int


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds a client may take to send its request

    def do_GET(self) -> None:
        entry = {"id": self.server.model, "object": "model", "created": self.server.created, "owned_by": "tuneline"}
        if self.path == "/health":
            self._send(HTTPStatus.OK, {"status": "ok"})
        elif self.path == "/v1/models":
            self._send(HTTPStatus.OK, {"object": "list", "data": [entry]})
        elif self.path in self.server.routes:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.path} takes POST")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path} here")

    def do_POST(self) -> None:
        route = self.server.routes.get(self.path)
        if route is None:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path} here")
            return
        body = self._read_body()
        if body is None:
            return
        try:
            self._answer(route(body))
        except RequestRefused as refusal:
            self._refuse(HTTPStatus.BAD_REQUEST, str(refusal), refusal.field)
        except OSError:  # the client has gone; nobody is left to tell
            self.close_connection = True
        except Exception as error:
            traceback.print_exc()
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _read_body(self) -> Body | None:
        """The JSON object that was sent; None if there is none, which the client is told."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length")
            return None
        if int(length) > self.server.largest_body:
            most = f"a request has at most {self.server.largest_body} bytes"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, most)
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "the body of the request is not valid JSON")
            return None
        if not isinstance(body, dict):
            self._refuse(HTTPStatus.BAD_REQUEST, "the body of the request is not a JSON object")
            return None
        return body

    def _answer(self, answer: Body | Generator[Body, None, None]) -> None:
        if isinstance(answer, dict):
            self._send(HTTPStatus.OK, answer)
            return
        with contextlib.closing(answer):  # it learns so that a client has gone
            first = next(answer)  # what refuses the request does it here, while it can still be answered by a status
            self._start(HTTPStatus.OK, "text/event-stream")
            try:
                for event in itertools.chain([first], answer):
                    self._send_event(json.dumps(event, ensure_ascii=False))
            except OSError:
                raise
            except Exception as error:
                traceback.print_exc()
                self._send_event(json.dumps(_error(f"{type(error).__name__}: {error}", "server_error")))
                return
            self._send_event("[DONE]")

    def _send_event(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, status: HTTPStatus, message: str, field: str | None = None) -> None:
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        self._send(status, _error(message, kind, field))

    def _send(self, status: HTTPStatus, content: Body) -> None:
        body = json.dumps(content, ensure_ascii=False).encode()
        self._start(status, "application/json", len(body))
        self.wfile.write(body)

    def _start(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        # A connection that waits for another request would hold up the end of the server.
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged one by one; what goes wrong is, with its traceback."""


def _error(message: str, kind: str, field: str | None = None) -> Body:
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}
