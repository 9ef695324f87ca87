"""Addresses that no route has, methods that a route hasn't: served where that is safe, else what was meant.

All of it happens after the router has given up, and after the key was looked at: a request that is served
here has passed as one that needs a key.
"""

import difflib
import re
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from deployments.http.table import Audience, audience_of

# How base addresses are written that end in what clients put there themselves.
SPELLINGS = (
    (re.compile("/{2,}"), "/"),
    (re.compile("^/openai/v1(?=/)"), "/v1"),
    (re.compile("^(/v1)+(?=/)"), "/v1"),
    (re.compile("(?<=.)/+$"), ""),
    (re.compile("^/v1$"), "/v1/"),
)
# What has no name of its own, and is nobody's slip of the pen.
ROOTS = ("/", "/v1/")
# No client writes more than that before a route of ours.
MAX_PARTS = 12


class Again(Response):
    """Answers as another method, or another path, of the same application does."""

    def __init__(self, request: Request, **changes: str) -> None:
        """Keep what is to be asked instead; a route must take it."""
        super().__init__()
        self._router, self._changes = request.app.router, changes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the router again."""
        await self._router({**scope, **self._changes}, receive, send)


def other_method(request: Request) -> Response | None:
    """Return what answers a HEAD: as a GET, whose body the server leaves out (RFC 9110, 9.3.2)."""
    if request.method != "HEAD" or _route(request, method="GET") is None:
        return None
    return Again(request, method="GET")


def other_path(request: Request) -> Response | None:
    """Return what answers a path that is written in another way, where whoever has a key may ask it."""
    prefix, asked = _path(request)
    path = asked
    for pattern, plain in SPELLINGS:
        path = pattern.sub(plain, path)
    method = "GET" if request.method == "HEAD" else request.method
    changes = {"path": prefix + path, "method": method}
    route = None if path == asked else _route(request, **changes)
    if route is None or audience_of(route) is Audience.OPERATORS:
        return None
    return Again(request, **changes)


def methods_of(request: Request) -> list[str]:
    """Return what the path of a request may be asked with."""
    routes = [route for route in _routes(request) if route.matches(request.scope)[0] is not Match.NONE]
    found = {method for route in routes for method in route.methods or ()}
    return sorted(found | {"HEAD"} if "GET" in found else found)


def meant(request: Request) -> str:
    """Return what to tell whoever asks a path that no route has: the route that was meant, if one is near."""
    named = [route for route in _routes(request) if "{" not in route.path and route.path not in ROOTS]
    # Of several with one path, that which takes the same method.
    named.sort(key=lambda route: request.method in (route.methods or ()))
    shown = {route.path: route for route in named}
    parts = _path(request)[1].lower().split("/")[:MAX_PARTS]
    ends = ["/" + "/".join(part for part in parts[begin:] if part) for begin in range(len(parts))]
    near = next((end for end in ends if end in shown), None)
    if near is None:
        near = next(iter(difflib.get_close_matches(ends[0][:99], shown, 1, 0.8)), None)
    if near is None:
        return "no route has this path; /docs shows them all"
    (method, *_) = sorted(shown[near].methods or ())
    return f"no route has this path; did you mean {method} {near}?"


def _path(request: Request) -> tuple[str, str]:
    """Return the prefix of all routes, and the path behind it."""
    path, prefix = request.scope["path"], request.scope.get("root_path", "")
    return (prefix, path[len(prefix) :]) if path.startswith(prefix) else ("", path)


def _routes(request: Request) -> Iterator[Route]:
    return (route for route in request.app.routes if isinstance(route, Route))


def _route(request: Request, **changes: str) -> Route | None:
    """Return the route that takes a request with these changes."""
    scope = {**request.scope, **changes}
    return next((route for route in _routes(request) if route.matches(scope)[0] is Match.FULL), None)
