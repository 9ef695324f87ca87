"""The HTTP side: routes, bodies, errors. One FastAPI application, every route at `/` and at `/v1`.

Ray Serve takes or makes the `x-request-id` and returns it; that is left to it.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api import openai
from deployments.api.encoding import truncate
from deployments.config.plan import WorkerPlan
from deployments.errors import (
    BodyTooLargeError,
    DeadlineExceededError,
    EmbeddingError,
    InvalidRequestError,
    MethodNotAllowedError,
    RouteNotFoundError,
)
from deployments.gateway.catalog import Catalog
from deployments.gateway.dispatch import Dispatch
from deployments.gateway.meter import RetryBudget
from deployments.gateway.prepare import prepare
from deployments.gateway.work import Lane

logger = logging.getLogger("ray.serve")

# The version of the inference API that we speak; clients ask for major 1, 1.19.0 or later.
API_VERSION = "1.19.0"
# Ray Serve's own header: a client may lower its request's deadline, never raise it.
TIMEOUT_HEADER = "x-request-timeout-seconds"
TIMEOUT_MARGIN = 0.05
# Which model it is for, and so its deadline, is known once the body is there.
BODY_SECONDS = 30.0
CLIENT_CLOSED_REQUEST = 499  # nginx's name for it: nobody reads this answer


class Ingress:
    """The Ray Serve deployment that speaks HTTP."""

    def __init__(
        self,
        plans: tuple[WorkerPlan, ...],
        handles: Mapping[str, DeploymentHandle[Any]],
        max_body_bytes: int,
    ) -> None:
        """Make one dispatch for each worker; `handles` are by the worker's name."""
        budget = RetryBudget()
        catalog = Catalog({plan.name: Dispatch(plan, handles[plan.name], budget) for plan in plans})
        self._app = make_app(catalog, max_body_bytes)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Ray Serve asks for it once the constructor is done."""
        return self._app


def make_app(catalog: Catalog, max_body_bytes: int) -> FastAPI:
    """Return the application over a catalog of models."""
    app = FastAPI(
        title="Embedding cluster",
        description="OpenAI-compatible embeddings.",
        version=API_VERSION,
        openapi_url=None,  # both are among the routes, at either prefix
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Errors)
    app.add_exception_handler(HTTPException, _http_exception)
    router = _routes(catalog, max_body_bytes)
    _add_documentation(app, router)
    app.include_router(router, prefix="/v1")
    # The same routes without prefix: some clients are given the host with /v1, some without.
    app.include_router(router, include_in_schema=False)
    return app


def _routes(catalog: Catalog, max_body_bytes: int) -> APIRouter:
    router = APIRouter()

    async def embeddings(request: Request) -> Response:
        """Embed one text or many; the answer keeps their order."""
        arrival = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(arrival + min(BODY_SECONDS, wanted_seconds(request))):
                body = await read_body(request, max_body_bytes)
        except TimeoutError:
            raise DeadlineExceededError("the body took too long to arrive", "body") from None
        wanted = openai.parse_request(body)
        served = catalog.find_embedder(wanted.model)
        limits = served.dispatch.plan.worker.limits
        deadline = arrival + min(limits.request_timeout_s, wanted_seconds(request))
        card, tokenizer = await served.dispatch.model(deadline)
        batch = await prepare(wanted, served.model.embedding_task, limits, card, tokenizer)
        lane = Lane.BULK if request.query_params.get("nice") == "true" else Lane.INTERACTIVE
        vectors = await served.dispatch.embed(batch, deadline, lane, caller_of(request))
        vectors = truncate(vectors, wanted.dimensions)
        answer = openai.answer(vectors, wanted.model, wanted.encoding_format, batch.tokens)
        return Response(answer, media_type="application/json")

    async def models() -> Response:
        """List the models."""
        return _json({"object": "list", "data": catalog.listing()})

    async def model(name: str) -> Response:
        """Show one model."""
        return _json(catalog.find(name).listing())

    async def health() -> Response:
        """Say that this process is alive."""
        return _json({"status": "ok"})

    async def ready() -> Response:
        """Say for each worker whether a replica answers; 200 when all do, else 503."""
        states = await asyncio.gather(*(d.state() for d in catalog.dispatches.values()))
        everything = all(state["ready"] for state in states)
        body = {"ready": everything, "models": states}
        return _json(body, 200 if everything else 503)

    async def version() -> Response:
        """Give the version of the API as plain text."""
        return Response(API_VERSION, media_type="text/plain")

    problem = {"model": openai.ErrorResponse}
    statuses: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 404, 408, 413, 500, 503), problem)
    schema = openai.EmbeddingRequestBody.model_json_schema()
    router.add_api_route(
        "/embeddings",
        embeddings,
        methods=["POST"],
        responses={200: {"model": openai.EmbeddingResponse}, **statuses},
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
    )
    router.add_api_route("/models", models)
    router.add_api_route("/models/{name:path}", model, responses={404: problem})
    router.add_api_route("/health", health)
    router.add_api_route("/ready", ready, responses={503: {"description": "Not every model is ready"}})
    router.add_api_route("/version", version)
    return router


def wanted_seconds(request: Request) -> float:
    """Return how long the client is willing to wait; infinity where it doesn't say.

    A little less than it says: it should read our answer rather than Ray Serve's, or give up by itself.
    """
    try:
        seconds = float(request.headers.get(TIMEOUT_HEADER, ""))
    except ValueError:
        return math.inf
    return seconds * (1 - TIMEOUT_MARGIN) if seconds > 0 else math.inf


def caller_of(request: Request) -> str:
    """Return what tells callers apart for taking turns: the key, else the address. Never logged."""
    for header in ("authorization", "x-api-key", "api-key"):
        if value := request.headers.get(header):
            return value
    return request.client.host if request.client else ""


def _add_documentation(app: FastAPI, router: APIRouter) -> None:
    async def openapi_json() -> Response:
        return _json(app.openapi())

    async def docs(request: Request) -> Response:
        prefix = request.url.path.removesuffix("/docs")
        return get_swagger_ui_html(openapi_url=f"{prefix}/openapi.json", title=app.title)

    router.add_api_route("/openapi.json", openapi_json, include_in_schema=False)
    router.add_api_route("/docs", docs, include_in_schema=False)


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """Return the whole body. Raises BodyTooLargeError before more than the limit is read."""
    too_large = BodyTooLargeError(f"the body is over the limit of {max_body_bytes} bytes", "body")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_body_bytes:
        raise too_large
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequestError("compressed bodies aren't accepted", "content-encoding")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_body_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


# --- errors: the one place where they become answers ----------------------------------------------


def error_response(error: EmbeddingError) -> Response:
    """Return the error as the contract's envelope."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    return Response(openai.error_body(error), error.status, headers, "application/json")


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


async def _http_exception(_: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method."""
    assert isinstance(error, HTTPException)
    kind: Callable[[str], EmbeddingError] = {
        404: RouteNotFoundError,
        405: MethodNotAllowedError,
    }.get(error.status_code, InvalidRequestError)
    response = error_response(kind(str(error.detail)))
    response.headers.update(error.headers or {})
    return response
