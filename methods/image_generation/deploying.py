"""Serves a model that makes pictures: POST /v1/images/generations, as OpenAI's interface has it.

Run as: python deploying.py JOB_DIR   (inputs: name, host, port, and model, or adapter and base_model)

A request holds `prompt`, and if it likes `n`, `size`, `response_format` (b64_json only: nothing is kept to link to),
and beyond that interface `seed`, `steps`, `guidance`, `negative_prompt` and `aspect_ratio`. The n-th picture has the
seed + n - 1. One is made at a time.
"""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from methods import contract
from methods.image_generation import pictures
from methods.image_generation.pictures import Settings

_MOST_PICTURES = 10
_MOST_BYTES = 1024 * 1024
_ROUTE = "/v1/images/generations"


class Painter:
    """The pipeline and how it usually makes pictures."""

    def __init__(self, pipeline: Any, settings: Settings, name: str) -> None:
        self.pipeline, self.settings, self.name = pipeline, settings, name
        self._one_at_a_time = threading.Lock()

    def answer(self, request: Any) -> dict[str, Any]:
        """The answer to a request. Raises Refused for one that cannot be."""
        if not isinstance(request, dict):
            raise contract.Refused("a request is a JSON object with a prompt")
        if request.get("response_format", "b64_json") != "b64_json":
            raise contract.Refused("response_format is b64_json: no picture is kept to link to")
        count = request.get("n", 1)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_PICTURES:
            raise contract.Refused(f"n is a whole number from 1 to {_MOST_PICTURES}, not {count!r}")
        seed = random.randrange(2**31)  # noqa: S311 - a picture is no secret
        first = pictures.order_of({**request, "caption": request.get("prompt")}, self.settings, seed)
        data = []
        for number in range(count):
            order = pictures.order_of(
                {**request, "caption": first.caption, "seed": first.seed + number}, self.settings, 0
            )
            with self._one_at_a_time:
                made = pictures.paint(self.pipeline, order)
            buffer = BytesIO()
            made.save(buffer, "PNG")
            data.append({"b64_json": base64.b64encode(buffer.getvalue()).decode("ascii"), "seed": order.seed})
        return {"created": int(time.time()), "model": self.name, "data": data}


class Handler(BaseHTTPRequestHandler):
    """Routes of the server; `painter` is set on the class that is served."""

    painter: Painter
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.painter.name, "object": "model"}]})
        else:
            self._refuse(404, "there is no such route")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MOST_BYTES:
            self.close_connection = True
            self._refuse(413 if length.isdecimal() else 411, f"a request has a length, of {_MOST_BYTES} bytes at most")
            return
        body = self.rfile.read(int(length))
        if self.path != _ROUTE:
            self._refuse(404, f"the route is {_ROUTE}")
            return
        try:
            self._send(200, self.painter.answer(json.loads(body)))
        except (contract.Refused, ValueError) as error:
            self._refuse(400, str(error))

    def _refuse(self, status: int, text: str) -> None:
        self._send(status, {"error": {"message": text, "type": "invalid_request_error"}})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def make_server(painter: Painter, host: str, port: int) -> ThreadingHTTPServer:
    """The server, listening."""
    return ThreadingHTTPServer((host, port), type("PainterHandler", (Handler,), {"painter": painter}))


def main(job: contract.Job) -> dict[str, object]:
    """Serve the model of the job until asked to stop."""
    job.phase("loading the model")
    adapter = job.inputs.get("adapter")
    base = job.inputs["base_model"] if adapter else job.inputs["model"]
    pipeline = pictures.load_pipeline(base, adapter, job.parameters["dtype"], job.parameters["device"])
    painter = Painter(pipeline, pictures.read_settings(adapter or base), job.inputs["name"])
    server = make_server(painter, job.inputs["host"], job.inputs["port"])
    job.phase("serving")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while not job.cancelled:
        time.sleep(0.2)
    server.shutdown()
    return {}


if __name__ == "__main__":
    contract.run(main)
