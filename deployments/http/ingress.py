"""The HTTP side: routes, bodies, errors. One FastAPI application, every route at `/` and at `/v1`.

Ray Serve takes or makes the `x-request-id` and returns it; that is left to it.
"""

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.config.worker import Worker
from deployments.dispatch.catalog import Catalog
from deployments.dispatch.workers import Workers
from deployments.errors import (
    EngineStartError,
    IncompleteError,
    reason_of,
)
from deployments.front.direct import Mounted
from deployments.front.spare import add_spare, http_options
from deployments.http.app import Desk, make_app
from deployments.http.auth import Access
from deployments.http.edge.origins import add_origins
from deployments.http.metrics_port import MetricsPort
from deployments.http.serving import Serving
from deployments.keys.rates import Grant, LeasedRates, LocalRates
from deployments.keys.ring import KeySource, require_keys
from deployments.keys.usage import Counts
from deployments.machine import give_back_large_blocks
from deployments.metrics import Metrics, states_text
from deployments.status.history import Minutes
from deployments.status.look import Counted
from deployments.status.report import Replicas
from deployments.transport.broadcast import answer_of, broadcast

# How long one ingress replica waits for the others' metrics.
GATHER_SECONDS = 5.0


@dataclass(frozen=True)
class AccessSettings:
    """Who may come in: the keys, or nobody but this machine, or anybody.

    `rates` is the handle of the central buckets where there are several ingress replicas; `origins` whose
    pages may ask from a browser.
    """

    keys: KeySource = field(default_factory=KeySource)
    insecure: bool = False
    rates: DeploymentHandle[Any] | None = None
    origins: tuple[str, ...] = ()

    def access(self) -> Access | None:
        """Return the ring of keys and what they may use up; None without keys. Raises ConfigError."""
        ring = self.keys.ring()
        if ring is None:
            return None
        handle = self.rates
        if handle is None:
            return Access(ring, LocalRates())

        async def take(*arguments: Any) -> Grant:
            grant: Grant = await answer_of(handle.take.remote(*arguments))
            return grant

        return Access(ring, LeasedRates(take))


class Sender:
    """What sends to workers as an ingress replica does, and tells the ingress what it has counted."""

    def __init__(
        self, handles: Mapping[str, DeploymentHandle[Any]], max_body_bytes: int, access: Access | None
    ) -> None:
        """Serve nothing until the workers are named; `handles` are those bound with this deployment."""
        rates = access.rates if access else None
        self._serving = Serving(Catalog({}), Metrics(), max_body_bytes, rates)
        self._workers = Workers(handles, self._serving.catalog, self._serving.metrics)

    async def usage(self, key: str) -> dict[str, Counts]:
        """Return what a key has used of this process."""
        return self._serving.usage.of(key)

    async def counts(self) -> Minutes:
        """Return the last minutes of this process."""
        return self._serving.history.minutes()

    async def metrics(self) -> bytes:
        """Return the metrics of this process as text."""
        return self._serving.metrics.text()


class Ingress(Sender):
    """The Ray Serve deployment that speaks HTTP."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle[Any]],
        max_body_bytes: int,
        metrics_host: str,
        access_settings: AccessSettings = AccessSettings(),
        batches: Desk | None = None,
    ) -> None:
        """Serve nothing until `reconfigure` names the workers; `handles` are those bound with the ingress.

        Raises ConfigError where the keys can't be read.
        """
        give_back_large_blocks()
        self._access_settings = access_settings
        self._access = access_settings.access()
        super().__init__(handles, max_body_bytes, self._access)
        self._batches = batches
        self._metrics_host = metrics_host
        self._ports: dict[str, MetricsPort] = {}
        self._files: dict[str, dict[str, Any]] = {}

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Take over the worker files as they are now. Ray Serve calls it at the start and at each deployment.

        `config["workers"]` holds each worker file as plain data, and `config["packages"]` what tells the
        model packages apart, by the worker's name.
        Raises ConfigError where other machines could reach us without a key.
        """
        require_keys(self._access_settings.keys, self._access_settings.insecure, (await http_options()).host)
        workers = self._workers.take(config)
        self._files = config["workers"]
        self._serving.history.start()
        self._open_ports(workers.values())
        self._packages = {
            name: (worker.queue.version, config["packages"][name]) for name, worker in workers.items()
        }

    async def packages(self) -> dict[str, tuple[int | str, str]]:
        """Return each worker's version and package; the next deployment compares with them."""
        return self._packages

    async def workers(self) -> dict[str, dict[str, Any]]:
        """Return each worker file as plain data, without secrets; jobs ask for it."""
        return self._files

    def _open_ports(self, workers: Iterable[Worker]) -> None:
        """Open the workers' metrics ports, and close those that no file names any more."""
        wanted = {worker.name: worker for worker in workers if worker.monitoring.metrics_port}
        for name, port in list(self._ports.items()):
            if name not in wanted or not port.is_for(wanted[name]):
                self._ports.pop(name).close()
        for name, worker in wanted.items():
            if name not in self._ports:
                self._ports[name] = MetricsPort(worker, self._metrics_host, self._gather)
                self._ports[name].open()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Ray Serve asks for it once the constructor is done."""
        batches = self._batches.routes(self._serving) if self._batches else ()
        app = make_app(
            self._serving,
            self._gather,
            self._ports,
            self._access,
            self._gather_usage,
            batches,
            self._gather_counts,
        )
        add_origins(app, self._access_settings.origins)
        add_spare(app)
        if RAY_SERVE_ENABLE_HA_PROXY:
            app.add_middleware(Mounted)
        return app

    async def _gather_usage(self, key: str) -> list[dict[str, Counts]]:
        """Return what a key has used of all ingress replicas, and what its batches have."""
        return [*await ask_ingresses("usage", key), *await self._ask_runner("usage", key)]

    async def _gather_counts(self) -> Counted:
        """Return the last minutes of all ingress replicas and of the runner, and Ray Serve's view."""
        ingresses, others, replicas = await asyncio.gather(
            ask_ingresses("counts"),
            self._ask_runner("counts"),
            asyncio.to_thread(replicas_of, serve.get_replica_context().app_name),
        )
        return Counted(ingresses, others, replicas)

    async def _gather(self) -> list[bytes]:
        """Return the metrics of all ingress replicas and engines, and Ray Serve's view: any may be asked."""
        application = serve.get_replica_context().app_name
        catalog = self._serving.catalog
        texts, batches, replicas, *engines = await asyncio.gather(
            ask_ingresses("metrics"),
            self._ask_runner("metrics"),
            asyncio.to_thread(replicas_of, application),
            *(dispatch.engine_metrics(GATHER_SECONDS) for dispatch in catalog.dispatches.values()),
        )
        known = {name: replicas.get(name, Replicas()).states for name in catalog.dispatches}
        return [*texts, *batches, states_text(known), *itertools.chain.from_iterable(engines)]

    async def _ask_runner(self, method: str, *arguments: Any) -> list[Any]:
        """Return what the runner of batches answers; nothing where there is none, or none answers."""
        if self._batches is None:
            return []
        try:
            async with asyncio.timeout(GATHER_SECONDS):
                return [await answer_of(getattr(self._batches.runner, method).remote(*arguments))]
        except (TimeoutError, RayError, DeploymentUnavailableError):
            return []


async def ask_ingresses(method: str, *arguments: Any) -> list[Any]:
    """Call a method of all ingress replicas. Raises IncompleteError where one doesn't answer."""
    context = serve.get_replica_context()
    ourselves = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        return await broadcast(ourselves, method, *arguments, seconds=GATHER_SECONDS)
    except TimeoutError:
        # A sum without it would look to Prometheus like counters that begin anew.
        raise IncompleteError("an ingress replica doesn't answer", None, GATHER_SECONDS) from None


def replicas_of(application: str) -> dict[str, Replicas]:
    """Return what Ray Serve's controller sees of each deployment's replicas."""
    status = serve.status().applications.get(application)
    deployments = status.deployments if status is not None else {}
    return {
        name: Replicas(
            {str(s): n for s, n in each.replica_states.items()},
            reason_of(each.message) if EngineStartError.__name__ in each.message else "",
        )
        for name, each in deployments.items()
    }
