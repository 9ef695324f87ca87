"""Looks at the cluster for whoever asks; ten who ask at a time are told of one look."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from deployments.dispatch.catalog import Served
from deployments.dispatch.offload import offload
from deployments.status.history import SLOTS, Minutes, merge
from deployments.status.report import Look, Replicas, report

# How old what is told may be. Ten pages that asked every two seconds, for looks as old, took 4% of a core.
LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Counted:
    """What all processes counted: those of ingress replicas first, and what Ray Serve tells of replicas."""

    ingresses: list[Minutes]
    others: list[Minutes]
    replicas: Mapping[str, Replicas]


# Returns what the processes counted. Raises IncompleteError.
GatherCounts = Callable[[], Awaitable[Counted]]
# Returns what `/ready` tells of each worker, by its name.
GatherStates = Callable[[], Awaitable[Mapping[str, Mapping[str, Any]]]]


class Lookout:
    """Keeps the last look, and what was told of it, for as long as it is fresh."""

    def __init__(self, counts: GatherCounts, states: GatherStates) -> None:
        """Look at nothing yet."""
        self._counts = counts
        self._states = states
        self._looking = asyncio.Lock()
        self._fresh_until = 0.0
        self._look: Look | None = None
        self._told: dict[tuple[bool, tuple[str, ...]], bytes] = {}

    async def tell(self, served: list[Served], everything: bool) -> bytes:
        """Return the report of these models as JSON. Raises IncompleteError."""
        async with self._looking:
            if self._look is None or time.monotonic() >= self._fresh_until:
                self._look = await self._take()
                self._told = {}
                self._fresh_until = time.monotonic() + LOOK_SECONDS
            look = self._look
            # One that came or went since then is told of at the next look.
            served = [each for each in served if each.dispatch.worker.name in look.states]
            asked = everything, tuple(each.name for each in served)
            if asked not in self._told:
                size = len(look.minutes.series) * SLOTS
                self._told[asked] = await offload(
                    size, lambda: orjson.dumps(report(look, served, everything))
                )
            return self._told[asked]

    async def _take(self) -> Look:
        now = time.time()  # what the counters say is of no later slot
        counted, states = await asyncio.gather(self._counts(), self._states())
        minutes = merge([*counted.ingresses, *counted.others])
        return Look(now, minutes, counted.replicas, states, len(counted.ingresses))
