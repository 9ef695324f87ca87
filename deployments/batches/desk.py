"""Where the ingress takes files and batches: their storage, their routes, and who works them off."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.batches.routes import batch_routes
from deployments.batches.serving import BatchServing
from deployments.batches.storage import Storage
from deployments.batches.store import BatchPlace, Quota
from deployments.config.worker import NO_BATCHES
from deployments.http.serving import Serving
from deployments.http.table import Entry

logger = logging.getLogger("ray.serve")

DAY_SECONDS = 24 * 3600


@dataclass(frozen=True)
class BatchDesk:
    """Where files and batches are, the largest file in bytes, and the handle of the runner."""

    place: BatchPlace
    max_file_bytes: int
    runner: DeploymentHandle[Any]

    def routes(self, serving: Serving) -> Iterator[Entry]:
        """Open the storage; return the routes of files and batches. Raises ConfigError."""
        waking: set[asyncio.Task[None]] = set()  # else a task may be collected before its end

        async def wake() -> None:
            # One that is just starting anew looks by itself.
            with contextlib.suppress(RayError, DeploymentUnavailableError):
                await self.runner.wake.remote()

        def wake_later() -> None:
            task = asyncio.create_task(wake())
            waking.add(task)
            task.add_done_callback(waking.discard)

        return batch_routes(BatchServing(self.place.open(), self.max_file_bytes, wake_later, serving))


def batch_place(url: str, days: int, nodes: int, quota: Quota | None = None) -> BatchPlace | None:
    """Return where files and batches are kept for so many days; None where there is no place for them.

    `url` is a folder, what fsspec opens, `off`, or empty: then it depends on the nodes. Raises ConfigError.
    """
    if url == NO_BATCHES:
        return None
    if not url and nodes > 1:
        # The ingress of one node wouldn't find what another one's has stored.
        logger.warning("no batches: name a place that all nodes reach, as batches=s3://…")
        return None
    url = url or default_batches()
    if "://" not in url:
        url = str(Path(url).resolve())
    storage = Storage(url)
    if "://" not in url:
        storage.check()  # others may be reached only from inside of the cluster
    return BatchPlace(url, days * DAY_SECONDS, quota or Quota())


def default_batches() -> str:
    """Return the folder of this user's data for files and batches."""
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(data, "embedding-cluster", "batches"))
