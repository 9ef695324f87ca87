"""The last minutes of what one process counts: what the counters grew by, ten seconds at a time.

Nothing is counted here: whoever answers requests counts as before, and the counters are read.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

from deployments.metrics import Metrics

SLOT_SECONDS = 10
SLOTS = 90  # a quarter of an hour

# A metric and the values of its labels; a histogram's last one is a bucket's upper bound.
Series = tuple[str, ...]
Counts = dict[Series, float]
# Names of series. Of the last two every process sees the whole.
REQUESTS, REQUEST_SECONDS, BATCH_LINES = "requests", "request_seconds", "batch_lines"
INPUTS, TOKENS, CACHE_HITS, COLD_STARTS, DENIED = "inputs", "tokens", "cache_hits", "cold_starts", "denied"
OUTSTANDING, QUEUED, REPLICAS, CAPACITY = "outstanding_tokens", "queued_tokens", "replicas", "capacity"
SEEN_BY_ALL = {REPLICAS, CAPACITY}


@dataclass(frozen=True)
class Minutes:
    """Of each series that didn't stand still a number for each slot, the oldest first; the last is open.

    `last` is that one's number, which is the time in slots: processes on different machines have the same.
    """

    last: int
    series: dict[Series, list[float]]


class History:
    """What a process's metrics did in each slot; what stood still takes no place."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        """Begin now."""
        self._clock = clock
        self._counters: dict[str, Counter | Histogram] = {
            REQUESTS: metrics.requests,
            REQUEST_SECONDS: metrics.request_seconds,
            BATCH_LINES: metrics.batch_lines,
            INPUTS: metrics.inputs,
            TOKENS: metrics.tokens,
            CACHE_HITS: metrics.cache_hits,
            COLD_STARTS: metrics.cold_start_seconds,
            DENIED: metrics.denied,
        }
        self._gauges: dict[str, Gauge] = {
            OUTSTANDING: metrics.outstanding,
            QUEUED: metrics.queued,
            REPLICAS: metrics.replicas,
            CAPACITY: metrics.capacity,
        }
        self._slots: dict[int, Counts] = {}
        self._slot = slot_of(clock())
        self._before: Counts = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Keep what happens from now on, once for all."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(SLOT_SECONDS - self._clock() % SLOT_SECONDS)
            self.sample()

    def sample(self) -> None:
        """End the slot that is open, if its time is over: a timer may be early, and a clock be set back."""
        if (now := slot_of(self._clock())) == self._slot:
            return
        totals = self._totals()
        if changes := self._changes(totals):
            self._slots[self._slot] = changes
        self._before = totals
        self._slot = now
        self._slots = {slot: each for slot, each in self._slots.items() if now - SLOTS <= slot < now}

    def minutes(self) -> Minutes:
        """Return what the counters grew by and where the gauges stood."""
        self.sample()
        found: dict[Series, list[float]] = {}
        first = self._slot - SLOTS
        for slot, counts in (self._slots | {self._slot: self._changes(self._totals())}).items():
            for series, value in counts.items():
                if series not in found:
                    found[series] = [0.0] * (SLOTS + 1)
                found[series][slot - first] = value
        return Minutes(self._slot, found)

    def _totals(self) -> Counts:
        totals: Counts = {}
        for name, metric in self._counters.items():
            wanted = {"counter": "_total", "histogram": "_bucket"}[metric._type]
            if name == COLD_STARTS:
                wanted = "_count"
            for family in metric.collect():
                for sample in family.samples:
                    if sample.value and sample.name.endswith(wanted):
                        totals[name, *sample.labels.values()] = sample.value
        return totals

    def _changes(self, totals: Counts) -> Counts:
        changes: Counts = {}
        for series, value in totals.items():
            before = self._before.get(series, 0.0)
            # A worker that went and came back counts anew.
            if grown := value - before if value >= before else value:
                changes[series] = grown
        for name, gauge in self._gauges.items():
            for family in gauge.collect():
                for sample in family.samples:
                    if sample.value:
                        changes[name, *sample.labels.values()] = sample.value
        return changes


def slot_of(seconds: float) -> int:
    """Return the slot of a time since the epoch."""
    return int(seconds // SLOT_SECONDS)


def merge(parts: Sequence[Minutes]) -> Minutes:
    """Return what several processes counted as one; of what all of them see, the largest number."""
    last = max(part.last for part in parts)
    merged: dict[Series, list[float]] = {}
    for part in parts:
        late = min(last - part.last, SLOTS + 1)
        for series, numbers in part.series.items():
            shifted = numbers[late:] + [0.0] * late
            if (before := merged.get(series)) is not None:
                add = max if series[0] in SEEN_BY_ALL else float.__add__
                shifted = list(map(add, before, shifted))
            merged[series] = shifted
    return Minutes(last, merged)
