"""A replica as Ray Serve and its callers on the same node meet it, without Ray."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.config.load import load_workers
from deployments.engine import ADDRESS
from deployments.engine.batch import NOBODY, TokenBatch
from deployments.engine.fake import fake_vectors
from deployments.errors import EngineCrashError, EngineError, EngineStartError
from deployments.plan.placement import Machine
from deployments.plan.plan import make_plans
from deployments.replica.replica import Replica
from deployments.transport.local import LocalClient
from tests.harness import workers

BATCH = TokenBatch.of([[1, 2, 3], [4, 5]])


async def start(tmp_path: Path, engine_args: str = "") -> Any:
    """Return a replica that has started."""
    file = tmp_path / "m.toml"
    file.write_text(workers.fake("m", engine_args))
    (plan,) = make_plans(load_workers(file, environ={}), Machine(2, 0, 2))
    replica: Any = Replica.__new__(Replica)
    await replica.__init__(plan)
    return replica


async def test_the_engine_stops_after_the_last_answer(tmp_path: Path) -> None:
    """Ray Serve awaits what the destructor returns; calls that came without it are under way until then."""
    replica = await start(tmp_path, "call_seconds = 0.2")
    stopped = asyncio.Event()
    replica._engine.stop = stopped.set
    address = replica.record_replica_metadata()[ADDRESS]
    client = LocalClient()
    assert not client.reaches(address)
    await asyncio.gather(*client._connecting.values())
    assert client.reaches(address)

    call = client.call(address, BATCH, NOBODY)
    async with asyncio.timeout(60):
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


class Steps:
    """In an engine's place: a call of a step for each input, which the test lets end one by one."""

    def __init__(self, replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place, of which the replica's health checks know nothing."""
        self._engine = replica._engine
        self.next = asyncio.Semaphore(0)
        monkeypatch.setattr(self._engine, "embed", self.embed)

    async def embed(self, batch: TokenBatch, *lane: bool) -> np.ndarray:
        """Make a step whenever the test says so."""
        for _ in range(len(batch)):
            await self.next.acquire()
            self._engine._queue.steps += 1
        return fake_vectors(batch, 64)


async def test_a_replica_is_healthy_for_as_long_as_its_engine_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a call is that the canary waits behind; ill is one that makes no step."""
    monkeypatch.setattr("deployments.replica.replica.CANARY_SECONDS", 0.05)
    replica = await start(tmp_path)
    steps = Steps(replica, monkeypatch)
    call = asyncio.ensure_future(replica.embed(TokenBatch.of([[n] for n in range(100)])))
    for _ in range(3):
        check = asyncio.ensure_future(replica.check_health())
        await asyncio.sleep(0)
        steps.next.release()
        await check
    with pytest.raises(EngineError, match="no step"):
        await replica.check_health()
    for _ in range(200):
        steps.next.release()
    await call
    await replica.check_health()


async def test_a_step_may_take_as_long_as_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the warm-up tells of this model on this machine: on a slow one it may take minutes."""
    monkeypatch.setattr("deployments.replica.replica.CANARY_SECONDS", 0.05)
    replica = await start(tmp_path)
    steps = Steps(replica, monkeypatch)
    replica._longest_step = 3600.0
    call = asyncio.ensure_future(replica.embed(BATCH))
    for _ in range(3):
        await replica.check_health()
    replica._longest_step = 0.0
    with pytest.raises(EngineError, match="no step"):
        await replica.check_health()
    steps.next.release()
    steps.next.release()
    await call


async def test_an_id_beyond_the_vocabulary_never_reaches_the_engine(tmp_path: Path) -> None:
    """From a handle of somebody's own there is no gateway before it; the engine lives on."""
    replica = await start(tmp_path)
    made = replica._engine.steps
    for token in (-1, 256):
        with pytest.raises(EngineError, match="vocabulary of 256"):
            await replica.embed(TokenBatch.of([[1, token]]))
    assert replica._engine.steps == made
    await replica.embed(BATCH)


async def test_an_engine_that_ends_in_its_warm_up_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process stays until Ray Serve has been told, which tells nothing of one that has gone."""
    monkeypatch.setattr("deployments.replica.replica.LAST_WORDS_SECONDS", 0.0)
    monkeypatch.setattr("os._exit", lambda _: ended.append(1))
    ended: list[int] = []
    with pytest.raises(EngineStartError, match="worker m: the engine has ended: it met its fatal token"):
        await start(tmp_path, "fatal_token = 255")
    for _ in range(5):
        await asyncio.sleep(0)
    assert not ended
    # A byte that no text has.
    replica = await start(tmp_path, "fatal_token = 187")
    with pytest.raises(EngineCrashError):
        await replica.embed(TokenBatch.of([[187]]))
    async with asyncio.timeout(60):
        while not ended:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)


async def test_a_model_of_nan_doesnt_start(tmp_path: Path) -> None:
    """It could answer nobody."""
    with pytest.raises(EngineStartError, match="worker m: the model gives vectors with NaN"):
        await start(tmp_path, "nan_token = 255")
