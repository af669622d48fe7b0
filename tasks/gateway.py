"""Program: the reverse proxy that keeps an endpoint's address while the model behind it changes.

`python -m tasks.gateway ENDPOINT_JSON`. One process an endpoint. It reads the endpoint's record, again
whenever the record was replaced, checks the API key, replaces the model's name and passes everything else
through unbuffered.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.endpoints import Deployment, Endpoint

if TYPE_CHECKING:
    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

# Headers of one connection, which a proxy must not pass on (RFC 9110 §7.6.1), what httpx sets itself, and the
# key.
_NOT_FORWARDED = frozenset(
    {
        "authorization",
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class RecordReader:
    """The endpoint's record, parsed again only when the file was replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._endpoint: Endpoint | None = None

    def read(self) -> Endpoint:
        """The endpoint as its record is now. Raises OSError or ValueError if the record is gone or broken."""
        stat = self._path.stat()
        seen = (stat.st_ino, stat.st_mtime_ns)
        if self._endpoint is None or seen != self._seen:
            self._endpoint = Endpoint.model_validate_json(self._path.read_text(encoding="utf-8"))
            self._seen = seen
        return self._endpoint


def openai_error(status: int, message: str, *, code: str, kind: str = "invalid_request_error") -> JSONResponse:
    """An error in the shape that OpenAI clients turn into their own exceptions."""
    from starlette.responses import JSONResponse

    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status_code=status)


def key_is_right(endpoint: Endpoint, authorization: str | None) -> bool:
    """Whether the `Authorization` header carries the endpoint's key (always true while no key is set)."""
    if endpoint.api_key_sha256 is None:
        return True
    scheme, _, key = (authorization or "").partition(" ")
    digest = hashlib.sha256(key.strip().encode()).hexdigest()
    return scheme.lower() == "bearer" and hmac.compare_digest(digest, endpoint.api_key_sha256)


def answers_to(endpoint: Endpoint, name: object) -> bool:
    """Whether a client may call the current model by this name (`@main` is what `transformers serve` answers
    with)."""
    return name in (endpoint.name, endpoint.current, f"{endpoint.current}@main")


def with_deployed_model(endpoint: Endpoint, content: bytes) -> bytes | JSONResponse:
    """The request's JSON with `model` replaced by the deployed model's name, or the error to answer with."""
    try:
        body = json.loads(content)
    except ValueError:
        return openai_error(400, "The body of the request is not valid JSON.", code="invalid_json")
    if not isinstance(body, dict) or "model" not in body:
        message = f"You must provide a model parameter: '{endpoint.name}' or '{endpoint.current}'."
        return openai_error(400, message, code="missing_model")
    if not answers_to(endpoint, body["model"]):
        return unknown_model(endpoint, body["model"])
    deployment = endpoint.current_deployment
    return json.dumps(body | {"model": deployment.backend_model if deployment else endpoint.current}).encode()


def unknown_model(endpoint: Endpoint, name: object) -> JSONResponse:
    """OpenAI's 404 for a model that is not here, with the names that are."""
    message = f"The model {name!r} does not exist here; this endpoint answers to '{endpoint.name}'"
    return openai_error(404, f"{message} and '{endpoint.current}'.", code="model_not_found")


def model_entry(deployment: Deployment) -> dict[str, Any]:
    """The deployed model as OpenAI's `/v1/models` lists it."""
    created = int(deployment.created_at.timestamp())
    return {"id": deployment.model, "object": "model", "created": created, "owned_by": "tuneline"}


class Proxy:
    """The routes of the gateway, over one endpoint record and one HTTP client."""

    def __init__(self, record: RecordReader, client: httpx.AsyncClient) -> None:
        self._record = record
        self._client = client

    def _current(self) -> tuple[Endpoint, Deployment | None]:
        endpoint = self._record.read()
        return endpoint, endpoint.current_deployment

    async def health(self, request: Request) -> Response:
        """Health of the backend. Open without a key: it says nothing but up or down, and load balancers need
        it."""
        return await self._forward(request, b"")

    async def models(self, request: Request) -> Response:
        """The deployed model: the backend's own listing is of its hub cache, which is empty."""
        from starlette.responses import JSONResponse

        endpoint, deployment = self._current()
        if not key_is_right(endpoint, request.headers.get("authorization")):
            return wrong_key()
        if deployment is None:
            return nothing_deployed(endpoint)
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model_entry(deployment)]})
        return JSONResponse(model_entry(deployment)) if answers_to(endpoint, name) else unknown_model(endpoint, name)

    async def forward(self, request: Request) -> Response:
        """Any other `/v1/` request: key, model's name, then on to the backend."""
        endpoint, deployment = self._current()
        if not key_is_right(endpoint, request.headers.get("authorization")):
            return wrong_key()
        if deployment is None:
            return nothing_deployed(endpoint)
        if {".", ".."} & set(request.path_params["path"].split("/")):
            # httpx resolves dot segments, which would open routes outside `/v1`, such as the backend's
            # `/reset`.
            return openai_error(404, "There is no such path.", code="not_found")
        return await self._forward(request, await request.body())

    async def _forward(self, request: Request, content: bytes) -> Response:
        from httpx import HTTPError

        tried: Deployment | None = None
        while True:
            endpoint, deployment = self._current()
            if deployment is None:
                return nothing_deployed(endpoint)
            if deployment == tried:
                return openai_error(
                    503, f"The model '{deployment.model}' is down.", code="model_down", kind="server_error"
                )
            body = with_deployed_model(endpoint, content) if request.method == "POST" else content
            if not isinstance(body, bytes):
                return body
            try:
                return await self._pass_through(request, deployment, body)
            except HTTPError:
                # The endpoint may have been switched since the record was read: look once more.
                tried = deployment

    async def _pass_through(self, request: Request, deployment: Deployment, body: bytes) -> Response:
        from starlette.responses import StreamingResponse

        path = deployment.health_path if request.url.path == "/health" else request.url.path
        url = f"{deployment.backend}{path}"
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _NOT_FORWARDED]
        outgoing = self._client.build_request(
            request.method, url, params=request.query_params, headers=headers, content=body
        )
        answer = await self._client.send(outgoing, stream=True)

        async def chunks() -> AsyncIterator[bytes]:
            # A client that goes away cancels this generator: closing the answer makes the backend stop
            # generating.
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:
                await answer.aclose()

        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _NOT_FORWARDED}
        return StreamingResponse(chunks(), status_code=answer.status_code, headers=kept)


def wrong_key() -> JSONResponse:
    """OpenAI's 401."""
    message = "Incorrect API key provided, or none: send it as 'Authorization: Bearer KEY'."
    return openai_error(401, message, code="invalid_api_key")


def nothing_deployed(endpoint: Endpoint) -> JSONResponse:
    """503 while the endpoint has no current deployment."""
    message = f"Nothing is deployed at the endpoint '{endpoint.name}'."
    return openai_error(503, message, code="nothing_deployed", kind="server_error")


def build_gateway(record: Path) -> Starlette:
    """The gateway of the endpoint whose record (`endpoint.json`) this is."""
    import httpx
    from starlette.applications import Starlette
    from starlette.routing import Route

    # Generation may take any time, so no read timeout. Nothing kept alive: a pooled connection to a backend
    # that has been switched off would fail a request which could have been served. Never through a proxy of
    # the environment.
    client = httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=10),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
    )
    proxy = Proxy(RecordReader(record), client)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await client.aclose()

    routes = [
        Route("/health", proxy.health, methods=["GET"]),
        Route("/v1/models", proxy.models, methods=["GET"]),
        Route("/v1/models/{name}", proxy.models, methods=["GET"]),
        Route("/v1/{path:path}", proxy.forward, methods=["GET", "POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def main() -> None:
    """Listen on the address in the record until told to end."""
    import uvicorn

    from methods.toolkit.serve_model import end_with_starter

    record = Path(sys.argv[1])
    gateway = Endpoint.model_validate_json(record.read_text(encoding="utf-8")).gateway
    if gateway is None:
        raise SystemExit(f"{record}: no address was chosen for this endpoint yet")
    end_with_starter(record)
    uvicorn.run(build_gateway(record), host=gateway.host, port=gateway.port, log_level="info", access_log=False)


if __name__ == "__main__":
    main()
