"""The Ray Serve deployment that works batches off: one replica, which sends to workers as an ingress does."""

import asyncio
from collections.abc import Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.batches.lines import Bulk
from deployments.batches.runner import Runner
from deployments.batches.store import BatchPlace
from deployments.errors import EmbeddingError
from deployments.http.ingress import AccessSettings, Sender
from deployments.priority import in_background


class BatchRunner(Sender):
    """Runs what waits in the storage, from its start on."""

    def __init__(
        self, handles: Mapping[str, DeploymentHandle[Any]], place: BatchPlace, access_settings: AccessSettings
    ) -> None:
        """Run nothing until `reconfigure` names the workers. Raises ConfigError."""
        in_background()
        access = access_settings.access()
        # No body is read here: what the lines hold was bounded when their file came.
        super().__init__(handles, 0, access)
        keys = access.ring if access else None
        self._runner = Runner(place.open().files, Bulk(self._serving).embed, keys, place.keep_seconds)
        self._task: asyncio.Task[None] | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Take over the worker files as they are now; see `Ingress.reconfigure`."""
        self._workers.take(config)
        self._serving.history.start()
        if self._task is None:
            self._task = asyncio.create_task(self._runner.serve())

    async def check_health(self) -> None:
        """Raise where nothing is run any more: Ray Serve then puts another one in its place."""
        if self._task is not None and self._task.done():
            raise EmbeddingError("the runner has ended")

    async def wake(self) -> None:
        """Look at once: there is a new batch, or one to cancel."""
        self._runner.wake()
