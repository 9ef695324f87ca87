"""Where the ingress takes files and batches: their storage, their routes, and who works them off."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.batches.routes import batch_routes
from deployments.batches.serving import BatchServing
from deployments.batches.store import Batches, BatchPlace
from deployments.http.serving import Serving
from deployments.http.table import Entry


@dataclass(frozen=True)
class BatchAccess:
    """Where files and batches are, how large a file may be, and what tells the runner of something new."""

    batches: Batches
    max_file_bytes: int
    wake: Callable[[], None]

    def routes(self, serving: Serving) -> Iterator[Entry]:
        """Return the routes of files and batches."""
        return batch_routes(BatchServing(self.batches, self.max_file_bytes, self.wake, serving))


@dataclass(frozen=True)
class BatchDesk:
    """Where files and batches are, the largest file in bytes, and the handle of the runner."""

    place: BatchPlace
    max_file_bytes: int
    runner: DeploymentHandle[Any]

    def access(self) -> BatchAccess:
        """Open the storage. Raises ConfigError."""
        waking: set[asyncio.Task[None]] = set()  # else a task may be collected before its end

        async def wake() -> None:
            # One that is just starting anew looks by itself.
            with contextlib.suppress(RayError, DeploymentUnavailableError):
                await self.runner.wake.remote()

        def wake_later() -> None:
            task = asyncio.create_task(wake())
            waking.add(task)
            task.add_done_callback(waking.discard)

        return BatchAccess(self.place.open(), self.max_file_bytes, wake_later)
