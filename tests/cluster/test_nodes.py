"""The application on several raylets: one of them dies, one comes and goes with the load."""

import contextlib

import psutil
import pytest

from benchmarks.faults import FAULTS, run, served
from tests.nodes import SECOND
from tests.server import Server, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def on_second_node(server: Server, title: str = "") -> list[int]:
    """Return the second node's processes whose title holds the text: they listen on its address."""
    found = []
    for process in server.titled(title):
        with contextlib.suppress(psutil.Error):
            if any(each.laddr and SECOND in each.laddr.ip for each in process.net_connections()):
                found.append(process.pid)
    return found


@pytest.mark.parametrize("tuned", [True, False], ids=["tuned", "serve-run"])
def test_nothing_is_lost_with_a_node(tuned: bool) -> None:
    """The second raylet is killed under load, and a replica of the model with it: all answers are right."""
    (fault,) = (each for each in FAULTS if each.two_nodes)
    with served(tuned, two_nodes=True) as server:
        wait_for(lambda: len(server.titled("ServeReplica:default:m")) == 2, 60, "two replicas")
        assert len(on_second_node(server, "ServeReplica:default:m")) == 1
        result = run(server, fault, after=6.0)
        assert result is not None
        load, row = result
        assert not load.lost, (row, load.lost[:3])
        assert load.wrong == 0
        assert len(load.began) > 200
        assert len(server.titled("ServeReplica:default:m")) == 1
        wait_for(lambda: not on_second_node(server), 60, "nothing of the second node is left")
