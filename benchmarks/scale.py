"""What the serving path alone costs as models, replicas and nodes grow: `make scale`.

The fake engine computes nothing, so all CPU time is that of the way there and back: HAProxy, ingress,
dispatch, transport, replica. What these processes cost while nobody asks is measured first and counted
apart, and so are Ray's own: that costs by the second, not by the request. Where a service time is set, it
shows whether more replicas serve as much more.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import report, rivals
from benchmarks.budget import FRONT, INGRESS, RAY, REPLICA, usage_of
from benchmarks.results import FOLDER, machine, shown
from benchmarks.rivals import Running, asking, first_embedding
from benchmarks.subjects import bundled
from benchmarks.workloads import DIMENSION, MODEL, WORKLOADS, Workload
from tests.harness import workers
from tests.harness.nodes import HEAD, nodes, serve_on
from tests.harness.server import serve

SECONDS, WARM_UP_SECONDS, IDLE_SECONDS = 4.5, 1.0, 5.0
REPEATS = 3
PATH = (FRONT, INGRESS, REPLICA)
SINGLES: Workload = WORKLOADS[1]
# A replica that embeds 40 of the texts in a second: 32 of them are more than these cores can feed.
SERVICE = f"dimension = {DIMENSION}, token_seconds = 0.00036"
NONE = f"dimension = {DIMENSION}"
REPLICAS, SERVED_REPLICAS = (1, 4, 32), (1, 2, 8)
NODES = (1, 2, 8)
MODELS = (1, 20)
# Clients for each replica that has a service time: two calls' worth of waiting, so that none runs dry.
CLIENTS_PER_REPLICA = 16
LOOPBACK = "127.0.0.{}"


@dataclass(frozen=True)
class Point:
    """One server under load: requests per second, and CPU-microseconds a request by role.

    `idle` is what the serving path takes without a request, in CPU-milliseconds a second; it isn't in
    the others. Points from before it was told apart have none.
    """

    what: str
    size: int
    rate: float
    path: float
    by_role: dict[str, float]
    idle: float | None = None

    @property
    def per_cpu_second(self) -> float:
        """Requests for each second of CPU time of the serving path."""
        return 1e6 / self.path


def measure(what: str, size: int, running: Running, workload: Workload, seconds: float) -> Point:
    """Load a server, several times; return the median by what its processes took."""
    running.send(workload, WARM_UP_SECONDS, 0.0, "")
    points = []
    _, idle, _ = usage_while(running, lambda: time.sleep(IDLE_SECONDS))
    for _ in range(REPEATS):
        result, busy, lasted = usage_while(
            running, lambda: running.send(workload, seconds / REPEATS, 0.0, "")
        )
        if result.errors or not result.latencies:
            raise RuntimeError(f"{what} {size}: {result.errors or 'no answer'}")
        requests = len(result.latencies)
        used = {role: (busy[role] - idle[role]) * lasted for role in busy}
        by_role = {role: 1e6 * max(0.0, used[role]) / requests for role in used}
        path = sum(by_role[role] for role in PATH)
        apart = 1e3 * sum(idle[role] for role in PATH)
        points.append(Point(what, size, REPEATS * result.requests / seconds, path, by_role, apart))
    point = sorted(points, key=lambda each: each.path)[REPEATS // 2]
    print(f"{what} {size}: {point.rate:.0f} requests/s, {point.path:.0f} CPU-µs", file=sys.stderr, flush=True)
    return point


def usage_while(running: Running, act: Callable[[], Any]) -> tuple[Any, dict[str, float], float]:
    """Return what `act` returns, the CPU seconds a second that each role took meanwhile, and its seconds."""
    before, begun = usage_of(running), time.monotonic()
    result = act()
    after, lasted = usage_of(running), time.monotonic() - begun
    return result, {role: (after[role] - before[role]) / lasted for role in (*PATH, RAY)}, lasted


# --- servers -----------------------------------------------------------------------------------------


def files(folder: Path, models: int, engine: str, replicas: int) -> Path:
    """Write worker files of the fake engine, the first of which has the model's usual name."""
    config = folder / "workers"
    config.mkdir()
    for number in range(models):
        name = model_name(number)
        text = workers.fake(name, engine, f"[deployment]\nnum_replicas = {replicas}")
        (config / f"{name}.toml").write_text(text)
    return config


def model_name(number: int) -> str:
    """Return the name of one of several models."""
    return f"{MODEL}-{number}" if number else MODEL


@contextlib.contextmanager
def ours(models: int = 1, engine: str = NONE, replicas: int = 1, tuned: bool = True) -> Iterator[Running]:
    """Start our server with the fake engine."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        config = files(Path(name), models, engine, replicas)
        with serve(config, Path(name), tuned=tuned) as server:
            first_embedding(server)
            yield Running(0.0, server, asking(server))


@contextlib.contextmanager
def ours_on_nodes(count: int) -> Iterator[Running]:
    """Start our server on so many raylets, with a replica on each of them, on the fast data plane."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        folder = Path(name)
        config = files(folder, 1, NONE, count)
        file = next(config.iterdir())
        file.write_text(file.read_text() + "max_replicas_per_node = 1\n")
        with nodes(folder, tuned=True) as cluster:
            for number in range(count):
                cluster.start(HEAD if not number else LOOPBACK.format(2 + number), "--num-cpus", "1")
            with serve_on(cluster, config) as server:
                first_embedding(server)
                yield Running(0.0, server, asking(server))


@contextlib.contextmanager
def ray_llm(tuned: bool) -> Iterator[Running]:
    """Start ray.serve.llm with an engine that computes nothing."""
    variable = {"RAYLLM_VLLM_ENGINE_CLS": "benchmarks.ray_llm_engine.FakeEngine"}
    os.environ |= variable
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name,
            rivals.ray_serve_llm(Path(name), bundled(), tuned) as running,
        ):
            yield running
    finally:
        for each in variable:
            del os.environ[each]


# --- studies -----------------------------------------------------------------------------------------


def rivals_study(seconds: float) -> Iterator[Point]:
    """Our serving path and ray.serve.llm's, on both data planes."""
    contestants: tuple[tuple[str, AbstractContextManager[Running]], ...] = (
        ("ours, tuned", ours()),
        ("ray.serve.llm, tuned", ray_llm(tuned=True)),
        ("ours, defaults", ours(tuned=False)),
        ("ray.serve.llm, defaults", ray_llm(tuned=False)),
    )
    for name, start in contestants:
        with start as running:
            yield measure(name, 1, running, SINGLES, seconds)


def models_study(seconds: float) -> Iterator[Point]:
    """More and more models: one of them asked, and all in turn."""
    for count in MODELS:
        with ours(models=count) as running:
            yield measure("models, one asked", count, running, SINGLES, seconds)
            workload = replace(SINGLES, models=tuple(map(model_name, range(count))))
            yield measure("models", count, running, workload, seconds)
            # The same clients share out over the models, so that fewer requests leave together. One client
            # alone tells what more models cost apart from that.
            lone = replace(workload, clients=1)
            yield measure("models, one client", count, running, lone, seconds)


def replicas_study(seconds: float) -> Iterator[Point]:
    """More and more replicas of one model behind one ingress."""
    for count in REPLICAS:
        with ours(replicas=count) as running:
            yield measure("replicas", count, running, SINGLES, seconds)


def nodes_study(seconds: float) -> Iterator[Point]:
    """More and more raylets, with a replica on each."""
    for count in NODES:
        with ours_on_nodes(count) as running:
            yield measure("raylets", count, running, SINGLES, seconds)


def service_study(seconds: float) -> Iterator[Point]:
    """Replicas with a set service time, as many clients for each."""
    for count in SERVED_REPLICAS:
        with ours(engine=SERVICE, replicas=count) as running:
            workload = replace(SINGLES, clients=CLIENTS_PER_REPLICA * count)
            yield measure("replicas with a service time", count, running, workload, 2 * seconds)


STUDIES = {
    "rivals": rivals_study,
    "models": models_study,
    "replicas": replicas_study,
    "raylets": nodes_study,
    "service": service_study,
}


def table(points: list[Point]) -> str:
    """Return the points as markdown."""
    lines = [
        "| what | | requests/s | CPU-µs a request | front | ingress | replicas | requests per CPU-second"
        " | Ray besides | idle, CPU-ms a second |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        roles = " | ".join(f"{p.by_role[role]:,.0f}" for role in PATH)
        lines.append(
            f"| {p.what} | {p.size} | {shown(p.rate)} | {p.path:,.0f} | {roles} | {p.per_cpu_second:,.0f}"
            f" | {p.by_role[RAY]:,.0f} | {'' if p.idle is None else f'{p.idle:,.0f}'} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, keep the points, print the table. Studies that aren't asked for stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", default=",".join(STUDIES), help="some of those, by comma")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_args()
    # An orderly end, so that no server is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    file = given.folder / "scale.json"
    kept: dict[str, Any] = json.loads(file.read_text())["studies"] if file.exists() else {}
    for name in given.studies.split(","):
        kept[name] = []
        for point in STUDIES[name](given.seconds):
            kept[name].append(asdict(point))
            content = {"machine": machine(), "seconds": given.seconds, "studies": kept}
            file.write_text(json.dumps(content, indent=1) + "\n")
    text = table([Point(**point) for name in STUDIES for point in kept.get(name, [])])
    print(text)
    if given.folder == FOLDER:
        report.insert(report.NOTES, "scale", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
