"""Answers an inference job of an embedding model: vectors of texts, or figures over held-out rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from methods import contract
from methods.embedding import encoders, retrieval


def answer(job: contract.Job, model: Any) -> dict[str, object]:
    """Measure `inputs.evaluation_rows`, or embed `inputs.requests` (JSON lines with `texts`) into `predictions.jsonl`.

    A request may say in `input_type` that its texts are of the kind `query` or `document`. A result line has
    `embeddings`, one list of numbers a text.
    """
    size = job.parameters["batch_size"]
    if job.inputs.get("evaluation_rows"):
        job.phase("measuring")
        return {"figures": retrieval.measure(model, Path(job.inputs["evaluation_rows"]), size)}
    job.phase("embedding")
    with Path(job.inputs["requests"]).open(encoding="utf-8", newline="\n") as lines:
        requests = [json.loads(line) for line in lines]
    started = time.monotonic()
    path = job.output / "predictions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for done, request in enumerate(requests, start=1):
            role = request.get("input_type")
            if role is not None and role not in encoders.ROLES:
                raise contract.Refused(f"request {done}: input_type is {role!r}, one of {', '.join(encoders.ROLES)}")
            vectors = encoders.encode(model, request["texts"], role, size)
            file.write(json.dumps({"embeddings": vectors.tolist()}) + "\n")
            job.progress(done, len(requests))
            if job.cancelled:
                raise contract.Cancelled
    return {"predictions": str(path), "rows": len(requests), "seconds": time.monotonic() - started}
