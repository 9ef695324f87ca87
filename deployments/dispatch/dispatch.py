"""One worker's way in, for HTTP and for Ray jobs alike.

token batch → admitted → inputs, each once → parts → calls → rows in order
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from deployments.config.worker import Worker
from deployments.dispatch.admission import Admission
from deployments.dispatch.cache import VectorCache
from deployments.dispatch.calls import Calls
from deployments.dispatch.offload import offload
from deployments.dispatch.prepare import Prepared
from deployments.dispatch.work import Input, Lane, Part, Pending, split
from deployments.engine import ModelCard
from deployments.engine.batch import CallContext, TokenBatch
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import (
    DeadlineExceededError,
    EmbeddingError,
    ModelChangedError,
    ModelUnavailableError,
)
from deployments.metrics import Metrics

# How long `state` waits for a replica before it calls the model unavailable.
STATE_SECONDS = 2.0
# Ray Serve tells of new replicas within this time.
CHANGE_PAUSE_SECONDS = 0.05

Model = tuple[ModelCard, TextTokenizer]
# Makes token ids of a request, for the model that answers it.
Prepare = Callable[[ModelCard, TextTokenizer], Awaitable[Prepared]]
# Uses up so many tokens of what the caller may have. Raises RateLimitError.
Charge = Callable[[int], Awaitable[None]]


class Dispatch:
    """Lets requests in, and brings each the vectors that it waits for."""

    def __init__(self, worker: Worker, handle: DeploymentHandle[Any], metrics: Metrics) -> None:
        """Call nothing yet. `metrics` are shared by all workers."""
        self._calls = Calls(worker, handle, metrics, self._settle)
        self._outstanding = self._calls.outstanding
        self._admission = Admission(self._outstanding)
        self._metrics = metrics
        self._model: Model | None = None
        self._asking = asyncio.Lock()
        self._inputs: dict[bytes, Input] = {}
        self._cache = _cache_for(worker, None)
        self._cold_since: float | None = None
        gauges = {
            metrics.outstanding: lambda: self._outstanding.tokens,
            metrics.queued: lambda: self._calls.queued_tokens,
            metrics.replicas: lambda: self._calls.known_replicas,
            metrics.capacity: lambda: self._calls.capacity,
            metrics.cache_bytes: lambda: self._cache.size if self._cache else 0,
        }
        metrics.watch(worker.name, gauges)

    @property
    def worker(self) -> Worker:
        """The worker file, which may change while we serve: `worker = …` takes effect for later requests."""
        return self._calls.worker

    @worker.setter
    def worker(self, worker: Worker) -> None:
        self._calls.worker = worker
        self._cache = _cache_for(worker, self._cache)

    @property
    def flying_tokens(self) -> int:
        """How many tokens are with the replicas at a time, where there is work enough."""
        return self._calls.flying_tokens

    async def embed_by(
        self,
        prepare: Prepare,
        deadline: float,
        lane: Lane = Lane.INTERACTIVE,
        caller: str = "",
        charge: Charge | None = None,
    ) -> tuple[ModelCard, Prepared, np.ndarray]:
        """As `embed`, of what `prepare` makes of the model; return the model's card and that too.

        Where the model changes meanwhile all of it is prepared and embedded anew: an answer never mixes the
        vectors of two versions, nor one version's token ids with the other's vectors.
        """
        while True:
            # Who would be refused with a single token is refused before any work is done for it.
            self._admission.check(1, caller, self.worker.limits, self._calls.rate)
            card, tokenizer = await self.model(deadline)
            try:
                async with asyncio.timeout_at(deadline):
                    prepared = await prepare(card, tokenizer)
            except TimeoutError:
                raise self._late() from None
            try:
                batch, by_token = prepared.batch, prepared.by_token
                vectors = await self.embed(batch, deadline, lane, caller, card.version, charge, by_token)
                return card, prepared, vectors
            except ModelChangedError:
                self._model = None
                await asyncio.sleep(CHANGE_PAUSE_SECONDS)

    async def model(self, deadline: float) -> Model:
        """Return the model's card and tokenizer, from a replica the first time and after a change.

        `deadline` is on the event loop's clock, in seconds. Raises ModelUnavailableError.
        """
        if self._calls.is_bare and self._cold_since is None:
            self._cold_since = time.perf_counter()
        if not self._is_current(self._model):
            try:
                async with asyncio.timeout_at(deadline), self._asking:
                    if not self._is_current(self._model):  # a burst of first requests asks once
                        call = CallContext(version=self._calls.version or "")
                        card: ModelCard = await self._calls.ask_any("describe", call)
                        tokenizer = await offload(len(card.tokenizer), TextTokenizer.of, card)
                        self._model = card, tokenizer
            except TimeoutError:
                raise self._calls.unavailable("no replica was ready in time") from None
        assert self._model is not None
        return self._model

    def _is_current(self, model: "Model | None") -> bool:
        """Whether a model is the one that most replicas have, as far as is known."""
        return model is not None and self._calls.version in (None, model[0].version)

    async def embed(  # noqa: PLR0913, PLR0917 - what a request is, and who asks
        self,
        batch: TokenBatch,
        deadline: float,
        lane: Lane = Lane.INTERACTIVE,
        caller: str = "",
        version: str = "",
        charge: Charge | None = None,
        by_token: bool = False,
    ) -> np.ndarray:
        """Return float32 vectors of shape (len(batch), dimension), in order; `charge` for what is let in.

        With `by_token` these are hidden states instead, of shape (batch.tokens, hidden size).

        Raises QueueFullError at once, DeadlineExceededError or ModelUnavailableError at `deadline`, and
        ModelChangedError where the replicas have another version than that which the ids were made for.
        Cancelling the call frees what only it waits for.
        """
        self._admission.check(batch.tokens, caller, self.worker.limits, self._calls.rate)
        small = batch.tokens <= self._calls.part_tokens
        with self._admission.hold(batch.tokens, caller, small):
            if not small or self._admission.is_flood(caller, self._calls.flying_tokens):
                lane = Lane.BULK  # what needs several parts lets others in between, in one request or in many
            if charge is not None:
                await charge(batch.tokens)
            send = self._send_tokens if by_token else self._send
            try:
                async with asyncio.timeout_at(deadline):
                    vectors = await send(batch, Part([], caller, lane, version))
            except TimeoutError:
                raise self._late() from None
        self._warm()
        return vectors

    async def _send(self, batch: TokenBatch, like: Part) -> np.ndarray:
        """Cut a batch into parts `like` this one, send them, and wait for all vectors."""
        pending = Pending(len(batch), asyncio.get_running_loop().create_future())
        try:
            now = time.perf_counter()
            fresh = self._join(pending, batch, like.lane, like.version)
            parts = split(fresh, self._calls.part_tokens, self._calls.replicas)
            if len(parts) > 1:
                self._metrics.split.labels(self.worker.name).inc(len(parts))
            self._calls.send(replace(like, inputs=inputs, since=now) for inputs in parts)
            return await pending.future
        finally:
            self._leave(pending)

    async def _send_tokens(self, batch: TokenBatch, like: Part) -> np.ndarray:
        """Ask for parts `like` this one, one after the other, joined with nobody's, and kept by nobody."""
        parts = np.cumsum(batch.lengths) // self._calls.part_tokens
        rows = []
        for part in np.unique(parts):
            first, end = np.searchsorted(parts, [part, part + 1])
            rows.append(await self._calls.ask_tokens(batch[first:end], like))
        return np.concatenate(rows)

    async def state(self) -> dict[str, Any]:
        """Return whether a replica answers now, and what is known of the model and its queue."""
        rate = self._calls.rate
        shown: dict[str, Any] = {
            "deployment": self.worker.name,
            "version": self.worker.queue.version,
            "outstanding_tokens": self._outstanding.tokens,
            "tokens_per_second": round(rate) if rate else None,
        }
        scaling = self.worker.deployment.autoscaling
        if scaling is not None and not scaling.min_replicas and not self._calls.known_replicas:
            # To ask would bring a replica up, as the first request will.
            return {"ready": True, **shown, "replicas": 0}
        try:
            async with asyncio.timeout(STATE_SECONDS):
                await self._calls.ask_any("ping")
        except (TimeoutError, ModelUnavailableError):
            return {"ready": False, "reason": "no replica answers", **shown}
        except Exception:  # whatever it is, the other models are told of all the same
            return {"ready": False, "reason": "its replicas fail", **shown}
        if self._model is not None:
            card, _ = self._model
            shown |= {"dimension": card.dimension, "max_model_len": card.max_model_len}
            shown |= {"engine": self.worker.generator.served_by, "steps": card.steps}
        return {"ready": True, **shown, "replicas": self._calls.replicas}

    async def engine_metrics(self, seconds: float) -> list[bytes]:
        """Return the engines' own metrics, of all replicas that answer in time."""
        return await self._calls.ask_all("engine_metrics", seconds)

    def _warm(self) -> None:
        """An answer came; if a request had to wait for the first replica, this ends the cold start."""
        if self._cold_since is not None:
            seconds = time.perf_counter() - self._cold_since
            self._metrics.cold_start_seconds.labels(self.worker.name).observe(seconds)
            self._cold_since = None

    def _join(self, pending: Pending, batch: TokenBatch, lane: Lane, version: str) -> list[Input]:
        """Make a request wait for each of its inputs; return those that nobody waited for yet."""
        fresh = []
        prefix = version.encode()
        hits = 0
        for row, ids in enumerate(batch):
            key = prefix + ids.tobytes()
            if self._cache is not None and (vector := self._cache.get(key)) is not None:
                pending.deliver(row, vector)
                hits += 1
                continue
            known = self._inputs.get(key)
            # One that waits in the slow lane is of no use to somebody in a hurry.
            if known is None or (known.part is None and known.lane > lane):
                known = self._inputs[key] = Input(key, ids, lane)
                fresh.append(known)
            known.waiters.append((pending, row))
            pending.inputs.append(known)
        if hits:
            self._metrics.cache_hits.labels(self.worker.name).inc(hits)
        if shared := len(pending.inputs) - len(fresh):
            self._metrics.shared.labels(self.worker.name).inc(shared)
        return fresh

    def _leave(self, pending: Pending) -> None:
        """Drop what only this request waited for; a call that nobody waits for is cancelled."""
        if pending.complete:
            return
        for each in pending.inputs:
            each.waiters = [waiter for waiter in each.waiters if waiter[0] is not pending]
            if not each.waiters:
                self._forget(each)
        for part in {each.part for each in pending.inputs}:
            if part is not None and part.task is not None and not part.is_awaited:
                part.task.cancel()

    def _settle(self, each: Input, result: "np.ndarray | EmbeddingError") -> None:
        """Give an input's vector, or its error, to all who wait for it."""
        self._forget(each)
        if self._cache is not None and not isinstance(result, EmbeddingError):
            self._cache.put(each.key, result)
        # Nothing points back to what is done: else vectors would stay until the next full collection.
        waiters, each.waiters, each.part = each.waiters, [], None
        for pending, row in waiters:
            if isinstance(result, EmbeddingError):
                pending.fail(result)
            else:
                pending.deliver(row, result)

    def _forget(self, each: Input) -> None:
        """From now on the same text is embedded anew."""
        if self._inputs.get(each.key) is each:
            del self._inputs[each.key]

    def _late(self) -> EmbeddingError:
        if self._calls.is_bare:
            return self._calls.unavailable("no replica was ready in time")
        return DeadlineExceededError("the request's time ran out")


def _cache_for(worker: Worker, cache: VectorCache | None) -> VectorCache | None:
    """Return a cache of the size that the worker file names: the one that there is, a new one, or none."""
    wanted = worker.limits.cache_mib * 2**20
    if cache is not None and cache.max_bytes == wanted:
        return cache
    return VectorCache(wanted) if wanted else None
