"""One worker's way in, for HTTP and for Ray jobs alike.

token batch → admitted → inputs, each once → parts → calls → rows in order
"""

import asyncio
import time
from collections import Counter
from typing import Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from deployments.config.plan import WorkerPlan
from deployments.engine import ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import (
    DeadlineExceededError,
    EmbeddingError,
    ModelUnavailableError,
    QueueFullError,
)
from deployments.gateway.calls import RETRY_AFTER_SECONDS, Calls
from deployments.gateway.meter import RetryBudget
from deployments.gateway.work import Input, Job, Lane, Part, split
from deployments.metrics import Metrics

MAX_RETRY_AFTER_SECONDS = 120.0
# How long `state` waits for a replica before it calls the model unavailable.
STATE_SECONDS = 2.0
# Until the rate is known, so much may wait; from then on what can be embedded in this share of the deadline.
FIRST_BOUND_TOKENS = 600_000
QUEUE_SHARE_OF_DEADLINE = 0.5
# One caller alone fills eight ninths of the queue.
CALLER_SHARE = 8.0
# A caller is alone when nobody else has asked for so long.
ALONE_SECONDS = 3.0


class Dispatch:
    """Lets requests in, and brings each the vectors that it waits for."""

    def __init__(
        self, plan: WorkerPlan, handle: DeploymentHandle[Any], budget: RetryBudget, metrics: Metrics
    ) -> None:
        """Call nothing yet. `budget` and `metrics` are shared by all workers."""
        self.plan = plan
        self._calls = Calls(plan, handle, budget, metrics, self._settle)
        self._metrics = metrics
        self._model: tuple[ModelCard, TextTokenizer] | None = None
        self._asking = asyncio.Lock()
        self._inputs: dict[bytes, Input] = {}
        self._outstanding = 0
        self._held: Counter[str] = Counter()  # of them, by caller
        self._small: Counter[str] = Counter()  # of those, in requests of a single part
        self._last_caller: str | None = None
        self._last_change = -ALONE_SECONDS
        metrics.watch(plan.name, lambda: self._outstanding, lambda: self._calls.known_replicas)

    async def model(self, deadline: float) -> tuple[ModelCard, TextTokenizer]:
        """Return the model's card and tokenizer, from a replica the first time.

        `deadline` is on the event loop's clock, in seconds. Raises ModelUnavailableError.
        """
        if self._model is None:
            try:
                async with asyncio.timeout_at(deadline), self._asking:
                    if self._model is None:  # a burst of first requests asks once
                        card: ModelCard = await self._calls.ask_any("describe")
                        self._model = card, TextTokenizer(card.tokenizer)
            except TimeoutError:
                raise self._calls.unavailable("no replica was ready in time") from None
        return self._model

    async def embed(
        self, batch: TokenBatch, deadline: float, lane: Lane = Lane.INTERACTIVE, caller: str = ""
    ) -> np.ndarray:
        """Return float32 vectors of shape (len(batch), dimension), in order.

        Raises QueueFullError at once, DeadlineExceededError or ModelUnavailableError at `deadline`.
        Cancelling the call frees what only it waits for.
        """
        self._admit(batch.tokens, caller)
        job = Job(len(batch), asyncio.get_running_loop().create_future())
        part_tokens = self._calls.part_tokens
        small = batch.tokens if batch.tokens <= part_tokens else 0
        self._outstanding += batch.tokens
        self._held[caller] += batch.tokens
        self._small[caller] += small
        if not small or self._is_flood(caller):
            lane = Lane.BULK  # what needs several parts lets others in between, in one request or in many
        try:
            now = time.perf_counter()
            parts = split(self._join(job, batch, lane), part_tokens, self._calls.replicas)
            if len(parts) > 1:
                self._metrics.split.labels(self.plan.name).inc(len(parts))
            self._calls.send(Part(inputs, caller, lane, since=now) for inputs in parts)
            async with asyncio.timeout_at(deadline):
                return await job.future
        except TimeoutError:
            raise self._late() from None
        finally:
            self._outstanding -= batch.tokens
            self._held[caller] -= batch.tokens
            self._small[caller] -= small
            if not self._held[caller]:
                del self._held[caller], self._small[caller]
            self._leave(job)

    async def state(self) -> dict[str, Any]:
        """Return whether a replica answers now, and what is known of the model and its queue."""
        rate = self._calls.rate
        shown: dict[str, Any] = {
            "deployment": self.plan.name,
            "version": self.plan.worker.queue.version,
            "outstanding_tokens": self._outstanding,
            "tokens_per_second": round(rate) if rate else None,
        }
        try:
            async with asyncio.timeout(STATE_SECONDS):
                await self._calls.ask_any("ping")
        except (TimeoutError, ModelUnavailableError):
            return {"ready": False, "reason": "no replica answers", **shown}
        except Exception as error:  # whatever it is, the other models are told of all the same
            return {"ready": False, "reason": type(error).__name__, **shown}
        if self._model is not None:
            card, _ = self._model
            shown |= {"dimension": card.dimension, "max_model_len": card.max_model_len}
        return {"ready": True, **shown, "replicas": self._calls.replicas}

    def _admit(self, tokens: int, caller: str) -> None:
        """Refuse at once what couldn't be done in time. Raises QueueFullError.

        A caller may hold at most `CALLER_SHARE` times what it leaves free, so that however much it sends,
        somebody else's request is let in.
        """
        limits, rate = self.plan.worker.limits, self._calls.rate
        bound: float = max(FIRST_BOUND_TOKENS, 2 * limits.max_request_tokens)
        if limits.max_outstanding_tokens is not None:
            bound = limits.max_outstanding_tokens
        elif rate is not None:
            bound = rate * limits.request_timeout_s * QUEUE_SHARE_OF_DEADLINE
        # With nothing outstanding every request is let in: it can't be done sooner by waiting.
        free = bound - self._outstanding
        held = self._held[caller]
        if self._outstanding and (tokens > free or held + tokens > CALLER_SHARE * free):
            wait = self._outstanding / rate if rate else RETRY_AFTER_SECONDS
            raise QueueFullError(
                f"worker `{self.plan.name}` has {self._outstanding} tokens waiting",
                "model",
                min(max(wait, 1.0), MAX_RETRY_AFTER_SECONDS),
            )

    def _is_flood(self, caller: str) -> bool:
        """Whether a caller has more under way than flies at once, while there are other callers."""
        now = asyncio.get_running_loop().time()
        if self._last_caller not in (None, caller):
            self._last_change = now
        self._last_caller = caller
        alone = now > self._last_change + ALONE_SECONDS
        return not alone and self._small[caller] > self._calls.flying_tokens

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

    def _settle(self, each: Input, result: "np.ndarray | EmbeddingError") -> None:
        """Give an input's vector, or its error, to all who wait for it."""
        self._forget(each)
        # Nothing points back to what is done: else vectors would stay until the next full collection.
        waiters, each.waiters, each.part = each.waiters, [], None
        for job, row in waiters:
            if isinstance(result, EmbeddingError):
                job.fail(result)
            else:
                job.deliver(row, result)

    def _forget(self, each: Input) -> None:
        """From now on the same text is embedded anew."""
        if self._inputs.get(each.key) is each:
            del self._inputs[each.key]

    def _late(self) -> EmbeddingError:
        if self._calls.is_bare:
            return self._calls.unavailable("no replica was ready in time")
        return DeadlineExceededError("the request's time ran out")
