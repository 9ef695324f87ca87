"""The stand-in engine fulfils the contract, and its vectors show mistakes."""

import asyncio

import numpy as np

from deployments.config.worker import FakeEngineArgs
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import FakeEngine, fake_vectors
from tests.harness.engine_contract import check_engine


async def test_fake_fulfils_the_contract() -> None:
    """The same checks that vLLM passes."""
    engine = FakeEngine(FakeEngineArgs(dimension=32, call_seconds=0.001))
    await check_engine(engine, engine.start(), 0.999999)


async def test_steps_are_computed_one_at_a_time() -> None:
    """As by a busy device: four steps take four times the service time."""
    engine = FakeEngine(FakeEngineArgs(call_seconds=0.05))
    engine.start()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await asyncio.gather(*(engine.embed(TokenBatch.of([[1]]), alone=True) for _ in range(4)))
    assert loop.time() - begun >= 0.2


def test_a_batch_gives_back_its_inputs() -> None:
    """Flat arrays and lists are the same thing."""
    batch = TokenBatch.of([[1, 2], [3], [4, 5, 6]])
    assert [ids.tolist() for ids in batch] == [[1, 2], [3], [4, 5, 6]]
    assert (len(batch), batch.tokens) == (3, 6)


def test_vectors_depend_on_the_tokens_alone() -> None:
    """Not on the batch, and a thousand inputs have a thousand vectors."""
    inputs = [[number % 256, number // 256] for number in range(1000)]
    vectors = fake_vectors(TokenBatch.of(inputs), 16)
    assert np.array_equal(fake_vectors(TokenBatch.of(inputs[7:8]), 16)[0], vectors[7])
    assert len(np.unique(vectors, axis=0)) == 1000
