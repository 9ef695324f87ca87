"""One worker's replicas: one way to them, for HTTP and for Ray jobs.

token batch → admitted → inputs, each once → parts → lanes → calls in flight → rows in order

Nothing waits for a timer: a call leaves as soon as there is a place in flight for it, and what has come
meanwhile leaves together in the next one.
"""

import asyncio
import contextvars
import itertools
import time
import uuid
from collections import deque
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.config.plan import WorkerPlan
from deployments.engine import ModelCard
from deployments.engine.batch import Embedded, TokenBatch
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import (
    DeadlineExceededError,
    EmbeddingError,
    EngineDeadError,
    EngineError,
    ModelUnavailableError,
    NonFiniteEmbeddingError,
    QueueFullError,
)
from deployments.gateway.lanes import Lanes
from deployments.gateway.meter import DrainMeter, RetryBudget
from deployments.gateway.router import TokenRouter
from deployments.gateway.work import Input, Job, Lane, Part, split
from deployments.metrics import Metrics

# What a client that was refused should wait at least: a replica takes seconds to start.
RETRY_AFTER_SECONDS = 5.0
MAX_RETRY_AFTER_SECONDS = 120.0
# How long `state` waits for a replica before it calls the model unavailable.
STATE_SECONDS = 2.0
# Serve takes a moment to notice a death; asking again at once meets the same replica.
FIRST_PAUSE_SECONDS = 0.05
MAX_PAUSE_SECONDS = 2.0
# Two calls in flight keep a replica busy: one computes while the other is on its way.
CALLS_PER_REPLICA = 2
# A part is as many tokens as a replica embeds in this time: short enough to let others in between,
# long enough that the hop there and back doesn't count.
PART_SECONDS = 0.1
FIRST_PART_TOKENS = 4096
MIN_PART_TOKENS = 512
MAX_PART_TOKENS = 16_384
# A call that takes this many times as long as the slowest of the last ones has met a replica that hangs.
CUT_FACTOR = 10.0
MIN_CUT_SECONDS = 2.0
RECENT_CALLS = 128
UNKNOWN_CUT_SECONDS = 15.0
# Until the rate is known, so much may wait; from then on what can be embedded in this share of the deadline.
FIRST_BOUND_TOKENS = 600_000
QUEUE_SHARE_OF_DEADLINE = 0.5

RETRYABLE = (RayActorError, EngineDeadError, DeploymentUnavailableError)


class Dispatch:
    """One worker's replicas. Embeddings are pure, so a call that a replica took along may be repeated."""

    def __init__(
        self, plan: WorkerPlan, handle: DeploymentHandle[Any], budget: RetryBudget, metrics: Metrics
    ) -> None:
        """Remember the handle; nothing is called yet. `budget` and `metrics` are shared by all workers."""
        self.plan = plan
        self._handle = handle
        self._budget = budget
        self._metrics = metrics
        metrics.watch(plan.name, lambda: self._outstanding, self._num_replicas)
        self._model: tuple[ModelCard, TextTokenizer] | None = None
        self._asking = asyncio.Lock()
        self._lanes = Lanes()
        self._meter = DrainMeter()
        self._inputs: dict[bytes, Input] = {}
        self._flying = dict.fromkeys(Lane, 0)
        self._outstanding = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_CALLS)
        self._call_ids = (f"{uuid.uuid4().hex}-{number}" for number in itertools.count())

    # --- what others call -----------------------------------------------------------------------

    async def model(self, deadline: float) -> tuple[ModelCard, TextTokenizer]:
        """Return the model's card and tokenizer, from a replica the first time.

        `deadline` is on the event loop's clock, in seconds. Raises ModelUnavailableError.
        """
        if self._model is None:
            try:
                async with asyncio.timeout_at(deadline), self._asking:
                    if self._model is None:  # a burst of first requests asks once
                        card: ModelCard = await self._ask_any("describe")
                        self._model = card, TextTokenizer(card.tokenizer)
            except TimeoutError:
                raise self._unavailable("no replica was ready in time") from None
        return self._model

    async def embed(
        self, batch: TokenBatch, deadline: float, lane: Lane = Lane.INTERACTIVE, caller: str = ""
    ) -> np.ndarray:
        """Return float32 vectors of shape (len(batch), dimension), in order.

        Raises QueueFullError at once, DeadlineExceededError or ModelUnavailableError at `deadline`.
        Cancelling the call frees what only it waits for.
        """
        self._admit(batch.tokens)
        job = Job(len(batch), asyncio.get_running_loop().create_future())
        if batch.tokens > self._part_tokens():
            lane = Lane.BULK  # what needs several parts lets others in between
        self._outstanding += batch.tokens
        try:
            now = time.perf_counter()
            parts = split(self._join(job, batch, lane), self._part_tokens(), self._replicas())
            for inputs in parts:
                self._lanes.put(Part(inputs, caller, lane, since=now))
            if len(parts) > 1:
                self._metrics.split.labels(self.plan.name).inc(len(parts))
            self._pump()
            async with asyncio.timeout_at(deadline):
                return await job.future
        except TimeoutError:
            raise self._late() from None
        finally:
            self._outstanding -= batch.tokens
            self._leave(job)

    async def state(self) -> dict[str, Any]:
        """Return whether a replica answers now, and what is known of the model and its queue."""
        shown: dict[str, Any] = {
            "deployment": self.plan.name,
            "version": self.plan.worker.queue.version,
            "outstanding_tokens": self._outstanding,
            "tokens_per_second": round(self._meter.rate) if self._meter.rate else None,
        }
        try:
            async with asyncio.timeout(STATE_SECONDS):
                await self._ask_any("ping")
        except (TimeoutError, ModelUnavailableError):
            return {"ready": False, "reason": "no replica answers", **shown}
        except Exception as error:  # whatever it is, the other models are told of all the same
            return {"ready": False, "reason": type(error).__name__, **shown}
        if self._model is not None:
            shown |= {"dimension": self._model[0].dimension, "max_model_len": self._model[0].max_model_len}
        return {"ready": True, **shown, "replicas": self._replicas()}

    # --- in: admission, each input once -----------------------------------------------------------

    def _admit(self, tokens: int) -> None:
        """Refuse at once what couldn't be done in time. Raises QueueFullError."""
        limits, rate = self.plan.worker.limits, self._meter.rate
        bound: float = max(FIRST_BOUND_TOKENS, 2 * limits.max_request_tokens)
        if limits.max_outstanding_tokens is not None:
            bound = limits.max_outstanding_tokens
        elif rate is not None:
            bound = rate * limits.request_timeout_s * QUEUE_SHARE_OF_DEADLINE
        # With nothing outstanding every request is let in: it can't be done sooner by waiting.
        if self._outstanding and self._outstanding + tokens > bound:
            wait = self._outstanding / rate if rate else RETRY_AFTER_SECONDS
            raise QueueFullError(
                f"worker `{self.plan.name}` has {self._outstanding} tokens waiting",
                "model",
                min(max(wait, 1.0), MAX_RETRY_AFTER_SECONDS),
            )

    def _join(self, job: Job, batch: TokenBatch, lane: Lane) -> list[Input]:
        """Make the job wait for each of its inputs; return those that nobody waited for yet."""
        fresh = []
        for row, ids in enumerate(batch):
            key = ids.tobytes()
            known = self._inputs.get(key)
            # One that waits in the slow lane is of no use to somebody in a hurry.
            if known is None or (known.part is None and known.lane > lane):
                known = self._inputs[key] = Input(key, ids, lane)
                fresh.append(known)
            known.waiters.append((job, row))
            job.inputs.append(known)
        if shared := len(batch) - len(fresh):
            self._metrics.shared.labels(self.plan.name).inc(shared)
        return fresh

    def _leave(self, job: Job) -> None:
        """Drop what only this job waited for; a call that nobody waits for is cancelled."""
        if job.complete:
            return
        for each in job.inputs:
            each.waiters = [waiter for waiter in each.waiters if waiter[0] is not job]
            if not each.waiters:
                self._forget(each)
        for part in {each.part for each in job.inputs}:
            if part is not None and part.task is not None and not part.is_awaited:
                part.task.cancel()

    # --- out: calls in flight ----------------------------------------------------------------------

    def _pump(self) -> None:
        """Send parts as long as there are places in flight, the interactive ones first."""
        for lane in Lane:
            while self._flying[lane] < CALLS_PER_REPLICA * self._replicas():
                part = self._lanes.take(lane, self._part_tokens())
                if part is None:
                    break
                self._flying[lane] += 1
                self._meter.begin(asyncio.get_running_loop().time())
                # An empty context: Serve would take the calls of one request for one call.
                call = self._call(part, next(self._call_ids))
                part.task = asyncio.get_running_loop().create_task(call, context=contextvars.Context())
                for each in part.inputs:
                    each.part = part

    async def _call(self, part: Part, call_id: str) -> None:
        """Embed one part and hand out its rows; on failure try it again, elsewhere."""
        done = 0
        try:
            self._begin(part)
            vectors = await self._ask(part, call_id)
        except RETRYABLE:
            self._try_again(part)
        except (NonFiniteEmbeddingError, EngineError) as error:
            self._narrow_down(part, error)
        except EmbeddingError as error:
            self._fail(part, error)
        except Exception:
            self._fail(part, EmbeddingError("internal error"))
            raise
        else:
            done = part.tokens
            self._budget.earn()
            for each, vector in zip(part.inputs, vectors, strict=True):
                self._forget(each)
                each.deliver(vector)
        finally:
            part.task = None
            self._flying[part.lane] -= 1
            idle = not any(self._flying.values())
            self._meter.done(done, asyncio.get_running_loop().time(), idle)
            self._pump()

    async def _ask(self, part: Part, call_id: str) -> np.ndarray:
        """Call a replica; cut the call off when its replica hangs and there is another one."""
        batch = TokenBatch.join([each.ids for each in part.inputs])
        response = self._handle.embed.remote(batch, call_id=call_id)
        answer = asyncio.ensure_future(_result(response))
        answered = False
        begun = time.perf_counter()
        try:
            while True:
                await asyncio.wait({answer}, timeout=self._share(part))
                if answer.done():
                    answered = answer.exception() is None
                    embedded = answer.result()
                    seconds = time.perf_counter() - begun
                    self._recent.append((seconds, part.tokens))
                    self._observe("call", seconds)
                    self._observe("engine", embedded.engine_seconds)
                    return embedded.vectors
                router = TokenRouter.of(self.plan.name)
                if router is not None and router.suspect(call_id):
                    self._metrics.cuts.labels(self.plan.name).inc()
                    raise EngineDeadError("the replica hangs")
        finally:
            answer.cancel()
            if (router := TokenRouter.of(self.plan.name)) is not None:
                router.forget(call_id, answered)

    def _try_again(self, part: Part) -> None:
        """Queue the part again after a pause, as often as the worker file and the budget allow."""
        part.attempts += 1
        if part.attempts > self.plan.worker.queue.http_request_retries or not self._budget.spend():
            self._fail(part, self._unavailable("its replicas are gone"))
            return

        self._metrics.retries.labels(self.plan.name).inc()

        def queue() -> None:
            part.since = time.perf_counter()
            self._lanes.put(part, first=True)
            self._pump()

        pause = min(FIRST_PAUSE_SECONDS * 2 ** (part.attempts - 1), MAX_PAUSE_SECONDS)
        asyncio.get_running_loop().call_later(pause, queue)

    def _narrow_down(self, part: Part, error: EmbeddingError) -> None:
        """One input spoils a call for all that were joined with it: halve until it is alone."""
        if len(part.inputs) == 1:
            self._fail(part, error)
            return
        middle = len(part.inputs) // 2
        now = time.perf_counter()
        for inputs in (part.inputs[:middle], part.inputs[middle:]):
            self._lanes.put(
                Part(inputs, part.caller, part.lane, part.attempts, alone=True, since=now), first=True
            )

    def _fail(self, part: Part, error: EmbeddingError) -> None:
        for each in part.inputs:
            self._forget(each)
            each.fail(error)

    def _forget(self, each: Input) -> None:
        """From now on the same text is embedded anew."""
        if self._inputs.get(each.key) is each:
            del self._inputs[each.key]

    # --- what is known -----------------------------------------------------------------------------

    def _begin(self, part: Part) -> None:
        """Count a call as it leaves."""
        name = self.plan.name
        self._metrics.call_inputs.labels(name).observe(len(part.inputs))
        self._metrics.call_tokens.labels(name).observe(part.tokens)
        if part.joined > 1:
            self._metrics.joined.labels(name).inc(part.joined)
        self._observe("wait", time.perf_counter() - part.since)

    def _observe(self, stage: str, seconds: float) -> None:
        self._metrics.stage_seconds.labels(self.plan.name, stage).observe(seconds)

    def _num_replicas(self) -> int:
        router = TokenRouter.of(self.plan.name)
        return router.num_replicas if router is not None else 0

    def _replicas(self) -> int:
        """How many replicas there are, at least one: a call may wait for the first."""
        return max(1, self._num_replicas())

    def _part_tokens(self) -> int:
        rate = self._meter.rate
        if rate is None:
            return FIRST_PART_TOKENS
        tokens = int(rate / self._replicas() * PART_SECONDS)
        return min(max(tokens, MIN_PART_TOKENS), MAX_PART_TOKENS)

    def _share(self, part: Part) -> float:
        """Seconds after which a call is taken to hang: many times what the slowest of the last ones took."""
        if not self._recent:
            return UNKNOWN_CUT_SECONDS
        slowest = max(seconds for seconds, _ in self._recent)
        largest = max(tokens for _, tokens in self._recent)
        return max(MIN_CUT_SECONDS, CUT_FACTOR * slowest * max(1.0, part.tokens / largest))

    async def _ask_any(self, method: str) -> Any:
        """Call a method of any replica, again when that one dies. Raises ModelUnavailableError."""
        for attempt in range(self.plan.worker.queue.http_request_retries + 1):
            try:
                return await getattr(self._handle, method).remote()
            except RETRYABLE:
                await asyncio.sleep(min(FIRST_PAUSE_SECONDS * 2**attempt, MAX_PAUSE_SECONDS))
        raise self._unavailable("its replicas are gone")

    def _late(self) -> EmbeddingError:
        router = TokenRouter.of(self.plan.name)
        if router is not None and not router.num_replicas:
            return self._unavailable("no replica was ready in time")
        return DeadlineExceededError("the request's time ran out")

    def _unavailable(self, reason: str) -> ModelUnavailableError:
        return ModelUnavailableError(
            f"worker `{self.plan.name}` is unavailable: {reason}", "model", RETRY_AFTER_SECONDS
        )


async def _result(response: Any) -> Embedded:
    """Await a handle's response, as a coroutine that can be cancelled."""
    embedded: Embedded = await response
    return embedded
