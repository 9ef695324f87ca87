"""Requests from HAProxy straight to the application, past what Ray Serve does around each of them.

Serve's replica makes tasks, ids and a dozen numbers of its own for a request, which take longer than all that
we do for a short text, and which nobody reads here. So Serve takes one request, which tells where the
application is mounted, and those after it go past. What Serve asks a replica, and how one drains, stays as it
is: the server is Serve's too, and waits for what is under way.
"""

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from ray import serve
from ray.serve._private.constants import SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
from ray.serve._private.utils import generate_request_id
from ray.serve.context import ReplicaContext, _RequestContext, _serve_request_context
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OF_SERVE = "/-/"
REQUEST_ID = b"x-request-id"
# Serve reads ahead of an application, without a bound, to learn of clients that go; but not with this header.
NO_READ_AHEAD = (SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER.encode(), b"?1")
# Most requests have ended by then: whether the client of one has gone is looked for later.
UNWATCHED_SECONDS = 0.1


@dataclass(frozen=True)
class Mount:
    """An application and the prefix of its paths, for as long as Ray Serve leaves its replica as it is."""

    app: ASGIApp
    prefix: str
    replica: ReplicaContext
    places: asyncio.Semaphore

    @property
    def is_current(self) -> bool:
        """Whether nothing was deployed since: a deployment may move the application."""
        return serve.get_replica_context() is self.replica


def middlewares() -> list[Middleware]:
    """Return what Ray Serve asks for."""
    return [Middleware(Direct)]


class Direct:
    """Middleware around Ray Serve's own server: the application answers by itself."""

    mount: ClassVar[Mount | None] = None  # of this process

    def __init__(self, app: ASGIApp) -> None:
        """Wrap what Ray Serve does for each request."""
        self._serve = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, with the request's id in the answer as Ray Serve would put it there."""
        if scope["type"] != "http":
            await self._serve(scope, receive, send)
            return
        mount, path = self.mount, scope["path"]
        known = mount is not None and mount.is_current and path.startswith(mount.prefix)
        if mount is None or not known or path.startswith(OF_SERVE):
            scope["headers"] = [*scope["headers"], NO_READ_AHEAD]
            await self._serve(scope, receive, send)
            return
        named = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
        identity = named or generate_request_id().encode()
        context = _RequestContext(
            route=path, request_id=identity.decode("latin-1"), app_name=mount.replica.app_name
        )
        _serve_request_context.set(context)  # type: ignore[arg-type]  # declared by its default
        scope["root_path"] = mount.prefix

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID, identity)]
            await send(message)

        async with mount.places:
            await mount.app(scope, receive, with_id)


class Mounted:
    """Middleware of the application: says where it is mounted, and ends what nobody waits for any more."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; cancel the task that does where the client goes, once its body has been read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._say(scope)
        answered = False
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        begun: list[asyncio.TimerHandle | asyncio.Task[None]] = []

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not answered:
                task.cancel()

        def begin() -> None:
            begun.append(loop.create_task(watch()))

        async def read() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body") and not begun:
                begun.append(loop.call_later(UNWATCHED_SECONDS, begin))
            return message

        async def write(message: Message) -> None:
            nonlocal answered
            # With the answer's last byte `receive` says that the client has gone.
            answered = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self._app(scope, read, write)
        finally:
            for each in begun:
                each.cancel()

    def _say(self, scope: Scope) -> None:
        mount = Direct.mount
        if mount is None or not mount.is_current or mount.prefix != scope["root_path"]:
            replica = serve.get_replica_context()
            places = asyncio.Semaphore(replica._deployment_config.max_ongoing_requests)
            Direct.mount = Mount(scope["app"], scope["root_path"], replica, places)
