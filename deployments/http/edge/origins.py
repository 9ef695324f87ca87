"""Pages of other origins: which may ask from a browser, and read the answers (CORS)."""

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from deployments.errors import InvalidRequestError
from deployments.http.errors import error_response

METHODS = ("GET", "HEAD", "POST", "DELETE")
# What a page's client reads of an answer besides its body.
LIMITS = ("limit", "remaining", "reset")
EXPOSED = (
    *("x-request-id", "retry-after", "metadata"),
    *(f"x-ratelimit-{what}-{kind}" for what in LIMITS for kind in ("requests", "tokens")),
)


class Origins(CORSMiddleware):
    """Starlette's middleware, whose refusals are JSON as all others are."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer what a browser asks before it asks."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        failed = bytes(response.body).decode().rpartition(" CORS ")[2]
        if "origin" in failed.split(", "):
            told = "this origin may not ask here; `allow_origins` names those that may"
        else:
            told = (
                f"pages may ask by {', '.join(METHODS)}, from the same kind of network; wrong is the {failed}"
            )
        return error_response(InvalidRequestError(told))


def add_origins(app: Starlette, origins: Sequence[str]) -> None:
    """Let pages of these origins ask; a browser's preflights are answered before a key is looked for."""
    if origins:
        app.add_middleware(
            Origins,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),
            expose_headers=EXPOSED,
        )
