"""A front in reserve, for as long as Ray Serve's own proxy on this node is gone.

Ray Serve takes up to half a minute to put a dead proxy's successor in its place; clients give up earlier. An
ingress replica speaks HTTP as well as the proxy does: it opens the same port as soon as nobody listens there,
and leaves it to the next proxy. HAProxy has a guard of its own.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions
from ray.serve.schema import ProxyStatus
from starlette.applications import Starlette
from starlette.types import ASGIApp

logger = logging.getLogger("ray.serve")

# Clients try again half a second after their connection broke.
LOOK_SECONDS = 0.1
ASK_SECONDS = 1.0


def add_spare(app: Starlette) -> None:
    """Let the application stand in for this node's proxy for as long as it lives."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Any]:
        async with inner(app) as state:
            watching = asyncio.create_task(watch(app))
            yield state
            watching.cancel()

    if not RAY_SERVE_ENABLE_HA_PROXY:
        app.router.lifespan_context = lifespan


async def watch(app: ASGIApp) -> None:
    """Stand in for this node's proxy whenever it is gone, until cancelled."""
    options = await http_options()
    node = ray.get_runtime_context().get_node_id()
    while options.host is not None:
        proxy = await next_proxy(node)
        await until_free(options.host, options.port)
        logger.warning("nobody listens on port %d: serving it until there is a proxy again", options.port)
        loop = asyncio.get_running_loop()
        serving, server = await start_asgi_http_server(
            app, options, event_loop=loop, enable_so_reuseport=True
        )
        try:
            await next_proxy(node, proxy)
        finally:
            server.should_exit = True  # what is being answered is answered first
            await serving


async def http_options() -> HTTPOptions:
    """Return where Ray Serve's front listens; its host is None where it has no front."""
    options: HTTPOptions = await controller().get_http_config.remote()
    return options


async def next_proxy(node: str, last: str = "") -> str:
    """Wait for a proxy on the node that isn't the last one, and return its actor's id."""
    while True:
        with contextlib.suppress(RayActorError):  # a controller that dies comes back
            proxy = await controller().get_proxy_details.remote(node)
            if proxy is not None and proxy.status == ProxyStatus.HEALTHY and proxy.actor_id != last:
                return str(proxy.actor_id)
        await asyncio.sleep(ASK_SECONDS)


def controller() -> Any:
    """Return Ray Serve's controller."""
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


async def until_free(host: str, port: int) -> None:
    """Wait until nobody listens on a port."""
    while not is_free(host, port):  # noqa: ASYNC110 - nobody tells us
        await asyncio.sleep(LOOK_SECONDS)


def is_free(host: str, port: int) -> bool:
    """Return whether nobody listens on a port. Whoever does notices nothing."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
