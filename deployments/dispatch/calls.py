"""The calls to one worker's replicas: how many fly, how they are made, and what happens when one fails.

parts → lanes → a place in flight → replica → each input is settled with its vector or an error

Nothing waits for a timer: a call leaves as soon as there is a place in flight for it, and what has come
meanwhile leaves together in the next one.
"""

import asyncio
import contextvars
import functools
import itertools
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import astuple, replace
from typing import Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from deployments.config.worker import Worker
from deployments.dispatch.meter import DrainMeter, Pace, RetryBudget
from deployments.dispatch.replicas import FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, Replicas
from deployments.dispatch.work import Apart, Input, Lane, Lanes, Outstanding, Part, noted
from deployments.engine.batch import CallContext, Embedded, TokenBatch
from deployments.errors import (
    EmbeddingError,
    EngineCrashError,
    EngineDeadError,
    FatalInputError,
    NonFiniteEmbeddingError,
)
from deployments.metrics import Metrics
from deployments.transport.broadcast import answer_of
from deployments.transport.local import LocalClient
from deployments.transport.outcome import FATAL, MAX_CRASHES, Outcome, outcome_of
from deployments.transport.router import CallId

# Two calls in flight keep a replica busy: one computes while the other is on its way.
CALLS_PER_REPLICA = 2

# Called with an input and its vector of shape (dimension,), or the error that it met.
Settle = Callable[[Input, "np.ndarray | EmbeddingError"], None]


class Calls(Replicas):
    """Calls to embed. Embeddings are pure, so a call that a replica took along may be repeated."""

    def __init__(
        self, worker: Worker, handle: DeploymentHandle[Any], metrics: Metrics, settle: Settle
    ) -> None:
        """Remember the handle; nothing is called yet."""
        super().__init__(worker, handle)
        self.outstanding = Outstanding()
        self._embed = handle.embed  # taking it makes the router, which knows the replicas
        self._budget = RetryBudget()
        self._metrics = metrics
        self._settle = settle
        self._local = LocalClient()
        self._lanes = Lanes()
        self._apart = Apart()
        self._meter = DrainMeter()
        self._flying = dict.fromkeys(Lane, 0)
        self._pace = Pace()
        self._sender = uuid.uuid4().hex
        self._numbers = itertools.count()

    @property
    def rate(self) -> float | None:
        """Tokens per second of all replicas together where they have enough to do; None until measured."""
        return self._meter.rate

    @property
    def capacity(self) -> float:
        """Tokens per second that they can do together, whoever sends them; 0 until measured."""
        return self._pace.speed * self.known_replicas

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a place in flight."""
        return self._lanes.tokens + self._apart.tokens

    @property
    def part_tokens(self) -> int:
        """How many tokens one call should hold."""
        return self._pace.part_tokens

    @property
    def flying_tokens(self) -> int:
        """How many tokens one lane has in flight when it is busy."""
        return self.part_tokens * CALLS_PER_REPLICA * self.replicas

    def send(self, parts: Iterable[Part]) -> None:
        """Queue parts, and let leave what can."""
        for part in parts:
            self._lanes.put(part)
        self._pump()

    async def ask_tokens(self, batch: TokenBatch, like: Part) -> np.ndarray:
        """Return the hidden states of a part `like` this one; what waits is told as with other calls."""
        call = self._context(like)
        try:
            rows: np.ndarray = await self.ask_any("embed_tokens", batch, call, crashes=MAX_CRASHES)
            return rows
        finally:
            if self._router is not None:
                self._router.forget((call.sender, call.number), answered=False)

    def _context(self, part: Part) -> CallContext:
        bulk, suspect, waiting = part.lane is Lane.BULK, part.crashes > 0, astuple(self.outstanding)
        return CallContext(self._sender, next(self._numbers), part.version, bulk, suspect, *waiting)

    # --- one call's life -----------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send parts as long as there are places in flight, the interactive ones first."""
        if (part := self._apart.take()) is not None:
            self._fly(part)
        for lane in Lane:
            while self._flying[lane] < CALLS_PER_REPLICA * self.replicas:
                part = self._lanes.take(lane, self.part_tokens)
                if part is None:
                    break
                self._fly(part)

    def _fly(self, part: Part) -> None:
        loop = asyncio.get_running_loop()
        self._flying[part.lane] += 1
        part.large = self._pace.is_large(part)
        self._meter.begin(loop.time(), part.large, self.replicas)
        # An empty context: Serve would take the calls of one request for one call.
        part.task = loop.create_task(self._call(part), context=contextvars.Context())
        part.task.add_done_callback(functools.partial(self._landed, part))
        for each in part.inputs:
            each.part = part

    def _landed(self, part: Part, task: "asyncio.Task[None]") -> None:
        """Give the place in flight back, however the call ended."""
        part.task = None
        self._flying[part.lane] -= 1
        if part.alone:
            self._apart.flies = False
        now = asyncio.get_running_loop().time()
        embedded = None if task.cancelled() else part.tokens if part.answered else 0
        self._meter.done(embedded, now, part.large, self.replicas)
        self._pump()

    async def _call(self, part: Part) -> None:
        """Embed one part and settle its inputs; on failure try it again, elsewhere."""
        self._count(part)
        try:
            embedded = await noted(self._ask(part), part)
        except Exception as error:
            self._failed(part, error)
            return
        part.answered = True
        self._budget.earn()
        results: list[np.ndarray | EmbeddingError] = list(embedded.vectors)
        for row in embedded.not_finite:
            results[row] = NonFiniteEmbeddingError("the model gave a vector with NaN or infinity in it")
        for each, result in zip(part.inputs, results, strict=True):
            self._settle(each, result)

    async def _ask(self, part: Part) -> Embedded:
        """Call a replica; cut the call off when its replica hangs and there is another one."""
        call = self._context(part)
        call_id: CallId = call.sender, call.number
        batch = TokenBatch.join([each.ids for each in part.inputs])
        begun = time.perf_counter()
        answer = self._begin(batch, call, call_id)
        try:
            while True:
                await asyncio.wait({answer}, timeout=self._pace.cut_after(part.tokens))
                if answer.done():
                    embedded: Embedded = answer.result()
                    seconds = time.perf_counter() - begun
                    self._pace.learn(seconds, part.tokens, embedded.tokens_per_second)
                    self._observe("call", seconds)
                    self._observe("engine", embedded.engine_seconds)
                    part.tell(begun - part.since, seconds, embedded.engine_seconds)
                    return embedded
                if self._router is not None and self._router.suspect(call_id):
                    self._metrics.cuts.labels(self.worker.name).inc()
                    raise EngineCrashError("the replica hangs")
        except EngineDeadError:
            if answer.done() and self._router is not None:
                self._router.leave_out(call_id)
            raise
        finally:
            answered = answer.done() and not answer.cancelled() and answer.exception() is None
            answer.cancel()
            if self._router is not None:
                self._router.forget(call_id, answered)

    def _begin(self, batch: TokenBatch, call: CallContext, call_id: CallId) -> "asyncio.Future[Embedded]":
        """Send a call: to a replica on this node over its own socket, else by Serve's handle."""
        router = self._router
        best = router.best_address(call.version) if router is not None else None
        if router is None or best is None or not self._local.reaches(best[1]):
            return asyncio.ensure_future(answer_of(self._embed.remote(batch, call)))
        router.take(best[0], batch.tokens, call_id)
        self._metrics.local_calls.labels(self.worker.name).inc()
        return self._local.call(best[1], batch, call)

    # --- when it fails -------------------------------------------------------------------------------

    def _failed(self, part: Part, error: Exception) -> None:
        match outcome_of(error):
            case Outcome.CRASHED if part.crashes + 1 == MAX_CRASHES:
                self._fail(part, FatalInputError(FATAL))
            case Outcome.CRASHED:
                part.crashes += 1
                self._try_again(part)
            case Outcome.RETRY:
                self._try_again(part)
            case Outcome.HALVE:
                self._narrow_down(part, error)
            case Outcome.FAIL:
                self._fail(part, error)

    def _try_again(self, part: Part) -> None:
        """Queue the part again after a pause, as often as the worker file and the budget allow."""
        part.attempts += 1
        if part.attempts > self.worker.queue.http_request_retries or not self._budget.spend():
            self._fail(part, self.unavailable("its replicas are gone"))
            return
        self._metrics.retries.labels(self.worker.name).inc()

        def queue() -> None:
            part.since = time.perf_counter()
            if part.alone:
                self._apart.put(part)
            elif part.crashes:
                for each in part.by_request():
                    self._apart.put(each)
            else:
                self._lanes.put(part, first=True)
            self._pump()

        pause = min(FIRST_PAUSE_SECONDS * 2 ** (part.attempts - 1), MAX_PAUSE_SECONDS)
        asyncio.get_running_loop().call_later(pause, queue)

    def _narrow_down(self, part: Part, error: Exception) -> None:
        """One input spoils a call for all that were joined with it: halve until it is alone."""
        if len(part.inputs) == 1:
            self._fail(part, error)
            return
        middle = len(part.inputs) // 2
        for inputs in (part.inputs[:middle], part.inputs[middle:]):
            self._apart.put(replace(part, inputs=inputs, alone=True, joined=1, since=time.perf_counter()))

    def _fail(self, part: Part, error: Exception) -> None:
        known = error if isinstance(error, EmbeddingError) else EmbeddingError("internal error")
        for each in part.inputs:
            self._settle(each, known)
        if known is not error:
            raise error  # a bug of ours; the loop tells its log of it

    # --- counting ------------------------------------------------------------------------------------

    def _count(self, part: Part) -> None:
        """Count a call as it leaves."""
        name = self.worker.name
        self._metrics.call_inputs.labels(name).observe(len(part.inputs))
        self._metrics.call_tokens.labels(name).observe(part.tokens)
        if part.joined > 1:
            self._metrics.joined.labels(name).inc(part.joined)
        self._observe("wait", time.perf_counter() - part.since)

    def _observe(self, stage: str, seconds: float) -> None:
        self._metrics.stage_seconds.labels(self.worker.name, stage).observe(seconds)
