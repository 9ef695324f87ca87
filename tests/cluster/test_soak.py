"""Everything at once while processes are killed, for a minute and a half; `make soak` takes half an hour."""

import pytest

from benchmarks.soak import DIALECTS, soak

pytestmark = pytest.mark.cluster
SECONDS, KILL_SECONDS = 80.0, 15.0
# An ingress, the controller, a replica, the runner of batches, HAProxy.
SEED = 518


def test_nothing_is_lost_wrong_or_left_while_processes_are_killed() -> None:
    """All dialects, wrong keys, batches, jobs, edits of the worker files; five processes are killed."""
    seen, _ = soak(SECONDS, SEED, KILL_SECONDS)
    assert seen.lost == []
    assert seen.wrong == []
    assert seen.left == []
    assert seen.killed.total() == 5
    done = {kind for kind, count in seen.right.items() if count}
    assert done == {*DIALECTS, "wrong keys", "batch lines", "job rows", "reloads"}
