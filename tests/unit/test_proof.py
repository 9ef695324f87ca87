"""What a replica finds out of its engine before it lets anybody in."""

import logging

import numpy as np
import pytest

from deployments.config.worker import FakeEngineArgs
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import FakeEngine
from deployments.errors import EngineStartError
from deployments.replica.proof import prove


class Constant(FakeEngine):
    """One vector for all texts."""

    async def embed(self, batch: TokenBatch, bulk: bool = False, alone: bool = False) -> np.ndarray:
        """Return ones."""
        return np.ones((len(batch), 64), np.float32)


class Broken(FakeEngine):
    """No vector for any text."""

    async def embed(self, batch: TokenBatch, bulk: bool = False, alone: bool = False) -> np.ndarray:
        """Return NaN."""
        return np.full((len(batch), 64), np.nan, np.float32)


class Moody(FakeEngine):
    """Other vectors for a text beside others than alone."""

    async def embed(self, batch: TokenBatch, bulk: bool = False, alone: bool = False) -> np.ndarray:
        """Return the vectors of another text where there are several."""
        return np.roll(await super().embed(batch, bulk, alone), len(batch) > 1, axis=0)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (Constant(), "the model gives all texts the same vector"),
        (Moody(), "the model gives a text another vector beside others than alone"),
        (Broken(), "the model gives vectors with NaN or infinity in them, or zeros alone"),
    ],
)
async def test_an_engine_of_useless_vectors_doesnt_start(engine: FakeEngine, reason: str) -> None:
    """Told in a line."""
    card = engine.start()
    with pytest.raises(EngineStartError) as refused:
        await prove("m", engine, card)
    assert refused.value.message == reason


async def test_a_text_without_a_vector_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The others are served."""
    engine = FakeEngine(FakeEngineArgs(nan_token=90))  # a brace, which code alone has
    with caplog.at_level(logging.WARNING, "ray.serve"):
        await prove("m", engine, engine.start())
    assert caplog.messages == ["m: the model has no vector for code: it comes as NaN, infinity or zeros"]
