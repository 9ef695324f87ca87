"""A model's replicas come and go with its load, down to none; no request is lost meanwhile."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from tests.harness import workers
from tests.harness.faults import FakeTexts, Load, Traffic, client
from tests.harness.server import Server, serve, wait_for

pytestmark = pytest.mark.cluster
INTERVALS = """\
metrics_interval_s = 0.5
look_back_period_s = 1
upscale_delay_s = 1
downscale_delay_s = 2
target_outstanding_s = 0.2
"""
# Serve's own `upscale_delay_s`.
DEFAULT_UPSCALE_DELAY_SECONDS = 30.0


def autoscaling(least: int, most: int) -> str:
    """Return the tables of a model that scales between so many replicas."""
    return f"[deployment.autoscaling]\nmin_replicas = {least}\nmax_replicas = {most}\n{INTERVALS}"


@pytest.fixture(scope="module", params=[True, False], ids=["tuned", "serve-run"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that scales from one to three, and one that scales from none to one, on either data plane."""
    folder = tmp_path_factory.mktemp("scaling")
    config = folder / "workers"
    config.mkdir()
    # So slow that the load of twelve stands before three engines, not before a busy machine's front.
    engine = "token_seconds = 0.006"
    (config / "m.toml").write_text(workers.fake("m", engine, autoscaling(1, 3)))
    (config / "rare.toml").write_text(workers.fake("rare", engine, autoscaling(0, 1)))
    with serve(config, folder, tuned=request.param) as server:
        yield server


def count(server: Server, name: str) -> int:
    """Return how many replicas of a model there are."""
    return len(server.titled(f"ServeReplica:default:{name}"))


@contextmanager
def load(server: Server, clients: int) -> Iterator[Load]:
    """Have clients send without a pause, and check every vector; assert that none was lost or wrong."""
    seen, stop = Load(), threading.Event()
    threads = [
        threading.Thread(target=client, args=(Traffic(server.url, "m", 0, FakeTexts()), seen, stop))
        for _ in range(clients)
    ]
    for each in threads:
        each.start()
    try:
        yield seen
    finally:
        stop.set()
        for each in threads:
            each.join()
    assert not seen.lost
    assert not seen.wrong
    assert len(seen.began) > clients


def embed(server: Server, name: str, **headers: str) -> httpx.Response:
    """Send one request."""
    body = {"model": name, "input": "hello"}
    return httpx.post(f"{server.url}/v1/embeddings", json=body, headers=headers, timeout=60)


def decisions(server: Server, direction: str) -> list[float]:
    """Return when Serve's controller decided to scale the model so, in seconds since the epoch."""
    (raylet,) = [p for p in server.processes() if p.name() == "raylet"]
    session = Path(next(a.partition("=")[2] for a in raylet.cmdline() if a.startswith("--session_dir=")))
    logs = [log.read_text() for log in (session / "logs" / "serve").glob("controller_*.log")]
    pattern = rf"^\w+ (\S+ \S+) .*{direction} Deployment\(name='m'"
    return [
        datetime.fromisoformat(at.replace(",", ".")).timestamp()
        for at in re.findall(pattern, "\n".join(logs), re.MULTILINE)
    ]


def test_from_one_to_three_and_back(server: Server) -> None:
    """Decided by the worker file's intervals, not Serve's; the third replica stays while the load does."""
    assert count(server, "m") == 1
    begun = time.time()
    with load(server, 12) as seen:
        wait_for(lambda: count(server, "m") == 3, 90, "three replicas")
        assert decisions(server, "Upscaling")[0] - begun < DEFAULT_UPSCALE_DELAY_SECONDS
        sent = len(seen.began)
        wait_for(lambda: len(seen.began) > sent + 150, 90, "load on three replicas")
        assert not decisions(server, "Downscaling")
    # Somebody still sends now and then while the replicas go.
    wait_for(lambda: embed(server, "m").is_success and count(server, "m") == 1, 90, "one replica")
    assert embed(server, "m").is_success


def test_from_none_to_one_and_back(server: Server) -> None:
    """The first request is held until its replica is there; a model without one counts as ready."""
    wait_for(lambda: count(server, "rare") == 0, 60, "no replica")
    ready = httpx.get(f"{server.url}/ready", timeout=60)
    assert ready.status_code == 200
    assert count(server, "rare") == 0
    for _ in range(2):
        answer = embed(server, "rare")
        assert answer.status_code == 200, answer.text
        assert count(server, "rare") == 1
        wait_for(lambda: count(server, "rare") == 0, 60, "no replica")
    starts = 'embedding_cold_start_seconds_count{worker="rare"} 2.0'
    assert starts in httpx.get(f"{server.url}/metrics", timeout=30).text


def test_a_cold_start_beyond_the_deadline_is_refused_in_time(server: Server) -> None:
    """503 with Retry-After before the client gives up; the next request finds the replica."""
    wait_for(lambda: count(server, "rare") == 0, 60, "no replica")
    answer = embed(server, "rare", **{"x-request-timeout-seconds": "0.5"})
    assert answer.status_code == 503
    assert answer.json()["code"] == "model_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert embed(server, "rare").status_code == 200
