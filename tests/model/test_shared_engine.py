"""A small case of `make batch` on the real model: a timed client, a person beside each bulk work."""

import pytest

from benchmarks.batch import BESIDE, beside, in_process, rss_at
from tests.harness.jobs import address_of
from tests.harness.server import Server

pytestmark = pytest.mark.model


def test_a_client_is_timed(two_models: Server) -> None:
    """Its tokens, its seconds, and its memory over them."""
    run = in_process("client", 600, RAY_ADDRESS=address_of(two_models))
    assert run.tokens > 600
    assert run.rate > 0
    assert min(rss_at(run, 0.25), rss_at(run, 1.0)) > 0


@pytest.mark.parametrize("what", list(BESIDE))
def test_a_person_is_served_beside_bulk_work(two_models: Server, what: str) -> None:
    """No request of a person's fails while the bulk work goes on."""
    *percentiles, failed = beside(two_models, what, rounds=1, seconds=2.0, rows=3000)
    assert len(percentiles) == 2
    assert failed.met
