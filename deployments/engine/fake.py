"""A stand-in for tests and load studies: no weights, a set service time, telling vectors.

A vector is a pure function of its input's token ids, and differs for every input: results that were
swapped, dropped or doubled on their way show at once. `fake_vectors` says what is right.
"""

import asyncio
import os
import time
import zlib
from pathlib import Path

import numpy as np

from deployments.config.worker import FakeEngineArgs
from deployments.engine import Engine, ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.tokenizer import byte_tokenizer
from deployments.errors import EngineError, EngineStartError

VOCAB_SIZE = 256
MAX_MODEL_LEN = 8192
STEP_TOKENS = 16_384
# The tokenizer has none; chat templates may name it.
SPECIAL_TOKENS = {"bos_token": "<s>"}


def fake_vectors(batch: TokenBatch, dimension: int, seed: int = 0) -> np.ndarray:
    """Return unit vectors of shape (len(batch), dimension), float32: a hash of seed and ids, spread out."""
    hashes = (zlib.crc32(ids.astype(np.int32).tobytes(), seed) for ids in batch)
    seeds = np.fromiter(hashes, np.float64, len(batch))
    steps = np.sqrt(np.arange(2, dimension + 2, dtype=np.float64))
    vectors: np.ndarray = np.sin(seeds[:, None] * steps[None, :])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


class FakeEngine(Engine):
    """Computes steps as a device does: each takes `call_seconds`, and `token_seconds` for each token."""

    def __init__(self, arguments: FakeEngineArgs | None = None, max_model_len: int | None = None) -> None:
        """Set the size of the vectors and the times."""
        super().__init__(STEP_TOKENS)
        self._arguments = arguments or FakeEngineArgs()
        self._max_model_len = max_model_len or MAX_MODEL_LEN
        self._running: asyncio.Task[None] | None = None

    def start(self) -> ModelCard:
        """Wait for the set time, as if weights were loaded; fail if told to."""
        time.sleep(self._arguments.start_seconds)
        if self._arguments.start_error:
            raise EngineStartError(self._arguments.start_error)
        return ModelCard(
            byte_tokenizer(),
            self._arguments.dimension,
            self._max_model_len,
            VOCAB_SIZE,
            chat_template=self._arguments.chat_template,
            special_tokens=SPECIAL_TOKENS,
            token_dimension=self._arguments.dimension,
        )

    async def embed(self, batch: TokenBatch, bulk: bool = False, alone: bool = False) -> np.ndarray:
        """Return `fake_vectors` after the service time; NaN for an input with `nan_token` in it."""
        rows = self._queue.put(batch, bulk, alone)
        if self._arguments.calls_folder:
            self._record(batch)
        self._wake()
        return await rows

    async def embed_tokens(self, batch: TokenBatch, bulk: bool = False) -> np.ndarray:
        """Return `fake_vectors` of each token by itself."""
        rows = self._queue.put(batch, bulk, by_token=True)
        self._wake()
        return await rows

    def _wake(self) -> None:
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while (step := self._queue.take()) is not None:
            seconds = self._arguments.call_seconds + step.batch.tokens * self._arguments.token_seconds
            if seconds:
                await asyncio.sleep(seconds)
            if self._arguments.fatal_token in step.batch.ids:
                self._queue.close("the engine has ended: it met its fatal token")
                self._queue.fail_all([step])
            elif self._arguments.error_token in step.batch.ids:
                self._queue.fail(step, EngineError("the engine met its error token"))
            else:
                ids = step.batch.ids
                batch = TokenBatch(ids, np.ones_like(ids)) if step.by_token else step.batch
                self._queue.done(step, self._vectors(batch), seconds)
        self._running = None

    def _record(self, batch: TokenBatch) -> None:
        with Path(self._arguments.calls_folder, str(os.getpid())).open("a") as file:
            file.write(f"{batch.tokens}\n")

    def _vectors(self, batch: TokenBatch) -> np.ndarray:
        vectors = fake_vectors(batch, self._arguments.dimension, self._arguments.seed)
        if self._arguments.nan_token in batch.ids:
            vectors[[self._arguments.nan_token in ids for ids in batch]] = np.nan
        return vectors

    def stop(self) -> None:
        """Refuse from now on."""
        self._queue.close("the engine was stopped")
        self._queue.fail_all()
