"""While a GPU computes a step the host begins the next one; who waits gets the right rows however it ends."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deployments.engine import ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import VOCAB_SIZE, fake_vectors
from deployments.engine.thread import ThreadEngine, Way
from deployments.engine.tokenizer import byte_tokenizer
from deployments.errors import EngineCrashError, EngineDeadError, EngineError
from tests.harness.server import wait_for

DIMENSION, TOKENS = 8, 3
REFUSED, FAILED, FATAL_AT_BEGIN, FATAL_AT_END = 11, 12, 13, 14


class Device(Way):
    """A device that computes the steps which were begun once the test lets it."""

    ahead = 1

    def __init__(self) -> None:
        """Have begun none."""
        self.begun: list[int] = []
        self.given: list[int] = []
        self.may_begin, self.may_end = threading.Event(), threading.Semaphore(0)

    def embed(self, batch: TokenBatch) -> np.ndarray:
        """Not called: `begin` is."""
        raise AssertionError

    def begin(self, batch: TokenBatch, by_token: bool = False) -> Callable[[], np.ndarray]:
        """Begin, and fail as the first id says."""
        first = int(batch.ids[0])
        assert self.may_begin.wait(10)
        self.begun.append(first)
        if first == REFUSED:
            raise EngineError("refused")
        if first == FATAL_AT_BEGIN:
            raise RuntimeError("gone")

        def vectors() -> np.ndarray:
            assert self.may_end.acquire(timeout=10)
            self.given.append(first)
            if first == FAILED:
                raise EngineError("failed")
            if first == FATAL_AT_END:
                raise RuntimeError("gone")
            return fake_vectors(batch, DIMENSION)

        return vectors


class Engine(ThreadEngine):
    """An engine with that device; each input fills a step."""

    def __init__(self) -> None:
        """Have a plan without a model."""
        plan: Any = SimpleNamespace(engine_args={"max_num_batched_tokens": TOKENS}, device="gpu", name="m")
        super().__init__(plan)
        self.device = Device()

    def _load(self) -> tuple[Way, ModelCard]:
        return self.device, ModelCard(byte_tokenizer(), DIMENSION, TOKENS, VOCAB_SIZE)

    def _odd_weights(self, vocab_size: int) -> Iterable[str]:
        return ()


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """One that has started."""
    engine = Engine()
    await asyncio.to_thread(engine.start)
    yield engine
    engine.device.may_end.release(100)
    await asyncio.to_thread(engine.stop)


def batch_of(first: int) -> TokenBatch:
    """Return one input, which fills a step."""
    return TokenBatch.of([[first, *[7] * (TOKENS - 1)]])


async def put(engine: Engine, *firsts: int) -> list[asyncio.Task[np.ndarray]]:
    """Ask for these before the first is begun, and let the device begin."""
    tasks = []
    for first in firsts:
        tasks.append(asyncio.create_task(engine.embed(batch_of(first))))
        await asyncio.sleep(0)
    engine.device.may_begin.set()
    return tasks


async def begins(engine: Engine, *firsts: int) -> None:
    """Wait until exactly these were begun."""
    await asyncio.to_thread(wait_for, lambda: engine.device.begun == list(firsts), 10, "the steps begin")


async def test_one_step_is_begun_while_another_is_computed(engine: Engine) -> None:
    """Not two; and one that nobody follows is waited for at once."""
    calls = await put(engine, 1, 2, 3)
    await begins(engine, 1, 2)
    assert not any(call.done() for call in calls)
    engine.device.may_end.release()
    await begins(engine, 1, 2, 3)
    engine.device.may_end.release(2)
    for first, call in zip((1, 2, 3), calls, strict=True):
        assert np.array_equal(await call, fake_vectors(batch_of(first), DIMENSION))
    assert engine.device.given == [1, 2, 3]
    assert engine.steps == 3


@pytest.mark.parametrize("bad", [REFUSED, FAILED])
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_a_step_that_fails_takes_no_other_with_it(engine: Engine, bad: int, place: int) -> None:
    """Whether it fails as it begins or as its vectors are waited for, and wherever it stands."""
    firsts = [1, 2]
    firsts.insert(place, bad)
    engine.device.may_end.release(10)
    for first, call in zip(firsts, await put(engine, *firsts), strict=True):
        if first == bad:
            with pytest.raises(EngineError, match=r"^(refused|failed)$"):
                await call
        else:
            assert np.array_equal(await call, fake_vectors(batch_of(first), DIMENSION))
    engine.check()


@pytest.mark.parametrize("bad", [FATAL_AT_BEGIN, FATAL_AT_END])
async def test_all_steps_that_were_begun_may_be_the_reason_of_an_end(engine: Engine, bad: int) -> None:
    """What waits in line isn't."""
    calls = await put(engine, 1, bad, 3)
    await begins(engine, 1, bad)
    engine.device.may_end.release(10)
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(ended[1], EngineCrashError)
    # The first one's rows had come before where the second ended as it was waited for.
    assert isinstance(ended[0], EngineCrashError if bad == FATAL_AT_BEGIN else np.ndarray)
    assert isinstance(ended[2], EngineDeadError)
    with pytest.raises(EngineDeadError, match=r"^the engine has ended: gone$"):
        engine.check()
