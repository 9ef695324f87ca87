"""One worker's replicas, as far as this process knows them, and what any or all of them are asked."""

import asyncio
from typing import Any

from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from deployments.config.worker import Worker
from deployments.dispatch.admission import RETRY_AFTER_SECONDS
from deployments.errors import FatalInputError, ModelUnavailableError
from deployments.transport.broadcast import answer_of, broadcast
from deployments.transport.outcome import FATAL, Outcome, outcome_of
from deployments.transport.router import TokenRouter

# Serve takes a moment to notice a death; asking again at once meets the same replica.
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.05, 2.0


class Replicas:
    """The replicas behind a handle."""

    def __init__(self, worker: Worker, handle: DeploymentHandle[Any]) -> None:
        """Remember the handle; nothing is called yet."""
        self.worker = worker
        self._handle = handle
        self._found: TokenRouter | None = None

    @property
    def _router(self) -> TokenRouter | None:
        """The router of the replicas in this process, once the handle has been used."""
        if self._found is None:
            self._found = TokenRouter.of(self._handle.deployment_id)
        return self._found

    @property
    def known_replicas(self) -> int:
        """How many replicas there are, as far as this process knows."""
        return self._router.num_replicas if self._router is not None else 0

    @property
    def is_bare(self) -> bool:
        """Whether it is known that there is no replica."""
        return self._router is not None and not self._router.num_replicas

    @property
    def replicas(self) -> int:
        """As `known_replicas`, at least one: a call may wait for the first."""
        return max(1, self.known_replicas)

    @property
    def version(self) -> str | None:
        """The model's version that calls should be prepared for; None while no replica is known."""
        return (self._router.version or None) if self._router is not None else None

    async def ask_any(self, method: str, *arguments: Any, crashes: int = 0) -> Any:
        """Call any replica's method, again when it dies, `crashes` times at most. Raises EmbeddingError."""
        for attempt in range(self.worker.queue.http_request_retries + 1):
            try:
                return await answer_of(getattr(self._handle, method).remote(*arguments))
            except Exception as error:
                if (outcome := outcome_of(error)) not in (Outcome.CRASHED, Outcome.RETRY):
                    raise
                if outcome is Outcome.CRASHED and (crashes := crashes - 1) == 0:
                    raise FatalInputError(FATAL) from error
                await asyncio.sleep(min(FIRST_PAUSE_SECONDS * 2**attempt, MAX_PAUSE_SECONDS))
        raise self.unavailable("its replicas are gone")

    async def ask_all(self, method: str, seconds: float) -> list[Any]:
        """Call a method of every live replica; return nothing where one of them is silent."""
        if not self.known_replicas:
            return []
        try:
            return await broadcast(self._handle, method, seconds=seconds)
        except (TimeoutError, RayError):
            return []

    def unavailable(self, reason: str) -> ModelUnavailableError:
        """Return the error for a worker that can't answer."""
        return ModelUnavailableError(
            f"worker `{self.worker.name}` is unavailable: {reason}", "model", RETRY_AFTER_SECONDS
        )
