"""The one place where errors become answers."""

import logging
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.encoding import error_body
from deployments.errors import (
    EmbeddingError,
    HarmfulInputError,
    InvalidKeyError,
    InvalidRequestError,
    MethodNotAllowedError,
    RouteNotFoundError,
    UnsupportedEncodingError,
)
from deployments.http.edge.addresses import meant, methods_of, other_method, other_path
from deployments.http.edge.content import ACCEPTED

logger = logging.getLogger("ray.serve")

CLIENT_CLOSED_REQUEST = 499  # nginx's name for it: nobody reads this answer


def json_response(printed: bytes | str, status: int = 200) -> Response:
    """Return what is JSON already as an answer."""
    return Response(printed, status, media_type="application/json")


def as_json(content: Any, status: int = 200) -> Response:
    """Return plain data as an answer."""
    return json_response(orjson.dumps(content), status)


def error_response(error: EmbeddingError) -> Response:
    """Return the error as the contract's envelope."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    if isinstance(error, InvalidKeyError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, UnsupportedEncodingError):
        headers["accept-encoding"] = ACCEPTED
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


async def http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return other_path(request) or error_response(RouteNotFoundError(meant(request)))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(methods_of(request))
        response = other_method(request) or error_response(
            MethodNotAllowedError(f"this path takes {allowed}")
        )
        # Starlette names the methods of the first route with that path alone.
        response.headers["allow"] = allowed
        return response
    response = error_response(InvalidRequestError(str(error.detail)))
    response.headers.update(error.headers or {})
    return response
