"""One engine in one Ray Serve replica: start, warm up, prove, embed. No HTTP, no text.

worker plan → engine → model card; token batch → engine → checked float32 array
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from deployments.engine import ADDRESS, VERSION, ModelCard, make_engine
from deployments.engine.batch import NOBODY, CallContext, Embedded, TokenBatch, cosines
from deployments.engine.tokenizer.cl100k import read_cl100k
from deployments.errors import (
    EmbeddingError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    ModelChangedError,
    NonFiniteEmbeddingError,
)
from deployments.metrics import engine_text
from deployments.plan.plan import WorkerPlan
from deployments.replica.proof import prove
from deployments.replica.scaling import ReplicaLoad
from deployments.transport.local import LocalServer

logger = logging.getLogger("ray.serve")

# Any short input does: the last ids of the vocabulary are there in every one.
CANARY_TOKENS = 5
# Batching changes the order of sums, so the canary's vector may differ in its last digits.
CANARY_MIN_COSINE = 0.99
CANARY_SECONDS = 20.0
PROBE_SECONDS = 2.0
PROBE_PAUSE_SECONDS = 1.0
# One batch of them brings up the engine's threads and buffers before a client waits for it.
WARM_UP_INPUTS = 64
# Long enough for the answers to calls in flight to leave, short enough that nobody is sent here.
LAST_WORDS_SECONDS = 0.1


class Replica:
    """The Ray Serve deployment of one worker."""

    async def __init__(self, plan: WorkerPlan) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Start the engine, warm it up, embed the canary. Raises EngineStartError with one line."""
        self._plan = plan
        self._has_started = False
        self._load = ReplicaLoad()
        self._silence = -1, 0.0  # the steps that the engine had made at a health check, and since when
        # For callers on this node; others come by Serve's handle.
        self._server = LocalServer(self.embed, session_folder())
        await self._await_probes()
        self._engine = make_engine(plan, ray_cpus())
        try:
            card = await asyncio.to_thread(self._engine.start)
            cl100k = await asyncio.to_thread(read_cl100k) if plan.worker.reads_cl100k else ()
            self._card = replace(card, cl100k=cl100k, version=plan.engine_version)
            tokens = range(1, min(CANARY_TOKENS, self._card.max_model_len) + 1)
            self._canary = TokenBatch.of([[self._card.vocab_size - token for token in tokens]])
            warm_up = await self._embed(TokenBatch.of([self._canary.ids.tolist()] * WARM_UP_INPUTS))
            if warm_up.not_finite:
                raise EngineStartError("the model gives vectors with NaN or infinity in them")
            if plan.engine != "fake":
                await prove(plan.name, self._engine, self._card)
            # A full step takes no longer for each token than this small one did.
            full = plan.engine_args.get("max_num_batched_tokens", 0) / warm_up.tokens
            self._longest_step = max(CANARY_SECONDS, warm_up.engine_seconds * full)
            self._canary_vectors = (await self._embed(self._canary)).vectors
            await self._server.start()
            self._has_started = True
        except EmbeddingError as error:
            # Serve shows the last line of a replica's failure: it has to say all.
            raise EngineStartError(f"worker {plan.name}: {error.message}") from None

    async def embed(self, batch: TokenBatch, call: CallContext = NOBODY) -> Embedded:
        """Return float32 vectors of shape (len(batch), dimension), checked, in order.

        Raises ModelChangedError where the ids were made for another version, EngineError, or EngineDeadError,
        after which this replica ends and Serve puts another in its place.
        """
        with self._counted(batch, call):
            return await self._embed(batch, call.bulk, call.suspect)

    async def embed_tokens(self, batch: TokenBatch, call: CallContext = NOBODY) -> np.ndarray:
        """Return float32 hidden states of shape (batch.tokens, hidden size), checked, in order.

        Raises what `embed` does, and NonFiniteEmbeddingError.
        """
        with self._counted(batch, call), self._ending():
            rows = await self._engine.embed_tokens(batch, call.bulk)
        if len(rows) != batch.tokens:
            raise EngineError(f"the engine gave {len(rows)} rows for {batch.tokens} tokens")
        if not np.isfinite(rows).all():
            raise NonFiniteEmbeddingError("the model gave a vector with NaN or infinity in it")
        return rows

    @contextlib.contextmanager
    def _counted(self, batch: TokenBatch, call: CallContext) -> Iterator[None]:
        """Count a call among the load, if it is one for this model."""
        if call.version and call.version != self._plan.engine_version:
            raise ModelChangedError("the model has changed")
        lowest = 0 if self._card.pools_prompt else -self._card.vocab_size
        if batch.tokens and not lowest <= batch.ids.min() <= batch.ids.max() < self._card.vocab_size:
            # Whoever asks by a handle of their own has no dispatch that checks; and it would end the engine.
            raise EngineError(f"a token id is beyond the vocabulary of {self._card.vocab_size}")
        self._load.begin(call)
        try:
            yield
        finally:
            self._load.end(call)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """End with the engine."""
        try:
            yield
        except EngineDeadError as error:
            if self._has_started:  # else Serve learns why it can't
                self._end(error)
            raise

    async def _embed(self, batch: TokenBatch, bulk: bool = True, suspect: bool = False) -> Embedded:
        begun = time.perf_counter()
        with self._ending():
            vectors = await self._engine.embed(batch, bulk, suspect)
        not_finite = self._prove(batch, vectors)
        seconds = time.perf_counter() - begun
        return Embedded(vectors, batch.tokens, seconds, self._engine.tokens_per_second, not_finite)

    async def describe(self, _: CallContext = NOBODY) -> ModelCard:
        """Return the model's card; the ingress tokenises and checks by it.

        The argument is for the router, which sees which version is asked for.
        """
        return self._card

    def record_replica_metadata(self) -> dict[str, Any]:
        """Tell the routers which version this is and where its node may call it.

        Ray Serve asks once, when the replica is ready.
        """
        return {VERSION: self._plan.engine_version, ADDRESS: self._server.address}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Ray Serve's controller of the load, for `TokenPolicy`."""
        return self._load.report(self._engine.tokens_per_second)

    async def engine_metrics(self) -> bytes:
        """Return the engine's own metrics in Prometheus's text format, and which engine it is."""
        return self._engine.metrics() + engine_text(self._plan.name, self._plan.engine, self._card.dtype)

    async def ping(self) -> None:
        """Raise EngineDeadError if this replica couldn't embed; for `/ready`, so it takes no time."""
        self._engine.check()

    async def check_health(self) -> None:
        """Ray Serve's health check: the canary embeds in time, to the vector that it had at first.

        It waits in line like everybody, behind however much there is: ill is an engine that makes no step.
        """
        if self._engine.steps != self._silence[0]:
            self._silence = self._engine.steps, time.monotonic()
        try:
            async with asyncio.timeout(CANARY_SECONDS):
                vectors = (await self._embed(self._canary)).vectors
        except TimeoutError:
            steps, since = self._silence
            seconds = time.monotonic() - since
            if self._engine.steps != steps or seconds < self._longest_step:
                return
            raise EngineError(f"the engine has made no step for {seconds:.0f} s") from None
        if not cosines(vectors, self._canary_vectors)[0] >= CANARY_MIN_COSINE:  # NaN is less than nothing
            raise EngineError("the canary embeds to another vector than at the start")

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Stop the engine and its processes when Serve lets go of the replica.

        Serve has waited for the calls that it knows of. Those that came without it remain: it awaits what
        this returns.
        """
        server = getattr(self, "_server", None)
        if server is not None and server.is_busy:
            return self._drain()
        self._stop()
        return None

    async def _drain(self) -> None:
        await self._server.drain()
        self._stop()

    def _stop(self) -> None:
        server = getattr(self, "_server", None)
        if server is not None:
            server.close()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()

    async def _await_probes(self) -> None:
        """Wait until every address of `monitoring.tcp_probes` accepts a connection."""
        for address in self._plan.worker.monitoring.tcp_probes:
            host, _, port = address.rpartition(":")
            while not await _accepts(host.strip("[]"), int(port)):
                logger.warning("%s: waiting for tcp_probes %s", self._plan.name, address)
                await asyncio.sleep(PROBE_PAUSE_SECONDS)

    def _prove(self, batch: TokenBatch, vectors: np.ndarray) -> tuple[int, ...]:
        """Return the indices of vectors that aren't finite. Raises EngineError for a wrong shape."""
        expected = (len(batch), self._card.dimension)
        if vectors.shape != expected:
            raise EngineError(f"the engine gave shape {vectors.shape} for {expected}")
        finite = np.isfinite(vectors)
        return () if finite.all() else tuple(np.flatnonzero(~finite.all(axis=1)).tolist())

    def _end(self, error: EngineDeadError) -> None:
        logger.error("%s: %s; this replica ends", self._plan.name, error.message)
        asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, os._exit, 1)


def ray_cpus() -> float:
    """Return the CPUs that Ray counts on this node; 0 outside Ray."""
    if not ray.is_initialized():
        return 0.0
    here = ray.get_runtime_context().get_node_id()
    return sum(float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here)


def session_folder() -> str | None:
    """Return Ray's folder of its session on this node, with which goes what is in it; None outside Ray."""
    node = ray._private.worker._global_node
    return str(node.get_session_dir_path()) if node is not None else None


async def _accepts(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
