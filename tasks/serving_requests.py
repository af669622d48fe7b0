"""Proof that a served model that does not chat gives what its inference stage gives: embeddings, or pictures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.endpoints import Deployment, RequestProbe, Verification
from configs.errors import UserError
from tasks.http_backends import post_json, refused

EMBEDDINGS = "/v1/embeddings"
IMAGES = "/v1/images/generations"
LEAST_COSINE = 0.999


def verify_requests(deployment: Deployment, probes: Sequence[RequestProbe], timeout: float) -> Verification:
    """Ask the running server every request and compare with what the inference stage made of it.

    Embeddings are to point the same way (cosine above 0.999), pictures to be the same. `timeout` is in seconds, for
    each answer. Raises UserError at the first that is another one.
    """
    cosines: list[float] = []
    for number, probe in enumerate(probes, start=1):
        where = f"probe {number} of {len(probes)}"
        if "texts" in probe.request:
            cosines += _same_embeddings(deployment, probe, where, timeout)
        elif "caption" in probe.request:
            _same_picture(deployment, probe, where, timeout)
        else:
            raise UserError(
                f"{where}: no server is known that answers requests of this kind",
                field="request",
                value=probe.request,
                expected="texts (embeddings) or a caption (a picture)",
            )
    return Verification(
        prompts_checked=0,
        prompts_compared="nothing",
        answers_checked=len(probes),
        figures={"smallest_cosine": min(cosines)} if cosines else {},
    )


def _same_embeddings(deployment: Deployment, probe: RequestProbe, where: str, timeout: float) -> list[float]:
    """The cosine of each embedding with the expected one."""
    texts, expected = probe.request["texts"], probe.prediction["embeddings"]
    answer = post_json(deployment, EMBEDDINGS, {"model": deployment.backend_model, "input": texts}, timeout)
    try:
        found = [[float(value) for value in each["embedding"]] for each in answer["data"]]
    except (KeyError, TypeError, ValueError) as error:
        raise refused(deployment, EMBEDDINGS, f"{answer!r:.300}") from error
    sizes = [[len(each) for each in vectors] for vectors in (found, expected)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{where}: the server gives other embeddings", field="size of each", value=sizes[0], expected=str(sizes[1])
        )
    cosines = [cosine(one, other) for one, other in zip(found, expected, strict=True)]
    if min(cosines) <= LEAST_COSINE:
        raise UserError(
            f"{where}: the server gives other embeddings than the model's own inference stage",
            field="cosine",
            value=round(min(cosines), 6),
            expected=f"more than {LEAST_COSINE}",
        )
    return cosines


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """How alike two directions are: 1 for the same one."""
    length = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / length if length else 0.0


def _same_picture(deployment: Deployment, probe: RequestProbe, where: str, timeout: float) -> None:
    asked = {name: value for name, value in probe.request.items() if name != "caption"}
    wanted = {"prompt": probe.request["caption"], "n": 1, "response_format": "b64_json"}
    answer = post_json(deployment, IMAGES, {**asked, "model": deployment.backend_model, **wanted}, timeout)
    try:
        found = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
    except (LookupError, TypeError, ValueError) as error:
        raise refused(deployment, IMAGES, f"{answer!r:.300}") from error
    expected = base64.b64decode(probe.prediction["b64_json"])
    if found != expected and _pixels(found, where) != _pixels(expected, where):
        raise UserError(
            f"{where}: the server makes another picture than the model's own inference stage",
            field="caption",
            value=probe.request["caption"],
            expected=f"the same picture with the seed {probe.request.get('seed')}",
        )


def _pixels(picture: bytes, where: str) -> tuple[Any, bytes]:
    """Size and colours: the same picture may be packed in two ways."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(picture)) as opened:
            colours = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{where}: what the server gives is no picture", field="b64_json") from error
    return colours.size, colours.tobytes()


def predicted(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction of an inference stage as a probe holds it: a picture in it, not beside it."""
    if "image" not in prediction:
        return dict(prediction)
    return {"b64_json": base64.b64encode(Path(prediction["image"]).read_bytes()).decode("ascii")}
