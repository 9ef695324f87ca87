"""Calls a worker's replicas through its handle: one way for HTTP and for Ray jobs.

batch → replica → float32 array; another replica when one dies under the call.
"""

import asyncio
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.config.plan import WorkerPlan
from deployments.engine import ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import DeadlineExceededError, EngineDeadError, ModelUnavailableError

# What a client that was refused should wait at least: a replica takes seconds to start.
RETRY_AFTER_SECONDS = 5.0
# How long `state` waits for a replica before it calls the model unavailable.
STATE_SECONDS = 2.0
FIRST_PAUSE_SECONDS = 0.05


class Dispatch:
    """One worker's replicas. Embeddings are pure, so a call that a replica took along may be repeated."""

    def __init__(self, plan: WorkerPlan, handle: DeploymentHandle[Any]) -> None:
        """Remember the handle; nothing is called yet."""
        self.plan = plan
        self._handle = handle
        self._card: ModelCard | None = None
        self._tokenizer: TextTokenizer | None = None

    async def model(self, deadline: float) -> tuple[ModelCard, TextTokenizer]:
        """Return the model's card and tokenizer, from a replica the first time.

        `deadline` is on the event loop's clock, in seconds. Raises ModelUnavailableError.
        """
        if self._card is None or self._tokenizer is None:
            try:
                card = await self._call("describe", deadline)
            except DeadlineExceededError:
                raise self._unavailable("no replica was ready in time") from None
            self._tokenizer = TextTokenizer(card.tokenizer)
            self._card = card
        return self._card, self._tokenizer

    async def embed(self, batch: TokenBatch, deadline: float) -> np.ndarray:
        """Return float32 vectors of shape (len(batch), dimension), in order.

        Raises DeadlineExceededError at `deadline`, ModelUnavailableError after the last retry.
        """
        vectors: np.ndarray = await self._call("embed", deadline, batch)
        return vectors

    async def state(self) -> dict[str, Any]:
        """Return whether a replica answers now, and what it says of the model."""
        deadline = asyncio.get_running_loop().time() + STATE_SECONDS
        shown: dict[str, Any] = {
            "deployment": self.plan.name,
            "version": self.plan.worker.queue.version,
        }
        try:
            card = await self._call("describe", deadline)
        except (DeadlineExceededError, ModelUnavailableError):
            return {"ready": False, "reason": "no replica answers", **shown}
        return {
            "ready": True,
            **shown,
            "dimension": card.dimension,
            "max_model_len": card.max_model_len,
        }

    async def _call(self, method: str, deadline: float, *arguments: Any) -> Any:
        """Call a replica until one answers, `http_request_retries` more times at most."""
        pause = FIRST_PAUSE_SECONDS
        retries = self.plan.worker.queue.http_request_retries
        try:
            async with asyncio.timeout_at(deadline):
                for attempt in range(retries + 1):
                    try:
                        return await getattr(self._handle, method).remote(*arguments)
                    except (RayActorError, EngineDeadError, DeploymentUnavailableError):
                        if attempt == retries:
                            break
                    # Serve takes a moment to notice a death; asking again at once meets the same one.
                    await asyncio.sleep(pause)
                    pause *= 2
        except TimeoutError:
            raise DeadlineExceededError("the request's time ran out") from None
        raise self._unavailable("its replicas are gone")

    def _unavailable(self, reason: str) -> ModelUnavailableError:
        return ModelUnavailableError(
            f"worker `{self.plan.name}` is unavailable: {reason}", "model", RETRY_AFTER_SECONDS
        )
