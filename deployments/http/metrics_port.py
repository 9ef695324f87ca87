"""A worker's own metrics on the port that its file names.

One ingress replica of each node opens the port; the others stand by, and one of them takes over when it ends.
A port that something else holds is logged and shown by `/ready`.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.config.worker import Worker
from deployments.dispatch.offload import offload
from deployments.errors import IncompleteError
from deployments.front.address import bracketed, family_of
from deployments.metrics import CONTENT_TYPE, merge

logger = logging.getLogger("ray.serve")

STAND_BY_SECONDS = 2.0
OWNER_PATH = "/owner"


class MetricsPort:
    """Serves one worker's part of the metrics that `gather` returns."""

    def __init__(self, worker: Worker, host: str, gather: Callable[[], Awaitable[list[bytes]]]) -> None:
        """Remember the address; `open` opens it."""
        self.problem: str | None = None
        self._worker = worker.name
        self._task: asyncio.Task[None] | None = None
        self._names = {worker.name, *worker.queue.models}
        self._host = host
        self._port = worker.monitoring.metrics_port
        self._gather = gather

    def is_for(self, worker: Worker) -> bool:
        """Whether a worker file, perhaps a later one, wants this very port."""
        names = {worker.name, *worker.queue.models}
        return (self._worker, self._names, self._port) == (worker.name, names, worker.monitoring.metrics_port)

    def open(self) -> None:
        """Serve from now on, or stand by."""
        self._task = asyncio.get_running_loop().create_task(self.run())

    def close(self) -> None:
        """Serve no more."""
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Serve until cancelled; stand by while the port is taken."""
        while True:
            try:
                listener = socket.create_server((self._host, self._port), family=family_of(self._host))
            except OSError as error:
                await self._explain(error)
                await asyncio.sleep(STAND_BY_SECONDS)
                continue
            self.problem = None
            app = Starlette(
                routes=[Route("/", self._show), Route("/metrics", self._show), Route(OWNER_PATH, self._own)]
            )
            config = uvicorn.Config(app, log_config=None, lifespan="off", access_log=False)
            server = uvicorn.Server(config)
            try:
                await server.serve(sockets=[listener])
            finally:  # uvicorn leaves its sockets open when it is cancelled
                for each in server.servers:
                    each.close()

    async def _show(self, _: Request) -> Response:
        try:
            texts = await self._gather()
            text = await offload(sum(map(len, texts)), merge, texts, self._names)
        except IncompleteError as error:
            return Response(error.message, error.status, media_type="text/plain")
        return Response(text, media_type=CONTENT_TYPE)

    async def _own(self, _: Request) -> Response:
        """Say whose port this is, to those who stand by."""
        return Response(self._worker, media_type="text/plain")

    async def _explain(self, error: OSError) -> None:
        """Say once who holds the port, unless it is one of us."""
        if await self._is_ours():
            self.problem = None
            return
        problem = f"metrics_port {self._port} can't be opened: {error.strerror}"
        if problem != self.problem:
            logger.error("worker %s: %s", self._worker, problem)
        self.problem = problem

    async def _is_ours(self) -> bool:
        try:
            async with httpx.AsyncClient(timeout=STAND_BY_SECONDS, trust_env=False) as client:
                response = await client.get(f"http://{bracketed(self._host)}:{self._port}{OWNER_PATH}")
        except httpx.HTTPError:
            return False
        return bool(response.text == self._worker)
