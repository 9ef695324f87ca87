"""Which routes anybody may ask, and which only an operator: said where a route is made, of what it calls."""

import enum
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


class Audience(enum.Enum):
    """Who may ask a route."""

    ANYBODY = enum.auto()
    KEYS = enum.auto()
    OPERATORS = enum.auto()


def public(endpoint: Endpoint) -> Endpoint:
    """Let anybody ask: it shows no client's data and does no model's work."""
    endpoint.audience = Audience.ANYBODY  # type: ignore[attr-defined]
    return endpoint


def for_operators(endpoint: Endpoint) -> Endpoint:
    """Let nobody but operators ask: it tells of all clients."""
    endpoint.audience = Audience.OPERATORS  # type: ignore[attr-defined]
    return endpoint


def audience_of(endpoint: Any) -> Audience:
    """Return who may ask it: whoever has a key, where nothing else was said."""
    found: Audience = getattr(endpoint, "audience", Audience.KEYS)
    return found


class Audiences:
    """Who may ask what, of an application's routes, found as they are: whatever a path looks like."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        """Keep the routes."""
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._operators = [each for each in self._routes if audience_of(each.endpoint) is Audience.OPERATORS]

    def is_public(self, scope: Scope) -> bool:
        """Whether anybody may ask the route that a request takes."""
        matches = [(route.matches(scope)[0], route) for route in self._routes]
        for wanted in (Match.FULL, Match.PARTIAL):  # the path alone, where the method is a wrong one
            for match, route in matches:
                if match is wanted:
                    return audience_of(route.endpoint) is Audience.ANYBODY
        return False

    def is_for_operators(self, scope: Scope) -> bool:
        """Whether a request may take a route of the operators'."""
        return any(route.matches(scope)[0] is not Match.NONE for route in self._operators)
