"""The application on several raylets: one of them dies, one comes and goes with the load."""

import contextlib
from pathlib import Path

import httpx
import psutil
import pytest

from tests.harness import workers
from tests.harness.faults import FAULTS, run, served
from tests.harness.nodes import SECOND, nodes, serve_on
from tests.harness.server import Server, wait_for

pytestmark = pytest.mark.cluster


def on_second_node(server: Server, title: str = "") -> list[int]:
    """Return the second node's processes whose title holds the text: they listen on its address."""
    found = []
    for process in server.titled(title):
        with contextlib.suppress(psutil.Error):
            if any(each.laddr and SECOND in each.laddr.ip for each in process.net_connections()):
                found.append(process.pid)
    return found


def test_nothing_is_lost_with_a_node() -> None:
    """The second raylet is killed under load, and a replica of the model with it: all answers are right.

    `make faults` does so on the other data plane too.
    """
    (fault,) = (each for each in FAULTS if each.two_nodes)
    with served(fault, tuned=True) as server:
        assert len(on_second_node(server, "ServeReplica:default:m")) == 1
        result = run(server, fault, after=6.0)
        assert result is not None
        load, row = result
        assert not load.lost, (row, load.lost[:3])
        assert load.wrong == 0
        assert len(load.began) > 20
        assert len(server.titled("ServeReplica:default:m")) == 1
        wait_for(lambda: not on_second_node(server), 60, "nothing of the second node is left")


def embed(server: Server, model: str) -> int:
    """Embed a text and return the answer's status."""
    body = {"model": model, "input": "x"}
    return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=90).status_code


def test_a_node_comes_and_goes_with_the_demand(tmp_path: Path) -> None:
    """A model that has no room on the head gets a node; idle, both go, and return with a request."""
    config = tmp_path / "workers"
    config.mkdir()
    scaling = """\
[deployment]
num_cpus = 2

[deployment.autoscaling]
min_replicas = 0
initial_replicas = 1
max_replicas = 1
upscale_delay_s = 0
downscale_delay_s = 1
downscale_to_zero_delay_s = 1
metrics_interval_s = 0.5
look_back_period_s = 1
"""
    (config / "small.toml").write_text(workers.fake("small"))
    (config / "large.toml").write_text(workers.fake("large", more=scaling))
    with nodes(tmp_path) as cluster:
        cluster.start_autoscaling(head_cpus=1, worker_cpus=2)
        with serve_on(cluster, config) as server:
            raylets = lambda: len(server.titled("raylet/raylet "))  # noqa: E731
            large = lambda: len(server.titled("ServeReplica:default:large"))  # noqa: E731
            # It may have come for the first replica and be gone, where the server's start took long.
            assert embed(server, "large") == 200
            assert raylets() == 2
            wait_for(lambda: large() == 0, 90, "no replica without requests")
            wait_for(lambda: raylets() == 1, 90, "no node without a replica")
            assert embed(server, "small") == 200  # runs on the head
            assert raylets() == 1
            assert embed(server, "large") == 200  # the request waits for the node
            assert raylets() == 2
            wait_for(lambda: raylets() == 1, 90, "the node has gone again")
            # The autoscaler ends a node's log monitor after its raylet. The test has to wait for that: the
            # head takes the autoscaler along, and nothing else would end the log monitor.
            wait_for(
                lambda: len(server.titled("log_monitor.py")) == 1, 90, "its log monitor has gone as well"
            )
