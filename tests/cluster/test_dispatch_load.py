"""The dispatch under load on a real server: what is split, joined, refused. Times are for `make dispatch`."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.dispatch import calls_made, calls_seen
from benchmarks.load import Stream
from tests import workers
from tests.server import Server, serve

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engines of `two` write down their calls."""
    return tmp_path_factory.mktemp("calls")


@pytest.fixture(scope="module")
def server(calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model with two replicas, one whose calls take a moment, one that little may wait for."""
    folder = tmp_path_factory.mktemp("server")
    config = folder / "workers"
    config.mkdir()
    two = f'token_seconds = 0.00001, calls_folder = "{calls}"'
    files = {
        "two": workers.fake("two", two, "[deployment]\nnum_replicas = 2"),
        "one": workers.fake("one", "call_seconds = 0.02"),
        "full": workers.fake("full", "token_seconds = 0.001", "[limits]\nmax_outstanding_tokens = 500"),
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
