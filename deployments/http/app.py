"""One FastAPI application, every route at `/` and at `/v1`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from fastapi import FastAPI, Response
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from deployments.errors import EmbeddingError
from deployments.http.auth import Access, Auth
from deployments.http.cluster import API_VERSION, Cluster, Gather, cluster_routes
from deployments.http.dialects.pharia import pharia_routes
from deployments.http.dialects.tei import info_route
from deployments.http.dialects.tokens import tokens_routes
from deployments.http.documentation import documentation_routes, page_routes
from deployments.http.edge.bodies import Paced
from deployments.http.errors import Errors, error_response, http_exception
from deployments.http.metrics_port import MetricsPort
from deployments.http.routes import embedding_routes, usage_route
from deployments.http.serving import Serving
from deployments.http.table import Entry, register
from deployments.keys.usage import Counts
from deployments.status.look import GatherCounts
from deployments.tracing import flush

# How long the end waits for the last spans to be sent.
FLUSH_SECONDS = 2.0
# Returns what a key has used, of every ingress replica.
GatherUsage = Callable[[str], Awaitable[list[dict[str, Counts]]]]


class Desk(Protocol):
    """Where files and batches are taken, and the handle of what works them off."""

    @property
    def runner(self) -> DeploymentHandle[Any]:
        """The handle."""

    def routes(self, serving: Serving) -> Iterable[Entry]:
        """Return the routes, which know of the application; it knows nothing of them. Raises ConfigError."""


def make_app(  # noqa: PLR0913, PLR0917 - each is one thing that an application may have
    serving: Serving,
    gather: Gather,
    ports: Mapping[str, MetricsPort] = {},
    access: Access | None = None,
    gather_usage: GatherUsage | None = None,
    batches: Iterable[Entry] = (),
    gather_counts: GatherCounts | None = None,
) -> FastAPI:
    """Return the application over a catalog of models, and the workers' own metrics ports.

    Without `access` anybody who reaches it may ask; `batches` are the routes of files and batches.
    """
    app = _bare_app(ports)
    app.add_middleware(Paced, in_hand=serving.in_hand)
    app.add_middleware(Errors)
    app.add_exception_handler(HTTPException, http_exception)
    entries = [
        *embedding_routes(serving),
        *tokens_routes(serving),
        *pharia_routes(serving),
        info_route(serving),
        *cluster_routes(Cluster(serving, gather, ports, gather_counts)),
        *batches,
    ]
    if access is not None:

        def refuse(error: EmbeddingError) -> Response:
            serving.metrics.denied.labels(error.code).inc()
            return error_response(error)

        # Outside of the errors: an answer that refuses says what is left of the key's limits too.
        app.add_middleware(Auth, access=access, refuse=refuse)
        gather_usage = gather_usage or (lambda key: _alone(serving.usage.of(key)))
        entries.append(usage_route(gather_usage, access.ring))
    entries += [*documentation_routes(app, entries), *page_routes()]
    register(app.router, entries, prefix="/v1")
    # The same routes without prefix: some clients are given the host with /v1, some without.
    register(app.router, entries, shown=False)
    return app


def _bare_app(ports: Mapping[str, MetricsPort]) -> FastAPI:
    """Return an application without routes, which closes the ports as it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for port in ports.values():
            port.close()
        # Where nobody takes spans the exporter tries for longer than an end may take.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await asyncio.to_thread(flush)

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


async def _alone(part: dict[str, Counts]) -> list[dict[str, Counts]]:
    """Return what the only ingress replica has counted."""
    return [part]
