"""Serves a model that makes pictures: POST /v1/images/generations, as OpenAI's interface has it.

Run as: python deploying.py JOB_DIR   (inputs: name, host, port, and model, or adapter and base_model)

A request holds `prompt`, and if it likes `n`, `size`, `response_format` (b64_json only: nothing is kept to link to),
and beyond that interface `seed`, `steps`, `guidance`, `negative_prompt` and `aspect_ratio`. The n-th picture has the
seed + n - 1. One is made at a time.
"""

from __future__ import annotations

import base64
import random
import threading
import time
from io import BytesIO
from typing import Any

from methods import contract
from methods.image_generation import pictures
from methods.image_generation.pictures import Settings
from methods.toolkit import json_server

_MOST_PICTURES = 10
MOST_BYTES = 1024 * 1024
ROUTE = "/v1/images/generations"


class Painter:
    """The pipeline and how it usually makes pictures."""

    def __init__(self, pipeline: Any, settings: Settings, name: str) -> None:
        self.pipeline, self.settings, self.name = pipeline, settings, name
        self._one_at_a_time = threading.Lock()

    def paint(self, body: json_server.Body) -> json_server.Body:
        """Answer a request of OpenAI's route for pictures."""
        try:
            return self._answer(body)
        except (contract.Refused, ValueError) as refusal:  # a ValueError is what diffusers says of such a request
            raise json_server.RequestRefused(str(refusal)) from refusal

    def _answer(self, request: json_server.Body) -> json_server.Body:
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


def main(job: contract.Job) -> dict[str, object]:
    """Serve the model of the job until asked to stop."""
    job.phase("loading the model")
    adapter = job.inputs.get("adapter")
    base = job.inputs["base_model"] if adapter else job.inputs["model"]
    pipeline = pictures.load_pipeline(base, adapter, job.parameters["dtype"], job.parameters["device"])
    painter = Painter(pipeline, pictures.read_settings(adapter or base), job.inputs["name"])
    json_server.serve(job, {ROUTE: painter.paint}, MOST_BYTES)
    return {}


if __name__ == "__main__":
    contract.run(main)
