"""Serves an embedding model over HTTP, with the embeddings route of OpenAI's API.

Run as: python deploying.py JOB_DIR
"""

from __future__ import annotations

import base64
import threading
from typing import Any

from methods import contract
from methods.embedding import encoders
from methods.toolkit import json_server

MOST_INPUTS = 2048
"""Texts of one request, as in OpenAI's own service."""

_BATCH = 32


class EmbeddingModel:
    """The model, and what answers requests with it."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model
        self._alone = threading.Lock()

    def embed(self, body: json_server.Body) -> json_server.Body:
        """Answer a request of OpenAI's embeddings route.

        Besides OpenAI's fields it takes `input_type`, `query` or `document`, for models with prompts of their own.
        """
        texts = self._texts(body.get("input"))
        role, form = body.get("input_type"), body.get("encoding_format") or "float"
        if role is not None and role not in encoders.ROLES:
            raise json_server.RequestRefused(f"input_type is one of {', '.join(encoders.ROLES)}", "input_type")
        if form not in ("float", "base64"):
            raise json_server.RequestRefused("encoding_format is float or base64", "encoding_format")
        size = self._dimensions(body.get("dimensions"))
        with self._alone:
            vectors = encoders.encode(self.model, texts, role, _BATCH)
        if size is not None:
            # A cut vector is not as long as a whole one; of what is compared by its direction only the direction stays.
            vectors = vectors[:, :size]
            vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, form)}
            for index, vector in enumerate(vectors)
        ]
        tokens = self._count(texts, role)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}

    def _texts(self, given: Any) -> list[str]:
        if isinstance(given, list) and given and all(isinstance(each, int | list) for each in given):
            # Clients that cut texts into tokens themselves use OpenAI's own tokens, which say nothing here.
            raise json_server.RequestRefused("input is text here, not token ids", "input")
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
            raise json_server.RequestRefused("input is a text or a list of texts", "input")
        if len(texts) > MOST_INPUTS:
            raise json_server.RequestRefused(f"input has {len(texts)} texts, at most {MOST_INPUTS} are taken", "input")
        if not all(texts):
            raise json_server.RequestRefused("a text of input is empty", "input")
        return texts

    def _dimensions(self, given: Any) -> int | None:
        """The size that vectors are cut to; None for whole ones."""
        whole = self.model.get_embedding_dimension()
        if given is None or given == whole:
            return None
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= whole:
            raise json_server.RequestRefused(f"dimensions is a whole number from 1 to {whole}", "dimensions")
        return given

    def _count(self, texts: list[str], role: str | None) -> int:
        """Tokens that the model reads: with its prompt, up to its longest input."""
        prompt = self.model.prompts.get(role, "") if role else ""
        ids = self.model.tokenizer(
            [prompt + text for text in texts], truncation=True, max_length=self.model.max_seq_length
        )["input_ids"]
        return sum(map(len, ids))


def main(job: contract.Job) -> dict[str, object]:
    """Serve until asked to stop."""
    job.phase("loading the model")
    dtype, device = job.parameters["dtype"], job.parameters["device"]
    if job.inputs.get("adapter"):
        base, adapter = job.inputs["base_model"], job.inputs["adapter"]
        model = encoders.load_customized(base, adapter, dtype, job.folder, device)
    else:
        model = encoders.load_encoder(job.inputs["model"], dtype, device=device)
    served = EmbeddingModel(job.inputs["name"], model)
    json_server.serve(job, {"/v1/embeddings": served.embed})
    return {"served": served.name}


def _encoded(vector: Any, form: str) -> list[float] | str:
    if form == "float":
        numbers: list[float] = vector.tolist()
        return numbers
    # As OpenAI sends them: 32-bit numbers, the lowest byte first.
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


if __name__ == "__main__":
    contract.run(main)
