"""Bulk work yields to those who wait, and is whole when nobody does."""

import asyncio

import numpy as np

from deployments.config.worker import FakeEngineArgs
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import FakeEngine, fake_vectors
from deployments.engine.turns import MAX_CALM_SECONDS, MAX_SLICES, MIN_CALM_SECONDS, RECENT_PAUSES, Turns
from deployments.errors import EngineCrashError, EngineDeadError

BULK = TokenBatch.of([[n % 256, n // 256, *[7] * (n % 30)] for n in range(400)])
ONE = TokenBatch.of([[1, 2, 3]])


class RecordingEngine(FakeEngine):
    """Remembers the batches in the order in which they came."""

    def __init__(self, call_seconds: float = 0.0) -> None:
        """Take a moment for each token, and for each call."""
        super().__init__(FakeEngineArgs(call_seconds=call_seconds, token_seconds=0.00002))
        self.batches: list[TokenBatch] = []

    async def embed(self, batch: TokenBatch) -> np.ndarray:
        """Record, then embed."""
        self.batches.append(batch)
        return await super().embed(batch)


async def test_bulk_calls_are_whole_while_nobody_waits() -> None:
    """One after the other."""
    engine = RecordingEngine()
    turns = Turns(engine)
    calls = [asyncio.ensure_future(turns.embed(BULK, bulk=True)) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(engine.batches) == 1
    for vectors in await asyncio.gather(*calls):
        assert np.array_equal(vectors, fake_vectors(BULK, 64))
    assert [len(batch) for batch in engine.batches] == [len(BULK)] * 3


async def test_who_waits_goes_between_two_slices() -> None:
    """Past all the bulk calls, which are in slices from then on; the rows stay in order."""
    engine = RecordingEngine()
    turns = Turns(engine)
    await turns.embed(BULK, bulk=True)
    await turns.embed(ONE, bulk=False)
    calls = [asyncio.ensure_future(turns.embed(BULK, bulk=True)) for _ in range(3)]
    await asyncio.sleep(0)
    await turns.embed(ONE, bulk=False)
    assert not any(call.done() for call in calls)
    for vectors in await asyncio.gather(*calls):
        assert np.array_equal(vectors, fake_vectors(BULK, 64))
    slices = [batch for batch in engine.batches[2:] if len(batch) > 1]
    assert 3 < len(slices) <= 3 * (MAX_SLICES + 1)
    assert sum(map(len, slices)) == 3 * len(BULK)


async def test_a_suspect_is_in_the_engine_with_nobody_else() -> None:
    """Who was there leaves first; who comes meanwhile, bulk work or not, finds the engine that it left."""
    turns = Turns(FakeEngine(FakeEngineArgs(call_seconds=0.01, fatal_token=9)))

    def embed(batch: TokenBatch, bulk: bool = False, suspect: bool = False) -> "asyncio.Future[np.ndarray]":
        return asyncio.ensure_future(turns.embed(batch, bulk, suspect))

    before = [embed(ONE), embed(ONE)]
    await asyncio.sleep(0)
    suspects = [embed(TokenBatch.of([[token]]), suspect=True) for token in (1, 9)]
    await asyncio.sleep(0)
    after = [embed(ONE, bulk) for bulk in (False, True, False, True)]
    *served, fatal = await asyncio.gather(*before, *suspects, return_exceptions=True)
    for vectors, batch in zip(served, (ONE, ONE, TokenBatch.of([[1]])), strict=True):
        assert isinstance(vectors, np.ndarray)
        assert np.array_equal(vectors, fake_vectors(batch, 64))
    assert type(fatal) is EngineCrashError
    strangers = await asyncio.gather(*after, return_exceptions=True)
    assert [type(each) for each in strangers] == [EngineDeadError] * 4


async def test_bulk_calls_are_whole_again_soon_after_many_who_came_quickly() -> None:
    """But not so soon after one who comes seldom, who would else always wait for a whole one.

    A single long pause is no habit: it is where the work of a while began.
    """
    now = 100.0
    engine = RecordingEngine()
    turns = Turns(engine, clock=lambda: now)
    await turns.embed(BULK, bulk=True)

    async def slices_after(pause: float, callers: int, wait: float) -> int:
        nonlocal now
        for _ in range(callers):
            now += pause
            await turns.embed(ONE, bulk=False)
        now += wait
        begun = len(engine.batches)
        await turns.embed(BULK, bulk=True)
        return len(engine.batches) - begun

    assert await slices_after(0.02, RECENT_PAUSES + 1, MIN_CALM_SECONDS / 2) > 1
    assert await slices_after(0.02, RECENT_PAUSES + 1, MIN_CALM_SECONDS * 1.1) == 1
    assert await slices_after(10.0, 1, 2.0) == 1
    assert await slices_after(1.0, 1, 2.0) > 1
    assert await slices_after(1.0, 1, MAX_CALM_SECONDS * 1.1) == 1


async def test_no_slice_enters_the_engine_with_a_call_that_doesnt_yield() -> None:
    """Their step would last as long as both."""
    engine = RecordingEngine(call_seconds=0.01)
    turns = Turns(engine)
    call = asyncio.ensure_future(turns.embed(ONE, bulk=False))
    await asyncio.sleep(0)
    bulk = asyncio.ensure_future(turns.embed(BULK, bulk=True))
    await call
    assert engine.batches == [ONE]
    assert np.array_equal(await bulk, fake_vectors(BULK, 64))


async def test_no_slice_begins_while_an_answer_is_on_its_way() -> None:
    """It would take the cores that the answer needs."""
    engine = RecordingEngine()
    turns = Turns(engine, answer_seconds=0.05)
    await turns.embed(ONE, bulk=False)
    answered = asyncio.get_running_loop().time()
    await turns.embed(ONE, bulk=True)
    assert asyncio.get_running_loop().time() >= answered + 0.05


async def test_bulk_work_gets_on_however_many_come() -> None:
    """There is always a call in the engine that doesn't yield, and mostly two."""
    turns = Turns(RecordingEngine(call_seconds=0.001), answer_seconds=0.001)
    done = asyncio.Event()

    async def come() -> None:
        while not done.is_set():
            await turns.embed(ONE, bulk=False)

    callers = [asyncio.ensure_future(come()) for _ in range(2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        assert np.array_equal(await turns.embed(BULK, bulk=True), fake_vectors(BULK, 64))
    done.set()
    await asyncio.gather(*callers)


async def test_slices_are_longer_where_every_step_costs_much() -> None:
    """They grow to a few times what the shortest call took, rather than be all cost."""
    engine = RecordingEngine(call_seconds=0.1)
    turns = Turns(engine)
    await turns.embed(ONE, bulk=True)
    for _ in range(3):
        await turns.embed(ONE, bulk=False)
        await turns.embed(BULK, bulk=True)
    slices = [batch for batch in engine.batches[1:] if batch is not ONE]
    assert sum(map(len, slices)) == 3 * len(BULK)
    assert len(slices) <= 1.5 * MAX_SLICES  # not thrice as many


async def test_a_bulk_call_that_is_cancelled_lets_the_next_one_in() -> None:
    """Whether it waits or is in the engine."""
    turns = Turns(RecordingEngine())
    calls = [asyncio.ensure_future(turns.embed(BULK, bulk=True)) for _ in range(3)]
    await asyncio.sleep(0)
    calls[0].cancel()
    calls[1].cancel()
    assert np.array_equal(await calls[2], fake_vectors(BULK, 64))


def test_a_slice_of_a_batch_is_the_batch_of_the_slice() -> None:
    """Also an empty one."""
    batch = TokenBatch.of([[1, 2], [3], [4, 5, 6]])
    assert [ids.tolist() for ids in batch[1:]] == [[3], [4, 5, 6]]
    assert [ids.tolist() for ids in batch[0:2]] == [[1, 2], [3]]
    assert len(batch[3:]) == batch[3:].tokens == 0
