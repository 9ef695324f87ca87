"""The route table: what is asked how, by whom, what answers it, and what the OpenAPI document says of it."""

import enum
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments import errors
from deployments.api.encoding import ErrorResponse, error_body

REFERENCE = "#/components/schemas/{model}"
ERROR = REFERENCE.format(model=ErrorResponse.__name__)
Kinds = tuple[type[errors.EmbeddingError], ...]
# What a request with a body may be answered, whatever it asks for.
BODY: Kinds = (
    errors.InvalidKeyError,
    errors.ModelNotAllowedError,
    errors.RateLimitError,
    errors.InvalidRequestError,
    errors.MissingCapabilityError,
    errors.ModelNotFoundError,
    errors.DeadlineExceededError,
    errors.BodyTooLargeError,
    errors.UnsupportedEncodingError,
    errors.ModelUnavailableError,
    errors.EmbeddingError,
)
EMBEDDING: Kinds = (
    *BODY,
    errors.ContextLengthError,
    errors.TooManyInputsError,
    errors.QueueFullError,
    errors.NonFiniteEmbeddingError,
)
NICE = {
    "name": "nice",
    "in": "query",
    "description": "Let requests of people who wait go first.",
    "schema": {"type": "boolean", "default": False},
}


class Audience(enum.Enum):
    """Who may ask a route."""

    # It shows no client's data and does no model's work.
    ANYBODY = enum.auto()
    KEYS = enum.auto()
    # It tells of all clients.
    OPERATORS = enum.auto()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One route. `responses` are what `answers` returns; `document` is the rest that OpenAPI says of it.

    A handler takes the request, and its path's parameters by name.
    """

    path: str
    handler: Callable[..., Awaitable[Response]]
    summary: str = ""
    method: str = "GET"
    access: Audience = Audience.KEYS
    name: str | None = None
    responses: Mapping[int | str, Any] = field(default_factory=dict)
    bodies: tuple[type[BaseModel], ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    response_class: type[Response] = JSONResponse
    shown: bool = True


class OwnRoute(APIRoute):
    """A route, and who may ask it."""

    audience = Audience.KEYS


def register(router: APIRouter, entries: Iterable[Entry], prefix: str = "", shown: bool = True) -> None:
    """Make routes of the entries, in their order, under the prefix."""
    for each in entries:
        router.add_api_route(
            prefix + each.path,
            each.handler,
            methods=[each.method],
            route_class_override=OwnRoute,
            summary=each.summary or None,
            name=each.name,
            responses=dict(each.responses),
            openapi_extra={**(body(each.bodies) if each.bodies else {}), **each.document},
            response_class=each.response_class,
            include_in_schema=shown and each.shown,
        )
        route = router.routes[-1]
        assert isinstance(route, OwnRoute)
        route.audience = each.access
        if list(inspect.signature(each.handler).parameters) == ["request"]:
            route.app = _bare(each.handler)


def _bare(handler: Callable[[Request], Awaitable[Response]]) -> ASGIApp:
    """Return what answers with a handler that takes the request and nothing else.

    FastAPI looks for dependencies at each request otherwise, and keeps stacks for what it finds: a sixth of
    what our own code costs.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)

    return app


def audience_of(route: BaseRoute) -> Audience:
    """Return who may ask a route: whoever has a key, where nothing else was said."""
    found: Audience = getattr(route, "audience", Audience.KEYS)
    return found


class Audiences:
    """Who may ask what, of an application's routes, found as they are: whatever a path looks like."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        """Keep the routes."""
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._operators = [route for route in self._routes if audience_of(route) is Audience.OPERATORS]

    def is_public(self, scope: Scope) -> bool:
        """Whether anybody may ask the route that a request takes."""
        matches = [(route.matches(scope)[0], route) for route in self._routes]
        for wanted in (Match.FULL, Match.PARTIAL):  # the path alone, where the method is a wrong one
            for match, route in matches:
                if match is wanted:
                    return audience_of(route) is Audience.ANYBODY
        return False

    def is_for_operators(self, scope: Scope) -> bool:
        """Whether a request may take a route of the operators'."""
        return any(route.matches(scope)[0] is not Match.NONE for route in self._operators)


# --- what the document says of a route -------------------------------------------------------------


def answers(
    example: Any, *kinds: type[errors.EmbeddingError], model: Any = None, raw: bool = False
) -> dict[int | str, Any]:
    """Return a route's `responses`: the answer with an example, or `raw`; each kind of error with one."""
    ok: dict[str, Any] = {"content": {"application/json": {"example": example}}}
    if raw:
        ok["content"]["application/octet-stream"] = {
            "schema": {"type": "string", "format": "binary"},
            "example": "the bytes of each vector, one after the other",
        }
    if model is not None:
        ok["model"] = model
    found: dict[int | str, Any] = {200: ok}
    for kind in kinds:
        status = int(kind.status)
        shown = found.setdefault(
            status,
            {
                "description": kind.status.phrase if hasattr(kind.status, "phrase") else "",
                # By name: FastAPI builds a validator for each `model`, of each status of each route.
                "content": {"application/json": {"schema": {"$ref": ERROR}, "examples": {}}},
            },
        )
        message = (kind.__doc__ or "").splitlines()[0]
        examples = shown["content"]["application/json"]["examples"]
        examples[kind.code] = {"summary": message, "value": orjson.loads(error_body(kind(message)))}
    return found


def plain(example: str) -> dict[int | str, Any]:
    """Return a route's `responses` for an answer in plain text."""
    return {200: {"content": {"text/plain": {"example": example, "schema": {"type": "string"}}}}}


def body(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    """Return a route's `openapi_extra` for a body that is one of the models."""
    schemas = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    examples = {
        str(number): {"summary": model.__doc__, "value": example}
        for number, (model, example) in enumerate(
            (model, example) for model in models for example in _examples(model)
        )
    }
    content = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}, "examples": examples}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


@functools.cache
def _examples(model: type[BaseModel]) -> list[Any]:
    examples: list[Any] = model.model_json_schema().get("examples", [])
    return examples
