"""The dispatch under load on a real server: what is split, joined, refused. Times are for `make dispatch`."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.budget import FRONT, INGRESS, REPLICA, budget
from benchmarks.dispatch import calls_made, calls_seen
from benchmarks.load import Stream
from benchmarks.results import shown
from benchmarks.rivals import Running, asking
from benchmarks.scale import SINGLES, measure, table
from benchmarks.workloads import Workload
from tests.harness import workers
from tests.harness.server import Server, serve

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engines of `two` write down their calls."""
    return tmp_path_factory.mktemp("calls")


@pytest.fixture(scope="module")
def server(calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model with two replicas, one whose calls take a moment, one that little may wait for, a quick one."""
    folder = tmp_path_factory.mktemp("server")
    config = folder / "workers"
    config.mkdir()
    two = f'token_seconds = 0.00001, calls_folder = "{calls}"'
    files = {
        "two": workers.fake("two", two, "[deployment]\nnum_replicas = 2"),
        "one": workers.fake("one", "call_seconds = 0.5"),
        "full": workers.fake("full", "token_seconds = 0.01", "[limits]\nmax_outstanding_tokens = 500"),
        "quick": workers.fake("quick"),
    }
    for name, text in files.items():
        (config / f"{name}.toml").write_text(text)
    with serve(config, folder) as server:
        yield server


def test_a_big_request_is_shared_by_the_replicas(server: Server, calls: Path) -> None:
    """Every token once, and no replica is left with most of it."""
    before = calls_seen(calls)
    seen = Stream(server.url, "two", each=1, inputs=2048, tokens=45, sigma=0.8, max_tokens=500).run()
    assert [answer.status for answer in seen.answers] == [200]
    after = calls_seen(calls)
    shares = [after[name] - before[name] for name in after]
    # Health checks embed a few tokens now and then.
    assert seen.tokens <= sum(shares) < seen.tokens * 1.01
    assert len(shares) == 2
    assert max(shares) < 0.75 * seen.tokens


def test_what_waits_is_joined(server: Server) -> None:
    """256 clients with an input each need at most an eighth as many calls."""
    before = calls_made(server)
    seen = Stream(server.url, "one", clients=256, each=1).run()
    assert len(seen.of(200).answers) == 256
    assert calls_made(server) - before <= 256 / 8


def test_a_full_queue_says_when_to_come_back(server: Server) -> None:
    """What was let in is answered, everything else refused with 503 and Retry-After."""
    seen = Stream(server.url, "full", clients=64, each=1, tokens=100).run()
    outcomes = Counter((answer.status, answer.code) for answer in seen.answers)
    assert set(outcomes) == {(200, ""), (503, "queue_full")}, outcomes
    assert outcomes[200, ""] >= 4
    assert all(int(answer.retry_after) >= 1 for answer in seen.of(503).answers)


@pytest.fixture
def running(server: Server) -> tuple[Running, Workload]:
    """The server as the benchmarks see it, and single texts for it."""
    workload = replace(SINGLES, models=("quick",), clients=16)
    return Running(0.0, server, asking(server, 64)), workload


def test_the_serving_path_is_measured(running: tuple[Running, Workload]) -> None:
    """A small case of `make scale`: what each request costs where, apart from what idling does."""
    point = measure("models", 1, *running, 1.5)
    assert point.rate > 0
    assert 0 < point.by_role[INGRESS] < point.path
    assert point.path == pytest.approx(sum(point.by_role[role] for role in (FRONT, INGRESS, REPLICA)))
    assert (point.idle or 0) > 0
    assert table([point]).splitlines()[-1].startswith(f"| models | 1 | {shown(point.rate)} |")


def test_a_profile_shows_processes_and_stages(running: tuple[Running, Workload], tmp_path: Path) -> None:
    """A small case of `make profile`."""
    for seconds in (1.0, 5.0, 25.0):  # until there are samples of more than the loop, on a busy machine too
        lines = list(budget(*running, seconds, tmp_path))
        if any("HTTP: Serve and uvicorn" in line for line in lines):
            break
    assert lines[0].startswith(f"**{SINGLES.name}**")
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    where = ""
    costs: dict[str, float] = {}
    stages: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        if row[1:2] == ["all"]:
            where, costs[row[0]] = row[0], float(row[2].replace(",", ""))
        elif len(row) == 2:
            stages[where] += float(row[1].replace(",", ""))
    assert min(costs[name] for name in (FRONT, INGRESS, REPLICA)) > 0
    assert "HTTP: Serve and uvicorn" in {row[0] for row in rows if len(row) == 2}
    # What is below a hundredth isn't shown. Which stage a sample belongs to is a unit test's business.
    assert 0.5 * costs[INGRESS] < stages[INGRESS] < 1.1 * costs[INGRESS]
    assert {"parse", "call", "engine"} <= {row[0] for row in rows if len(row) == 3}
