"""What every engine must fulfil; run for `fake` in the quick tests, for `vllm` in the model tests."""

import asyncio

import numpy as np
import pytest

from deployments.engine import Engine, ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import EngineDeadError

TEXTS = ["Ray schedules actors.", "a", "The quick brown fox jumps over the lazy dog. " * 8, "Grüße, 東京 🙂"]


async def check_engine(engine: Engine, card: ModelCard, min_cosine: float) -> None:
    """Run the whole contract over a started engine, and stop it at the end."""
    tokenizer = TextTokenizer(card.tokenizer)
    inputs = tokenizer.encode(TEXTS)
    assert all(max(ids) < card.vocab_size for ids in inputs)
    batch = TokenBatch.of(inputs)

    vectors = await engine.embed(batch)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), card.dimension)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)

    alone = [await engine.embed(TokenBatch.of([ids])) for ids in inputs]
    assert_close(np.concatenate(alone), vectors, min_cosine)
    assert_close(await engine.embed(TokenBatch.of(inputs[::-1])), vectors[::-1], min_cosine)
    # Different inputs must give different vectors, or an order mistake couldn't show.
    assert (vectors @ vectors.T - np.eye(len(TEXTS))).max() < min_cosine

    together = await asyncio.gather(*(engine.embed(batch) for _ in range(8)))
    for result in together:
        assert_close(result, vectors, min_cosine)

    rows = await engine.embed_tokens(batch)
    assert rows.dtype == np.float32
    assert len(rows) == batch.tokens
    alone = await asyncio.gather(*(engine.embed_tokens(TokenBatch.of([ids])) for ids in inputs))
    assert_close(np.concatenate(alone), rows, min_cosine)

    cancelled = asyncio.ensure_future(engine.embed(TokenBatch.of(inputs * 50)))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert_close(await engine.embed(batch), vectors, min_cosine)

    engine.check()
    engine.stop()
    engine.stop()
    with pytest.raises(EngineDeadError):
        engine.check()
    with pytest.raises(EngineDeadError):
        await engine.embed(batch)


def assert_close(got: np.ndarray, expected: np.ndarray, min_cosine: float) -> None:
    """Assert that each row points where the expected one does."""
    assert got.shape == expected.shape
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (got * expected).sum(axis=1) / norms
    assert cosines.min() >= min_cosine, cosines
