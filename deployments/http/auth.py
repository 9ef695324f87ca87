"""Who may come in: a key for everything but a short list of paths, decided before anything is routed."""

from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import EmbeddingError, InvalidKeyError, OperatorOnlyError
from deployments.http.table import Audiences
from deployments.keys.file import Key
from deployments.keys.rates import Rates
from deployments.keys.ring import KeyRing

# The key that a request came with stands in its scope under this name.
SCOPE_KEY = "embedding.key"
HEADERS = (b"authorization", b"x-api-key", b"api-key")
BEARER = b"bearer "


@dataclass(frozen=True)
class Access:
    """The keys of this cluster, and what they may use up."""

    ring: KeyRing
    rates: Rates


def key_of(scope: Scope) -> Key | None:
    """Return the key that a request came with; None where there are no keys, or none is needed."""
    key: Key | None = scope.get(SCOPE_KEY)
    return key


def secret_in(scope: Scope) -> bytes:
    """Return the plaintext that a request carries; empty where it carries none.

    `Authorization: Bearer` goes before `x-api-key`, and that before `api-key`.
    """
    headers: dict[bytes, bytes] = {name: value for name, value in scope["headers"] if name in HEADERS}
    authorization = headers.get(b"authorization", b"")
    if authorization[: len(BEARER)].lower() == BEARER:
        return authorization[len(BEARER) :].strip()
    return headers.get(b"x-api-key", b"") or headers.get(b"api-key", b"")


class Auth:
    """Middleware: refuses a request whose path needs a key where it has no valid one.

    The decision is made on the route that will be taken: what isn't a public one needs a key.
    """

    def __init__(self, app: ASGIApp, access: Access, refuse: Callable[[EmbeddingError], Response]) -> None:
        """Wrap an application; `refuse` makes an answer of an error."""
        self._app = app
        self._access = access
        self._refuse = refuse
        self._audiences: Audiences | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through with its key, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        secret = secret_in(scope)
        key = self._access.ring.find(secret) if secret else None
        if (error := self._objection(scope, secret, key)) is not None:
            await self._refuse(error)(scope, receive, send)
            return
        scope[SCOPE_KEY] = key
        if key is not None and (key.requests_per_minute or key.tokens_per_minute):
            send = self._with_limits(send, key)
        await self._app(scope, receive, send)

    def _objection(self, scope: Scope, secret: bytes, key: Key | None) -> EmbeddingError | None:
        """Return why a request may not go on; None where it may."""
        if self._audiences is None:  # by now all routes are there
            self._audiences = Audiences(scope["app"].routes)
        if key is None:
            if self._audiences.is_public(scope):
                return None
            what = "this key isn't valid" if secret else "a key is needed: Authorization: Bearer KEY"
            return InvalidKeyError(what)
        if not key.operator and self._audiences.is_for_operators(scope):
            return OperatorOnlyError("this key may not read the metrics; an operator's may")
        return None

    def _with_limits(self, send: Send, key: Key) -> Send:
        """Put into each answer's headers what is left of the key's limits."""

        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._access.rates.headers(key))
            await send(message)

        return wrapped
