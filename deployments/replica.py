"""One engine in one Ray Serve replica: start, warm up, prove, embed. No HTTP, no text.

worker plan → engine → model card; token batch → engine → checked float32 array
"""

import asyncio
import logging
import os
import socket

import numpy as np

from deployments.config.plan import WorkerPlan
from deployments.engine import ModelCard, make_engine
from deployments.engine.batch import TokenBatch
from deployments.errors import (
    EngineDeadError,
    EngineError,
    EngineStartError,
    NonFiniteEmbeddingError,
)

logger = logging.getLogger("ray.serve")

# Any short input does; these ids exist in every vocabulary that we have met.
CANARY_TOKENS = 5
# Batching changes the order of sums, so the canary's vector may differ in its last digits.
CANARY_MIN_COSINE = 0.99
CANARY_SECONDS = 20.0
PROBE_SECONDS = 2.0
# Long enough for the answers to calls in flight to leave, short enough that nobody is sent here.
LAST_WORDS_SECONDS = 0.1


class Replica:
    """The Ray Serve deployment of one worker."""

    def __init__(self, plan: WorkerPlan) -> None:
        """Start the engine and embed a canary. Raises EngineStartError with one line."""
        self._plan = plan
        self._engine = make_engine(plan)
        try:
            self._card = self._engine.start()
        except EngineStartError as error:
            # Serve shows the last line of a replica's failure: it has to say all.
            raise EngineStartError(f"worker {plan.name}: {error.message}") from None
        last = self._card.vocab_size - 1
        self._canary = TokenBatch.of([[last - i for i in range(min(CANARY_TOKENS, last))]])
        self._canary_vector: np.ndarray | None = None

    async def embed(self, batch: TokenBatch) -> np.ndarray:
        """Return float32 vectors of shape (len(batch), dimension), checked, in order.

        Raises NonFiniteEmbeddingError, EngineError, or EngineDeadError, after which this replica
        ends, so that Serve puts another in its place.
        """
        try:
            vectors = await self._engine.embed(batch)
        except EngineDeadError as error:
            self._end(error)
            raise
        self._prove(batch, vectors)
        return vectors

    async def describe(self) -> ModelCard:
        """Return the model's card; the ingress tokenises and checks by it."""
        return self._card

    async def check_health(self) -> None:
        """Ray Serve's health check: the canary embeds in time, to the vector that it had at first."""
        try:
            async with asyncio.timeout(CANARY_SECONDS):
                vector = (await self.embed(self._canary))[0]
        except TimeoutError:
            raise EngineError(f"the canary took longer than {CANARY_SECONDS:g} s") from None
        if self._canary_vector is None:
            self._canary_vector = vector
        norms = np.linalg.norm(vector) * np.linalg.norm(self._canary_vector)
        if float(vector @ self._canary_vector) < CANARY_MIN_COSINE * norms:
            raise EngineError("the canary embeds to another vector than at the start")
        for probe in self._plan.worker.monitoring.tcp_probes:
            await asyncio.to_thread(_probe, probe)

    def __del__(self) -> None:
        """Stop the engine and its processes when Serve lets go of the replica."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()

    def _prove(self, batch: TokenBatch, vectors: np.ndarray) -> None:
        expected = (len(batch), self._card.dimension)
        if vectors.shape != expected:
            raise EngineError(f"the engine gave shape {vectors.shape} for {expected}")
        if not np.isfinite(vectors).all():
            raise NonFiniteEmbeddingError("the model gave a vector with NaN or infinity in it")

    def _end(self, error: EngineDeadError) -> None:
        logger.error("%s: %s; this replica ends", self._plan.name, error.message)
        asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, os._exit, 1)


def _probe(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise EngineError(f"tcp_probes: {address} doesn't accept a connection: {error}") from None
