"""The dashboard on a real Prometheus: each query gives data while requests of every kind come."""

import asyncio
import itertools
import math
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from deployments.command.dashboard import Places, prometheus, rules
from deployments.config.load import load_workers
from deployments.errors import EngineDeadError
from deployments.http.app import make_app
from deployments.http.auth import Access
from deployments.http.serving import Serving
from deployments.keys.file import Key, Keys, hash_of
from deployments.keys.rates import LocalRates
from deployments.keys.ring import KeyRing
from deployments.metrics import CANCELLED, SUCCESS, states_text
from deployments.plan.placement import Machine
from deployments.plan.plan import make_plans
from tests.app.conftest import LocalHandle, make_serving
from tests.harness import workers
from tests.harness.prometheus import CONDITIONS, QUERIES, concrete, names, needs_prometheus
from tests.harness.server import free_port, wait_for

OPERATOR, FEW = "secret-operator", "secret-few"


class Cluster:
    """The application with keys on, served by uvicorn in a thread, and a replica that dies now and then."""

    def __init__(self, folder: Path) -> None:
        """Serve from now on."""
        file = folder / "a.toml"
        file.write_text(workers.fake("a", "call_seconds = 0.001", "[limits]\ncache_mib = 1"))
        (self._plan,) = make_plans(load_workers(file, environ={}), Machine(2, 0, 2))
        self.port = free_port()
        self._server = uvicorn.Server(uvicorn.Config("", port=self.port, log_config=None, access_log=False))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started or not self._thread.is_alive(), 10, "the server")
        assert self._server.started

    def _run(self) -> None:
        now = datetime.now(UTC)
        keys = (
            Key(name="operator", sha256=hash_of(OPERATOR.encode()), created=now, operator=True),
            Key(name="few", sha256=hash_of(FEW.encode()), created=now, requests_per_minute=1),
        )
        access = Access(KeyRing(Keys(keys=keys)), LocalRates())
        self._handle = LocalHandle(self._plan)
        self._serving = make_serving({"a": self._handle}, access.rates)
        self._serving.metrics.capacity.labels("a").set_function(lambda: 1000.0)
        self._vllm = Vllm()

        async def gather() -> list[bytes]:
            return [
                self._serving.metrics.text(),
                states_text({"a": {"RUNNING": 1}}),
                generate_latest(self._vllm.registry),
            ]

        self._server.config.app = make_app(self._serving, gather, access=access)
        self._server.run()

    def stop(self) -> None:
        """Serve no more."""
        self._server.should_exit = True
        self._thread.join(10)

    async def ask(self, number: int) -> None:
        """Send requests of every kind: well and ill, joined, split and shared, and one that is repeated."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}/v1", timeout=60) as client:

            async def send(body: Any, secret: str = OPERATOR) -> None:
                headers = {"x-api-key": secret}
                await client.post("/embeddings", json={"model": "a", "input": body}, headers=headers)

            self._handle.failures.append(EngineDeadError("gone"))
            await asyncio.gather(*(send([f"{number} {n}", f"same {number}"]) for n in range(20)))
            await send([f"{number} {n} {'x' * 400}" for n in range(50)])
            await asyncio.gather(send(f"same {number}"), send(""), send("x" * 600), send("x", "wrong"))
            await asyncio.gather(*(send("y", FEW) for _ in range(3)))
        count_what_takes_more(self._serving)
        self._vllm.step()


def count_what_takes_more(serving: Serving) -> None:
    """Count what only Ray's routers and proxies make happen, and a batch's line."""
    metrics = serving.metrics
    metrics.local_calls.labels("a").inc()
    metrics.cuts.labels("a").inc()
    metrics.cold_start_seconds.labels("a").observe(2.0)
    metrics.batch_lines.labels("a", SUCCESS).inc()
    metrics.requests.labels("a", CANCELLED).inc()


class Vllm:
    """What vLLM counts of a worker, as far as the dashboard asks for it; a real one is in `tests/model`."""

    def __init__(self) -> None:
        """Have counted nothing."""
        self.registry = CollectorRegistry()
        for name in names("vllm:num_"):
            Gauge(name, "", ("model_name",), registry=self.registry).labels("a").set(1)
        steps = Histogram("vllm:iteration_tokens_total", "", ("model_name",), registry=self.registry)
        self._steps = steps.labels("a")

    def step(self) -> None:
        """Count a step."""
        self._steps.observe(100)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """The application."""
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


@pytest.fixture
def address(cluster: Cluster, tmp_path: Path) -> Iterator[str]:
    """A real Prometheus that scrapes it once in a second, configured as the command configures it."""
    key = tmp_path / "key"
    key.write_text(OPERATOR)
    place = Places(f"http://127.0.0.1:{cluster.port}", "", tmp_path, key)
    configuration = prometheus(place)
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules()))
    port = free_port()
    command = ["prometheus", "--config.file", str(file), "--storage.tsdb.path", str(tmp_path / "data")]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=output, stderr=output
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or is_ready(address), 30, log)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def is_ready(address: str) -> bool:
    """Whether Prometheus answers."""
    try:
        return httpx.get(f"{address}/-/ready").is_success
    except httpx.HTTPError:
        return False


def data(address: str, query: str) -> list[float]:
    """Return what Prometheus gives for a query now: the numbers, of all series."""
    answer = httpx.get(f"{address}/api/v1/query", params={"query": query}, timeout=30).json()
    assert answer["status"] == "success", answer
    values = [float(each["value"][1]) for each in answer["data"]["result"]]
    return [value for value in values if math.isfinite(value)]


@needs_prometheus
@pytest.mark.slow
def test_every_query_gives_data(cluster: Cluster, address: str) -> None:
    """And every rule is evaluated without an error; nothing is told of a cluster that answers."""
    left = {title: concrete(query, "20s") for title, query in QUERIES.items()}
    numbers = itertools.count()

    def all_give() -> bool:
        asyncio.run(cluster.ask(next(numbers)))
        for title, query in list(left.items()):
            if data(address, query):
                del left[title]
        return not left

    wait_for(all_give, 30, lambda: str(left))
    groups = httpx.get(f"{address}/api/v1/rules").json()["data"]["groups"]
    told = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(told) == set(CONDITIONS)
    assert {rule["health"] for rule in told.values()} == {"ok"}
    assert told["EmbeddingClusterSilent"]["state"] == "inactive"
    cluster.stop()
    wait_for(lambda: data(address, CONDITIONS["EmbeddingClusterSilent"]), 30, "what tells of silence")
