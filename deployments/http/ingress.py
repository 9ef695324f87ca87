"""The HTTP side: routes, bodies, errors. One FastAPI application, every route at `/` and at `/v1`.

Ray Serve takes or makes the `x-request-id` and returns it; that is left to it.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.batches import BatchBody
from deployments.api.envelope import error_body
from deployments.batches.store import BatchPlace
from deployments.config.worker import Worker
from deployments.errors import (
    EmbeddingError,
    HarmfulInputError,
    IncompleteError,
    InvalidKeyError,
    InvalidRequestError,
    MethodNotAllowedError,
    ModelNotAllowedError,
    ModelNotFoundError,
    OperatorOnlyError,
    RouteNotFoundError,
)
from deployments.http.auth import Access, Auth, key_of
from deployments.batches.routes import add_batch_routes
from deployments.batches.serving import BatchAccess, BatchServing
from deployments.transport.broadcast import answer_of, broadcast
from deployments.dispatch.catalog import Catalog
from deployments.http.documentation import add_documentation, answers, plain
from deployments.http.metrics_port import MetricsPort
from deployments.dispatch.offload import offload
from deployments.http.pharia import PhariaServing
from deployments.http.access import for_operators, public
from deployments.keys.rates import Grant, LeasedRates, LocalRates
from deployments.http.routes import BODIES, add_embedding_routes, add_pharia_routes, add_usage_route
from deployments.http.serving import Serving
from deployments.front.spare import add_spare, http_options
from deployments.keys.usage import Counts
from deployments.dispatch.workers import Workers
from deployments.keys.file import KeySource, require_keys
from deployments.metrics import CONTENT_TYPE, Metrics, merge, states_text

logger = logging.getLogger("ray.serve")

# The version of the inference API that we speak; clients ask for major 1, 1.19.0 or later.
API_VERSION = "1.19.0"
CLIENT_CLOSED_REQUEST = 499  # nginx's name for it: nobody reads this answer

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

# How long one ingress replica waits for the others' metrics.
GATHER_SECONDS = 5.0
# Returns the metrics of every ingress replica, as text.
Gather = Callable[[], Awaitable[list[bytes]]]
# Returns what a key has used, of every ingress replica.
GatherUsage = Callable[[str], Awaitable[list[dict[str, Counts]]]]


@dataclass(frozen=True)
class Admission:
    """Who may come in: the keys, or nobody but this machine, or anybody.

    `rates` is the handle of the central buckets where there are several ingress replicas.
    """

    keys: KeySource = field(default_factory=KeySource)
    insecure: bool = False
    rates: DeploymentHandle[Any] | None = None

    def access(self) -> Access | None:
        """Return the ring of keys and what they may use up; None without keys. Raises ConfigError."""
        ring = self.keys.ring()
        if ring is None:
            return None
        handle = self.rates
        if handle is None:
            return Access(ring, LocalRates())

        async def take(*arguments: Any) -> Grant:
            grant: Grant = await answer_of(handle.take.remote(*arguments))
            return grant

        return Access(ring, LeasedRates(take))


@dataclass(frozen=True)
class BatchDesk:
    """Where files and batches are, the largest file in bytes, and the handle of the runner."""

    place: BatchPlace
    max_file_bytes: int
    runner: DeploymentHandle[Any]

    def access(self) -> BatchAccess:
        """Open the storage. Raises ConfigError."""
        waking: set[asyncio.Task[None]] = set()  # else a task may be collected before its end

        async def wake() -> None:
            # One that is just starting anew looks by itself.
            with contextlib.suppress(RayError, DeploymentUnavailableError):
                await self.runner.wake.remote()

        def wake_later() -> None:
            task = asyncio.create_task(wake())
            waking.add(task)
            task.add_done_callback(waking.discard)

        return BatchAccess(self.place.open(), self.max_file_bytes, wake_later)


class Ingress:
    """The Ray Serve deployment that speaks HTTP."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle[Any]],
        max_body_bytes: int,
        metrics_host: str,
        admission: Admission = Admission(),
        batches: BatchDesk | None = None,
    ) -> None:
        """Serve nothing until `reconfigure` names the workers; `handles` are those bound with the ingress.

        Raises ConfigError where the keys can't be read.
        """
        self._admission = admission
        self._access = admission.access()
        self._batches = batches
        self._metrics_host = metrics_host
        self._ports: dict[str, MetricsPort] = {}
        rates = self._access.rates if self._access else None
        self._serving = Serving(Catalog({}), Metrics(), max_body_bytes, rates)
        self._workers = Workers(handles, self._serving)
        self._files: dict[str, dict[str, Any]] = {}

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Take over the worker files as they are now. Ray Serve calls it at the start and at each deployment.

        `config["workers"]` holds each worker file as plain data, and `config["packages"]` what tells the
        model packages apart, by the worker's name.
        Raises ConfigError where other machines could reach us without a key.
        """
        require_keys(self._admission.keys, self._admission.insecure, (await http_options()).host)
        workers = self._workers.take(config)
        self._files = config["workers"]
        self._open_ports(workers.values())
        self._packages = {
            name: (worker.queue.version, config["packages"][name]) for name, worker in workers.items()
        }

    async def packages(self) -> dict[str, tuple[int | str, str]]:
        """Return each worker's version and package; the next deployment compares with them."""
        return self._packages

    async def workers(self) -> dict[str, dict[str, Any]]:
        """Return each worker file as plain data, without secrets; jobs ask for it."""
        return self._files

    def _open_ports(self, workers: Iterable[Worker]) -> None:
        """Open the workers' metrics ports, and close those that no file names any more."""
        wanted = {worker.name: worker for worker in workers if worker.monitoring.metrics_port}
        for name, port in list(self._ports.items()):
            if name not in wanted or not port.is_for(wanted[name]):
                self._ports.pop(name).close()
        for name, worker in wanted.items():
            if name not in self._ports:
                self._ports[name] = MetricsPort(worker, self._metrics_host, self._gather)
                self._ports[name].open()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Ray Serve asks for it once the constructor is done."""
        batches = self._batches.access() if self._batches else None
        app = make_app(self._serving, self._gather, self._ports, self._access, self._gather_usage, batches)
        add_spare(app)
        return app

    async def usage(self, key: str) -> dict[str, Counts]:
        """Return what a key has used of this ingress replica; the others ask for it."""
        return self._serving.usage.of(key)

    async def _gather_usage(self, key: str) -> list[dict[str, Counts]]:
        """Return what a key has used of all ingress replicas, and what its batches have."""
        return [*await ask_ingresses("usage", key), *await self._ask_runner("usage", key)]

    async def metrics(self) -> bytes:
        """Return this ingress replica's metrics as text; the others ask for it."""
        return self._serving.metrics.text()

    async def _gather(self) -> list[bytes]:
        """Return the metrics of all ingress replicas and engines, and Ray Serve's view: any may be asked."""
        application = serve.get_replica_context().app_name
        catalog = self._serving.catalog
        texts, batches, states, *engines = await asyncio.gather(
            ask_ingresses("metrics"),
            self._ask_runner("metrics"),
            asyncio.to_thread(replica_states, application),
            *(dispatch.engine_metrics(GATHER_SECONDS) for dispatch in catalog.dispatches.values()),
        )
        known = {name: states.get(name, {}) for name in catalog.dispatches}
        return [*texts, *batches, states_text(known), *itertools.chain.from_iterable(engines)]

    async def _ask_runner(self, method: str, *arguments: Any) -> list[Any]:
        """Return what the runner of batches answers; nothing where there is none, or none answers."""
        if self._batches is None:
            return []
        try:
            async with asyncio.timeout(GATHER_SECONDS):
                return [await answer_of(getattr(self._batches.runner, method).remote(*arguments))]
        except (TimeoutError, RayError, DeploymentUnavailableError):
            return []


async def ask_ingresses(method: str, *arguments: Any) -> list[Any]:
    """Call a method of all ingress replicas. Raises IncompleteError where one doesn't answer."""
    context = serve.get_replica_context()
    ourselves = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        return await broadcast(ourselves, method, *arguments, seconds=GATHER_SECONDS)
    except TimeoutError:
        # A sum without it would look to Prometheus like counters that begin anew.
        raise IncompleteError("an ingress replica doesn't answer", None, GATHER_SECONDS) from None


def replica_states(application: str) -> dict[str, dict[str, int]]:
    """Return how many replicas of each deployment are in which state, as Ray Serve's controller sees it."""
    status = serve.status().applications.get(application)
    deployments = status.deployments if status is not None else {}
    return {name: {str(s): n for s, n in d.replica_states.items()} for name, d in deployments.items()}


def make_app(  # noqa: PLR0913, PLR0917 - each is one thing that an application may have
    serving: Serving,
    gather: Gather,
    ports: Mapping[str, MetricsPort] | None = None,
    access: Access | None = None,
    gather_usage: GatherUsage | None = None,
    batches: BatchAccess | None = None,
) -> FastAPI:
    """Return the application over a catalog of models, and the workers' own metrics ports.

    Without `access` there are no keys, and anybody who reaches it may ask. Without `batches` there is no
    storage for them.
    """
    ports = {} if ports is None else ports

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for port in ports.values():
            port.close()

    app = FastAPI(
        title="Embedding cluster",
        description="Embeddings as OpenAI, PhariaInference, Cohere and text-embeddings-inference give them.",
        version=API_VERSION,
        openapi_url=None,  # both are among the routes, at either prefix
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name the host that the client made up
        lifespan=lifespan,
    )
    app.add_middleware(Errors)
    if access is not None:

        def refuse(error: EmbeddingError) -> Response:
            serving.metrics.denied.labels(error.code).inc()
            return error_response(error)

        # Outside of the errors: an answer that refuses says what is left of the key's limits too.
        app.add_middleware(Auth, access=access, refuse=refuse)
    app.add_exception_handler(HTTPException, _http_exception)
    router = _routes(serving, gather, ports)
    if batches is not None:
        add_batch_routes(router, BatchServing(batches, serving))
    if access is not None:
        add_usage_route(router, gather_usage or (lambda key: _alone(serving.usage.of(key))), _json)
    add_documentation(app, router, BODIES if batches is None else (*BODIES, BatchBody))
    app.include_router(router, prefix="/v1")
    # The same routes without prefix: some clients are given the host with /v1, some without.
    app.include_router(router, include_in_schema=False)
    return app


def _routes(serving: Serving, gather: Gather, ports: Mapping[str, MetricsPort]) -> APIRouter:
    router = APIRouter()
    catalog = serving.catalog

    async def models(request: Request) -> Response:
        """List the models."""
        return _json({"object": "list", "data": [each.listing() for each in serving.visible(request)]})

    async def model(request: Request, name: str) -> Response:
        """Show one model."""
        return _json(serving.find(request, name).listing())

    @public
    async def health() -> Response:
        """Say that this process is alive."""
        return _json({"status": "ok"})

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
        return _json(body, 200 if everything else 503)

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
    add_pharia_routes(router, PhariaServing(serving), _json)
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


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


# --- errors: the one place where they become answers ----------------------------------------------


def error_response(error: EmbeddingError) -> Response:
    """Return the error as the contract's envelope."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    if isinstance(error, InvalidKeyError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, HarmfulInputError):
        headers["x-should-retry"] = "false"  # OpenAI's clients try every 500 again otherwise
    return Response(error_body(error), error.status, headers, "application/json")


class Errors:
    """Middleware: whatever a route raises becomes JSON, and never shows a traceback or the input."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the error, unless the answer has begun."""
        begun = False

        async def watch(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            if not begun:
                await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            if not isinstance(error, EmbeddingError):
                # The traceback alone: its text and locals may hold what the client sent.
                logger.error("internal error: %s", type(error).__name__, exc_info=_bare(error))
                error = EmbeddingError("internal error")
            await error_response(error)(scope, receive, send)


def _bare(error: Exception) -> Exception:
    """Return an error of the same place without its text."""
    return RuntimeError(type(error).__name__).with_traceback(error.__traceback__)


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method."""
    assert isinstance(error, HTTPException)
    kind: Callable[[str], EmbeddingError] = {
        404: RouteNotFoundError,
        405: MethodNotAllowedError,
    }.get(error.status_code, InvalidRequestError)
    response = error_response(kind(str(error.detail)))
    response.headers.update(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # Starlette names the methods of the first route with that path alone.
        response.headers["allow"] = ", ".join(_methods(request))
    return response


def _methods(request: Request) -> list[str]:
    """Return what the path of a request may be asked with."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    fitting = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in fitting for method in route.methods or ()})
