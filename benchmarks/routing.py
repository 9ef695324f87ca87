"""Calls to replicas without the gateway in between, from inside a cluster: what routing and joining do alone.

`benchmarks.dispatch` starts this as a process of its own, since Ray's switches have to be set before Ray is
imported. Two deployments that differ in nothing but their request router, and one that calls them, as the
ingress does.
"""

import argparse
import asyncio
import contextlib
import contextvars
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from deployments.config.load import load_workers
from deployments.engine.batch import TokenBatch
from deployments.front.switches import prepare_environment
from deployments.machine import cores_here
from deployments.plan.placement import Machine
from deployments.plan.plan import WorkerPlan, make_plans
from tests.harness import workers

ROOT = Path(__file__).parent.parent
OURS, DEFAULT = "ours", "default"
REPLICAS = 4
LOAD = 0.8
# Long against what a call costs, so that the cores aren't what is measured.
TOKEN_SECONDS = 0.0001
MEDIAN_TOKENS, SIGMA, MIN_TOKENS, MAX_TOKENS = 150, 1.2, 10, 2000
LONE_CALL_SECONDS = 0.005


class Caller:
    """The Ray Serve deployment that calls the others."""

    def __init__(self, plans: dict[str, WorkerPlan], handles: dict[str, Any]) -> None:
        """Take the handles by name."""
        self._plans = plans
        self._handles = handles

    async def replay(self, name: str, due: list[float], tokens: list[int]) -> list[float]:
        """Send calls of so many tokens when they are due; return how long after that each was answered."""
        handle, loop, seconds = self._handles[name], asyncio.get_running_loop(), [0.0] * len(due)
        begun = time.perf_counter()

        async def call(number: int) -> None:
            length = tokens[number]
            batch = TokenBatch(np.zeros(length, np.int32), np.array([length], np.int32))
            await handle.embed.remote(batch)
            seconds[number] = time.perf_counter() - begun - due[number]

        calls = []
        for number, moment in enumerate(due):
            await asyncio.sleep(max(0.0, begun + moment - time.perf_counter()))
            # An empty context: Serve would take the calls of one request for one call.
            calls.append(loop.create_task(call(number), context=contextvars.Context()))
        await asyncio.gather(*calls)
        return seconds

    async def lone(self, name: str, count: int) -> tuple[list[float], list[float]]:
        """Return what single inputs take through the dispatch, and straight through the handle, in turns."""
        from deployments.dispatch.dispatch import Dispatch
        from deployments.metrics import Metrics

        handle, loop = self._handles[name], asyncio.get_running_loop()
        dispatch = Dispatch(self._plans[name].worker, handle, Metrics())

        async def joined(batch: TokenBatch) -> None:
            await dispatch.embed(batch, loop.time() + 60)

        async def direct(batch: TokenBatch) -> None:
            await handle.embed.remote(batch)

        took: tuple[list[float], list[float]] = ([], [])
        for number in range(count):
            for side in (0, 1) if number % 2 else (1, 0):
                way = (joined, direct)[side]
                batch = TokenBatch.of([[number % 256, number // 256, side]])
                begun = time.perf_counter()
                await loop.create_task(way(batch), context=contextvars.Context())
                took[side].append(time.perf_counter() - begun)
        return took


@contextlib.contextmanager
def cluster(engine_args: str, more: str) -> Iterator[Any]:
    """Run both deployments and the caller on a Ray of our own; give the caller's handle."""
    with tempfile.TemporaryDirectory(prefix="routing-", dir="/tmp") as folder:
        prepare_environment(Path(folder))
        import ray
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        from deployments import app

        for name in (OURS, DEFAULT):
            (Path(folder) / f"{name}.toml").write_text(workers.fake(name, engine_args, more))
        plans = {
            plan.name: plan
            for name in (OURS, DEFAULT)
            for plan in make_plans(
                load_workers(Path(folder) / f"{name}.toml", environ={}),
                Machine(cores_here(), 0, cores_here()),
            )
        }
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            handles = {OURS: app.bind_replica(plans[OURS])}
            with mock.patch.object(app, "ROUTER", RequestRouterConfig().request_router_class):
                handles[DEFAULT] = app.bind_replica(plans[DEFAULT])
            caller = serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100)(Caller)
            serve.start(proxy_location="Disabled")
            handle = serve.run(caller.bind(plans, handles), route_prefix=None)
            # On the fast data plane a handle lives in its caller's event loop, and there is none here.
            handle._init(_run_router_in_separate_loop=True)
            yield handle
        finally:
            serve.shutdown()
            ray.shutdown()


def trace(seconds: float, seed: int) -> tuple[list[float], list[int]]:
    """Return when calls arrive and how many tokens they have, at 80% of what all replicas can do."""
    rng = np.random.default_rng(seed)
    sample = rng.lognormal(np.log(MEDIAN_TOKENS), SIGMA, 1_000_000).clip(MIN_TOKENS, MAX_TOKENS)
    rate = LOAD * REPLICAS / (sample.mean() * TOKEN_SECONDS)
    count = int(rate * seconds)
    due = rng.exponential(1 / rate, count).cumsum()
    return due.tolist(), sample[:count].astype(int).tolist()


def routing(rounds: int, seconds: float) -> dict[str, list[list[float]]]:
    """Replay the same traces through both routers, in turns; return the times of each round."""
    took: dict[str, list[list[float]]] = {OURS: [], DEFAULT: []}
    engine, more = f"token_seconds = {TOKEN_SECONDS}", f"[deployment]\nnum_replicas = {REPLICAS}"
    with cluster(engine, more) as caller:
        for name in took:
            caller.replay.remote(name, *trace(2.0, 1000)).result()
        for number in range(rounds):
            for name in sorted(took, reverse=bool(number % 2)):
                took[name].append(caller.replay.remote(name, *trace(seconds, number)).result())
    return took


def lone(count: int) -> list[list[float]]:
    """Return the times of single inputs through the dispatch and straight through the handle."""
    with cluster(f"call_seconds = {LONE_CALL_SECONDS}", "") as caller:
        caller.lone.remote(OURS, 50).result()
        return list(caller.lone.remote(OURS, count).result())


def measure(what: str, *arguments: float) -> Any:
    """Run one of the above in a process of its own and return what it found."""
    command = [sys.executable, "-m", "benchmarks.routing", what, *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["routing", "lone"])
    parser.add_argument("arguments", nargs="*", type=float)
    given = parser.parse_args()
    if given.what == "routing":
        print(json.dumps(routing(int(given.arguments[0]), given.arguments[1])))
    else:
        print(json.dumps(lone(int(given.arguments[0]))))


if __name__ == "__main__":
    main()
