"""One engine shared by people who wait and by bulk work.

An engine's step can't be interrupted, and a bulk call is one long step: a single text that comes meanwhile
would wait for all of it, and for the bulk call queued behind. So bulk calls enter the engine one after the
other, and in short slices while there are calls that don't yield; those enter between two slices.
"""

import asyncio
import heapq
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import numpy as np

from deployments.engine import Engine
from deployments.engine.batch import TokenBatch
from deployments.engine.speed import EngineSpeed

# How long a call may have to wait for a slice, or for this many times what any step costs, however small:
# 3 ms for all-MiniLM-L6-v2 on 2 cores, more for larger models. Shorter slices would be all cost.
SLICE_SECONDS = 0.01
SLICE_STEPS = 2.0
# Where the engine computes on the cores that the rest of the server runs on: how long a slice lets an answer
# go its way to whoever waits for it, who may well have the next one.
ANSWER_SECONDS = 0.006
# Slices are never less than this share of their call.
MAX_SLICES = 10
# Bulk calls are whole again when nobody has come for so many times the longest pause of late but one, since
# a pause that was met once is where some work began: slices cost an eighth of the throughput. Not before the
# one time, since callers come in bursts, and surely after the other.
CALM_PAUSES = 3.0
MIN_CALM_SECONDS, MAX_CALM_SECONDS = 0.3, 3.0
RECENT_PAUSES = 64
RECENT_SLICES = 64


class Turns:
    """An engine's `embed`, in turns. `width` bulk calls are in the engine at a time."""

    def __init__(
        self,
        engine: Engine,
        width: int = 1,
        answer_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take an engine; pipeline stages need a call each to be busy, which is what `width` is for.

        No slice begins within `answer_seconds` of the end of a call that doesn't yield.
        """
        self._engine = engine
        self._answer_seconds = answer_seconds
        self._clock = clock
        self._bulk = asyncio.Semaphore(width)
        self._last_call = float("-inf")
        self._pauses: deque[float] = deque(maxlen=RECENT_PAUSES)  # between calls that don't yield
        self._rates: deque[float] = deque(maxlen=RECENT_SLICES)
        self._pressing: set[asyncio.Future[None]] = set()  # calls that don't yield, until they are answered
        self._step_seconds = float("inf")  # the shortest call so far
        self._speed = EngineSpeed()
        self._inside = 0
        self._emptied = asyncio.Event()
        self._alone = asyncio.Lock()

    @property
    def tokens_per_second(self) -> float:
        """How fast the engine is at large calls; 0 until measured."""
        return self._speed.best

    async def embed(self, batch: TokenBatch, bulk: bool, suspect: bool = False) -> np.ndarray:
        """Return what the engine's `embed` does. Nothing else is in the engine together with a suspect."""
        if not bulk:
            now = self._clock()
            self._pauses.append(now - self._last_call)
            self._last_call = now
            with self._press():
                return (await self._timed(batch, suspect))[0]
        rows, begin = [], 0
        async with self._bulk:
            while begin < len(batch):
                if self._pressing:  # a slice would make their step longer, or their answers late
                    await asyncio.wait(self._pressing.copy())
                end = self._slice_end(batch, begin)
                rows.append(await self._embed_slice(batch[begin:end], suspect))
                begin = end
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    @contextmanager
    def _press(self) -> Iterator[None]:
        """Keep the next slice out of the engine; not the one after it, however many come."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self._pressing.add(done)

        def let_go() -> None:
            self._pressing.discard(done)
            done.set_result(None)

        try:
            yield
        finally:
            loop.call_later(self._answer_seconds, let_go)

    async def _embed_slice(self, batch: TokenBatch, suspect: bool) -> np.ndarray:
        vectors, seconds = await self._timed(batch, suspect)
        self._rates.append(batch.tokens / seconds)
        return vectors

    async def _timed(self, batch: TokenBatch, suspect: bool) -> tuple[np.ndarray, float]:
        async with self._enter(suspect):
            begun = time.perf_counter()
            vectors = await self._engine.embed(batch)
            ended = time.perf_counter()
        self._step_seconds = min(self._step_seconds, ended - begun)
        self._speed.record(batch.tokens, begun, ended)
        return vectors, ended - begun

    @asynccontextmanager
    async def _enter(self, alone: bool) -> AsyncIterator[None]:
        """Be one of those in the engine, or `alone` there: what that does to the engine harms nobody."""
        if alone:
            async with self._alone:
                self._emptied.clear()
                if self._inside:
                    await self._emptied.wait()
                yield
            return
        while self._alone.locked():
            async with self._alone:
                pass
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._emptied.set()

    def _is_calm(self) -> bool:
        """Whether nobody is likely to come while a bulk call is in the engine."""
        if not self._pauses:
            return True
        longest = heapq.nlargest(2, self._pauses)[-1]
        enough = min(max(CALM_PAUSES * longest, MIN_CALM_SECONDS), MAX_CALM_SECONDS)
        return self._clock() > self._last_call + enough

    def _slice_end(self, batch: TokenBatch, begin: int) -> int:
        """Return the first input of a batch that isn't in the slice that begins there."""
        if self._is_calm() or not self._rates:
            return len(batch)
        # The fastest of the last slices met nobody in the engine.
        seconds = max(SLICE_SECONDS, SLICE_STEPS * self._step_seconds)
        tokens = max(max(self._rates) * seconds, batch.tokens / MAX_SLICES)
        ends = np.cumsum(batch.lengths[begin:])
        return begin + max(1, int(np.searchsorted(ends, tokens, side="right")))
