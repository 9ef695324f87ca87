"""The whole application in this process: real routes, real dispatch, engines behind local handles."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.config.load import load_workers
from deployments.dispatch.catalog import Catalog
from deployments.dispatch.workers import Workers
from deployments.http.app import make_app
from deployments.http.serving import Serving
from deployments.keys.rates import Rates
from deployments.metrics import Metrics
from deployments.plan.placement import Machine
from deployments.plan.plan import WorkerPlan, ingress_config, make_plans
from deployments.replica.replica import Replica
from tests.harness import fake, workers

MAX_BODY_BYTES = 1_000_000


class LocalMethod:
    """What `handle.method` is: something with `remote`."""

    def __init__(self, method: Callable[..., Any]) -> None:
        """Wrap a replica's method."""
        self.remote = method


class LocalHandle:
    """A Ray Serve handle to one replica in this process, started at the first call."""

    def __init__(self, plan: Any) -> None:
        """Start nothing yet."""
        self._plan = plan
        self._replica: Any = None
        self._starting = asyncio.Lock()
        self.failures: list[Exception] = []

    def __getattr__(self, name: str) -> LocalMethod:
        """Return a method of the replica; it raises what `failures` holds first."""

        async def call(*arguments: Any) -> Any:
            if self.failures:
                raise self.failures.pop(0)
            async with self._starting:
                if self._replica is None:
                    self._replica = Replica.__new__(Replica)
                    await self._replica.__init__(self._plan)
            return await getattr(self._replica, name)(*arguments)

        return LocalMethod(call)


FILES = {
    "a.toml": workers.fake(
        "a", "dimension = 16", task='prompts = {query = "find: "}\ndimensions = [4, 8]'
    ).replace("[queue]", '[queue]\nservice_name = "search"\nservice_role = "Index"'),
    "b.toml": workers.fake("b", "dimension = 16", "[limits]\nmax_request_tokens = 100\nmax_inputs = 3"),
    "slow.toml": workers.fake("slow", "call_seconds = 0.3", "[limits]\nrequest_timeout_s = 0.1"),
    "patient.toml": workers.fake("patient", "call_seconds = 0.2"),
    "texts.toml": workers.fake(
        "texts", task='token_input = "reject"\ntruncation = "end"\ndimensions = [100000]'
    ),
    "foreign.toml": workers.fake(
        "foreign", "dimension = 16", task='token_input = "cl100k"\nprompts = {query = "find: "}'
    ).replace("[queue]", '[queue]\ntags = ["eu", "fast"]'),
    "wide.toml": workers.fake(
        "wide",
        "dimension = 256",
        task='dimensions = [128]\nprompts = {instruction = "{instruction} -> "}',
    ),
    "instruct.toml": workers.fake(
        "instruct", "dimension = 16", task='prompts = {query = "Instruct: Find it\\nQuery: "}'
    ),
    "mute.toml": workers.fake("mute").replace("supported = true", "supported = false"),
}


NAMES = sorted(name.removesuffix(".toml") for name in FILES)


def expected(texts: list[str], dimension: int = 16) -> np.ndarray:
    """Return what the fake engine gives: its tokens are the texts' bytes."""
    return fake.expected(texts, dimension)


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[WorkerPlan, ...]:
    """The plans of all workers."""
    folder = tmp_path_factory.mktemp("workers")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return make_plans(load_workers(folder, environ={}), Machine(2, 0, 2))


@pytest.fixture
def handles(plans: tuple[WorkerPlan, ...]) -> dict[str, LocalHandle]:
    """One local handle for each worker, with nothing started behind it."""
    return {plan.name: LocalHandle(plan) for plan in plans}


def make_serving(handles: dict[str, LocalHandle], rates: Rates | None = None) -> Serving:
    """Return what serves the workers behind the handles."""
    serving = Serving(Catalog({}), Metrics(), MAX_BODY_BYTES, rates)
    plans = [handle._plan for handle in handles.values()]
    Workers(handles, serving.catalog, serving.metrics).take(ingress_config(plans))  # type: ignore[arg-type]
    return serving


def client_of(serving: Serving) -> httpx.AsyncClient:
    """Return an HTTP client of an application."""

    async def gather() -> list[bytes]:
        return [serving.metrics.text()]

    transport = httpx.ASGITransport(make_app(serving, gather), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://cluster/v1")


@pytest.fixture
async def client(handles: dict[str, LocalHandle]) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the application."""
    async with client_of(make_serving(handles)) as client:
        yield client
