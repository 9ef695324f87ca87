"""One FastAPI application, every route at `/` and at `/v1`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Protocol

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from deployments.dispatch.offload import offload
from deployments.errors import (
    EmbeddingError,
    IncompleteError,
    InvalidKeyError,
    ModelNotAllowedError,
    ModelNotFoundError,
    OperatorOnlyError,
)
from deployments.http.access import for_operators, public
from deployments.http.auth import Access, Auth, key_of
from deployments.http.documentation import add_documentation, answers, plain
from deployments.http.errors import Errors, as_json, error_response, http_exception
from deployments.http.metrics_port import MetricsPort
from deployments.http.pharia import PhariaServing
from deployments.http.routes import BODIES, add_embedding_routes, add_pharia_routes, add_usage_route
from deployments.http.serving import Serving
from deployments.keys.usage import Counts
from deployments.metrics import CONTENT_TYPE, merge

# The version of the inference API that we speak; clients ask for major 1, 1.19.0 or later.
API_VERSION = "1.19.0"
MODEL = {
    "id": "all-minilm-l6-v2",
    "object": "model",
    "created": 0,
    "owned_by": "all-minilm-l6-v2",
    "version": 1,
    "description": "English sentences and short paragraphs",
    "maximum_completion_tokens": None,
    "max_model_len": 256,
    "embedding_task": {"supported": True},
}
SAMPLE = 'embedding_tokens_total{worker="all-minilm-l6-v2"} 7.0'
MODEL_ERRORS = (InvalidKeyError, ModelNotAllowedError, ModelNotFoundError)
READY = {"ready": False, "models": [{"ready": False, "reason": "no replica answers", "deployment": "a"}]}
# Returns the metrics of every ingress replica, as text.
Gather = Callable[[], Awaitable[list[bytes]]]
# Returns what a key has used, of every ingress replica.
GatherUsage = Callable[[str], Awaitable[list[dict[str, Counts]]]]


class Extension(Protocol):
    """More routes, which know of the application; it knows nothing of them."""

    bodies: ClassVar[tuple[type[BaseModel], ...]]

    def add_routes(self, router: APIRouter, serving: Serving) -> None:
        """Add the routes."""


class Desk(Protocol):
    """Where files and batches are taken, and the handle of what works them off."""

    @property
    def runner(self) -> DeploymentHandle[Any]:
        """The handle."""

    def access(self) -> Extension:
        """Return the routes. Raises ConfigError."""


def make_app(  # noqa: PLR0913, PLR0917 - each is one thing that an application may have
    serving: Serving,
    gather: Gather,
    ports: Mapping[str, MetricsPort] | None = None,
    access: Access | None = None,
    gather_usage: GatherUsage | None = None,
    batches: Extension | None = None,
) -> FastAPI:
    """Return the application over a catalog of models, and the workers' own metrics ports.

    Without `access` there are no keys, and anybody who reaches it may ask. Without `batches` there is no
    storage for them.
    """
    ports = {} if ports is None else ports
    app = _bare_app(ports)
    app.add_middleware(Errors)
    if access is not None:

        def refuse(error: EmbeddingError) -> Response:
            serving.metrics.denied.labels(error.code).inc()
            return error_response(error)

        # Outside of the errors: an answer that refuses says what is left of the key's limits too.
        app.add_middleware(Auth, access=access, refuse=refuse)
    app.add_exception_handler(HTTPException, http_exception)
    router = _routes(serving, gather, ports)
    if batches is not None:
        batches.add_routes(router, serving)
    if access is not None:
        add_usage_route(router, gather_usage or (lambda key: _alone(serving.usage.of(key))), as_json)
    add_documentation(app, router, BODIES if batches is None else (*BODIES, *batches.bodies))
    app.include_router(router, prefix="/v1")
    # The same routes without prefix: some clients are given the host with /v1, some without.
    app.include_router(router, include_in_schema=False)
    return app


def _bare_app(ports: Mapping[str, MetricsPort]) -> FastAPI:
    """Return an application without routes, which closes the ports as it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for port in ports.values():
            port.close()

    return FastAPI(
        title="Embedding cluster",
        description="Embeddings as OpenAI, PhariaInference, Cohere and text-embeddings-inference give them.",
        version=API_VERSION,
        openapi_url=None,  # both are among the routes, at either prefix
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name the host that the client made up
        lifespan=lifespan,
    )


def _routes(serving: Serving, gather: Gather, ports: Mapping[str, MetricsPort]) -> APIRouter:
    router = APIRouter()
    catalog = serving.catalog

    async def models(request: Request) -> Response:
        """List the models."""
        return as_json({"object": "list", "data": [each.listing() for each in serving.visible(request)]})

    async def model(request: Request, name: str) -> Response:
        """Show one model."""
        return as_json(serving.find(request, name).listing())

    @public
    async def health() -> Response:
        """Say that this process is alive."""
        return as_json({"status": "ok"})

    @public
    async def ready(request: Request) -> Response:
        """Say for each worker whether a replica answers; 200 when all do, else 503.

        Where there are keys, whoever has none is told no more than that.
        """
        states = await asyncio.gather(*(d.state() for d in catalog.dispatches.values()))
        for state in states:
            port = ports.get(state["deployment"])
            if port is not None and port.problem:
                state["metrics"] = port.problem
        everything = all(state["ready"] for state in states)
        known = serving.rates is None or key_of(request.scope) is not None
        body = {"ready": everything, "models": states} if known else {"ready": everything}
        return as_json(body, 200 if everything else 503)

    @for_operators
    async def metrics() -> Response:
        """Prometheus metrics of the whole cluster's gateway."""
        texts = await gather()
        return Response(await offload(sum(map(len, texts)), merge, texts), media_type=CONTENT_TYPE)

    @public
    async def version() -> Response:
        """Give the version of the API as plain text."""
        return Response(API_VERSION, media_type="text/plain")

    add_embedding_routes(router, serving)
    add_pharia_routes(router, PhariaServing(serving), as_json)
    listed = {"object": "list", "data": [MODEL]}
    router.add_api_route("/models", models, responses=answers(listed, InvalidKeyError))
    router.add_api_route("/models/{name:path}", model, responses=answers(MODEL, *MODEL_ERRORS))
    router.add_api_route("/health", health, responses=answers({"status": "ok"}))
    not_ready = {**answers(READY)[200], "description": "Not every model is ready"}
    router.add_api_route("/ready", ready, responses={**answers(READY | {"ready": True}), 503: not_ready})
    plain_text: dict[str, Any] = {"response_class": PlainTextResponse}
    router.add_api_route("/version", version, **plain_text, responses=plain(API_VERSION))
    denied = answers(None, InvalidKeyError, OperatorOnlyError, IncompleteError)
    router.add_api_route("/metrics", metrics, **plain_text, responses={**denied, **plain(SAMPLE)})
    return router


async def _alone(part: dict[str, Counts]) -> list[dict[str, Counts]]:
    """Return what the only ingress replica has counted."""
    return [part]
