"""A replica as Ray Serve and its callers on the same node meet it, without Ray."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from deployments.config.load import load_workers
from deployments.config.plan import Machine, make_plans
from deployments.engine import ADDRESS
from deployments.engine.batch import NOBODY, TokenBatch
from deployments.engine.fake import fake_vectors
from deployments.local_calls import LocalClient
from deployments.replica import Replica
from tests import workers

BATCH = TokenBatch.of([[1, 2, 3], [4, 5]])


async def test_the_engine_stops_after_the_last_answer(tmp_path: Path) -> None:
    """Ray Serve awaits what the destructor returns; calls that came without it are under way until then."""
    file = tmp_path / "m.toml"
    file.write_text(workers.fake("m", "call_seconds = 0.2"))
    (plan,) = make_plans(load_workers(file, environ={}), Machine(2, 0, 2))
    replica: Any = Replica.__new__(Replica)
    await replica.__init__(plan)
    stopped = asyncio.Event()
    replica._engine.stop = stopped.set
    address = replica.record_replica_metadata()[ADDRESS]
    client = LocalClient()
    assert not client.reaches(address)
    await asyncio.gather(*client._connecting.values())
    assert client.reaches(address)

    call = client.call(address, BATCH, NOBODY)
    async with asyncio.timeout(10):
        while not replica._server.is_busy:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        ending = asyncio.ensure_future(replica.__del__())
        await asyncio.sleep(0)
        assert not stopped.is_set()
        embedded = await call
        assert np.array_equal(embedded.vectors, fake_vectors(BATCH, 64))
        await ending
    assert stopped.is_set()
    assert replica.__del__() is None
