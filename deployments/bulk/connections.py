"""One loop and one connection to each worker, for all of the process."""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray import serve

from deployments.bulk.connection import Connection
from deployments.bulk.patience import FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS
from deployments.config.worker import INGRESS_NAME, Worker
from deployments.dispatch.catalog import Served
from deployments.dispatch.dispatch import Dispatch
from deployments.errors import (
    EmbeddingError,
    ModelNotFoundError,
    ModelUnavailableError,
)
from deployments.metrics import Metrics
from deployments.transport.applications import applications
from deployments.transport.broadcast import answer_of

T = TypeVar("T")

ASK_SECONDS = 10.0


class Connections:
    """The connections of this process, by cluster, application and worker."""

    def __init__(self) -> None:
        """Start a thread for the event loop; it ends with the process."""
        self._loop = asyncio.new_event_loop()
        self._known: dict[tuple[str, ...], Connection] = {}
        self._finding = asyncio.Lock()
        self._metrics = Metrics()
        threading.Thread(target=self._loop.run_forever, name="embedding-client", daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def find(self, model: str, timeout_s: float) -> tuple[Connection, Served]:
        """Return the connection to the worker of a public name.

        Raises ModelNotFoundError, or ModelUnavailableError where no ingress answers in time.
        """
        deadline = self._loop.time() + timeout_s
        async with self._finding:
            while True:
                try:
                    return await self._find(model)
                except (ModelUnavailableError, TimeoutError, ray.exceptions.RayError) as error:
                    if self._loop.time() + MAX_PAUSE_SECONDS > deadline:
                        raise ModelUnavailableError("no ingress answers", "model") from error
                await asyncio.sleep(FIRST_PAUSE_SECONDS)

    async def _find(self, model: str) -> tuple[Connection, Served]:
        """Ask every application for the model, and take its settings over as they are now."""
        cluster = _cluster()
        if any(key[0] != cluster for key in self._known):
            self._known.clear()  # this process has left that cluster, and its handles lead nowhere
        found = await asyncio.to_thread(applications)
        missing: EmbeddingError = ModelUnavailableError("no application with an ingress runs here", "model")
        for application in found:
            ingress = await asyncio.to_thread(serve.get_deployment_handle, INGRESS_NAME, application)
            async with asyncio.timeout(ASK_SECONDS):
                files = await answer_of(ingress.workers.remote())
            workers = [Worker.model_validate(data) for data in files.values()]
            for worker in workers:
                if model in worker.queue.models:
                    connection = await self._connect((cluster, application), worker)
                    return connection, connection.catalog.find(model)
            names = ", ".join(f"`{name}`" for worker in workers for name in worker.queue.models)
            missing = ModelNotFoundError(f"no model of that name; there are {names}", "model")
        raise missing

    async def _connect(self, place: tuple[str, str], worker: Worker) -> Connection:
        key = (*place, worker.name)
        if key not in self._known:
            handle = await asyncio.to_thread(serve.get_deployment_handle, worker.name, place[1])
            self._known[key] = Connection(worker, Dispatch(worker, handle, self._metrics))
        connection = self._known[key]
        connection.update(worker)
        return connection


def _cluster() -> str:
    """Return what tells this process's membership of a cluster apart."""
    context = ray.get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}"


def join(address: str | None = None) -> None:
    """Join the cluster of that address, of RAY_ADDRESS, or on this machine, unless this process is in one.

    Raises ConnectionError where there is none.
    """
    if not ray.is_initialized():
        # Never a cluster of its own: there would be nobody to ask.
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)


_starting = threading.Lock()
_connections: Connections | None = None


def connections() -> Connections:
    """Return this process's connections; joins the running cluster if the process is in none."""
    global _connections  # noqa: PLW0603 - one loop for the process, which threads may ask for at once
    with _starting:
        join()
        if _connections is None:
            _connections = Connections()
        return _connections
