"""What goes into an engine's next step: inputs of people who wait first, bulk work in what is left.

A step can't be interrupted, and costs so much, however small it is, and so much for each token. That line
decides: where nobody waits a step is so long that its fixed cost doesn't count; else as short as bulk work
can bear. Calls → lanes → step → rows of each call → who waits for it.
"""

import asyncio
import contextlib
import queue
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from deployments.engine.batch import TokenBatch
from deployments.errors import EngineCrashError, EngineDeadError, EngineError

# The share of a step's time that isn't its fixed cost: where bulk work is alone; where somebody may come,
# whose request waits for the step that it meets; and where somebody is in the step, which is theirs.
ALONE, EXPECTING, SHARING = 0.97, 0.8, 0.5
# Somebody may come for so long after the last one.
EXPECTING_SECONDS = 2.0
# Times are kept by the size of their step, and the line is drawn anew after so many.
RECENT_STEPS = 15
MIN_SECONDS, MOST_EACH = 1e-6, 0.9


class StepTimes:
    """Seconds of a step = `fixed` + `each` times its tokens, as measured."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.fixed = self.each = 0.0
        self._recent: dict[int, deque[tuple[int, float]]] = {}  # by binary digits of the step's tokens
        self._undrawn = 0

    def record(self, tokens: int, seconds: float) -> None:
        """Count a step."""
        recent = self._recent.setdefault(tokens.bit_length(), deque(maxlen=RECENT_STEPS))
        recent.append((tokens, max(seconds, MIN_SECONDS)))
        self._undrawn += 1
        if self._undrawn >= RECENT_STEPS or len(recent) == 1:
            self._draw()

    def _draw(self) -> None:
        """Draw the line through each size's medians; an error of a tenth counts alike in all of them."""
        self._undrawn = 0
        medians = [
            [statistics.median(of) for of in zip(*each, strict=True)] for each in self._recent.values()
        ]
        tokens, seconds = np.array(medians).T
        weights = seconds**-2 / (seconds**-2).sum()
        middle, height = weights @ tokens, weights @ seconds
        spread = weights @ (tokens - middle) ** 2
        # Of steps of one size alone nothing is known of the fixed cost; nor is it ever nothing.
        slope = weights @ ((tokens - middle) * (seconds - height)) / spread if spread else height / middle / 2
        self.each = float(np.clip(slope, MIN_SECONDS / middle, MOST_EACH * height / middle))
        self.fixed = float(height - self.each * middle)

    def tokens(self, share: float) -> float:
        """Return the tokens of a step whose time is its fixed cost but for this share."""
        return share / (1 - share) * self.fixed / self.each if self.each else float("inf")

    def speed(self, tokens: float) -> float:
        """Return the tokens per second of steps of that size; 0 where nothing was measured."""
        return tokens / (self.fixed + self.each * tokens) if self.each else 0.0


@dataclass(eq=False)
class Call:
    """One call: its rows, how many of its inputs were taken into a step, how many have no row yet.

    `ends` has the tokens up to the end of each input; `arrived` and `begun` are in the queue's seconds. One
    `by_token` has a row for each token, and goes alone and whole.
    """

    batch: TokenBatch
    bulk: bool
    alone: bool
    future: "asyncio.Future[np.ndarray]"
    ends: np.ndarray
    missing: int
    arrived: float
    begun: float = 0.0
    taken: int = 0
    by_token: bool = False
    rows: np.ndarray | None = None

    def give(self, rows: np.ndarray, first: int) -> None:
        """Take rows of the inputs from `first` on."""
        if self.by_token:
            self.rows, self.missing = rows, 0
            return
        if len(rows) == len(self.batch):
            self.rows = rows
        else:
            if self.rows is None:
                self.rows = np.empty((len(self.batch), rows.shape[1]), np.float32)
            self.rows[first : first + len(rows)] = rows
        self.missing -= len(rows)


@dataclass(frozen=True)
class Step:
    """Inputs of calls, as (call, first input, inputs), in that order; `again`, one input's second try."""

    batch: TokenBatch
    pieces: list[tuple[Call, int, int]]
    again: bool = False

    @property
    def by_token(self) -> bool:
        """Whether its rows are the tokens', and not the inputs'."""
        return self.pieces[0][0].by_token


class StepQueue:
    """Calls that wait for an engine. Anybody may put them, from any thread; one takes steps."""

    def __init__(self, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Take no more than `max_tokens` into a step, unless one input has more."""
        self.times = StepTimes()
        self.steps = 0
        self._max_tokens = max_tokens
        self._clock = clock
        self._arrived: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._people: deque[Call] = deque()
        self._bulk: deque[Call] = deque()
        self._doubtful: deque[tuple[Call, int]] = deque()  # inputs whose row wasn't finite
        self._last_person = float("-inf")
        self._bulk_waited = False  # for the last step, which had people's inputs alone
        self._end: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """How fast the engine is where nobody waits; 0 until measured."""
        return self.times.speed(self._budget(ALONE))

    @property
    def waiting(self) -> int:
        """How many inputs are in no step yet."""
        return sum(len(call.batch) - call.taken for call in (*self._people, *self._bulk))

    def put(
        self, batch: TokenBatch, bulk: bool = False, alone: bool = False, by_token: bool = False
    ) -> "asyncio.Future[np.ndarray]":
        """Return what will be the rows of a batch. Nothing else is in a step with one that is `alone`."""
        self.check()
        future = asyncio.get_running_loop().create_future()
        ends = np.cumsum(batch.lengths)
        call = Call(
            batch, bulk, alone or by_token, future, ends, len(batch), self._clock(), by_token=by_token
        )
        self._arrived.put(call)
        self.check()  # who has closed it before this has not seen the call, perhaps; who does after it will
        return future

    def take(self) -> Step | None:
        """Return the next step, if there is one; None once closed."""
        if self._end is not None:
            return None
        while not self._arrived.empty():
            self._sort_in(self._arrived.get())
        for lane in (self._people, self._bulk):
            for call in [call for call in lane if call.future.cancelled()]:
                lane.remove(call)
        while self._doubtful:
            call, row = self._doubtful.popleft()
            if not call.future.cancelled():
                return Step(call.batch[row : row + 1], [(call, row, 1)], again=True)
        pieces: list[tuple[Call, int, int]] = []
        tokens = 0
        if not (self._bulk_waited and self._bulk and self._bulk[0].alone):  # else it is that one's turn
            tokens = self._fill(pieces, self._people, self._budget(ALONE), 0, at_least_one=True)
        people = len(pieces)
        expecting = self._clock() < self._last_person + EXPECTING_SECONDS
        share = SHARING if people else EXPECTING if expecting else ALONE
        # What is too long to share a step with people has every second one all the same.
        must = not people or self._bulk_waited
        self._fill(pieces, self._bulk, self._budget(share), tokens, at_least_one=must)
        self._bulk_waited = bool(self._bulk) and len(pieces) == people
        for call, _, _ in pieces:
            call.begun = call.begun or self._clock()
        return _joined(pieces) if pieces else None

    def wait(self) -> Step | None:
        """Return the next step as soon as there is one; None once closed."""
        while self._end is None:
            if (step := self.take()) is not None:
                return step
            self._sort_in(self._arrived.get())
        return None

    def done(self, step: Step, rows: np.ndarray, seconds: float) -> tuple[bool, list[Call]]:
        """Give its rows to a step's calls; return whether all are finite, and the calls that have all theirs.

        A row that isn't finite may be another input's doing, and is tried once more by itself.
        """
        self.steps += 1
        bad = () if np.isfinite(rows.sum()) else np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if not step.again:
            self.times.record(step.batch.tokens, seconds)
        begin = 0
        for call, first, count in step.pieces:
            call.give(rows if step.by_token else rows[begin : begin + count], first)
            again = (
                []
                if step.again or step.by_token
                else [first + row - begin for row in bad if 0 <= row - begin < count]
            )
            self._doubtful.extend((call, row) for row in again)
            call.missing += len(again)
            begin += count
        ended = [call for call, _, _ in step.pieces if not call.missing]
        for loop in {call.future.get_loop() for call in ended}:
            _tell(loop, _give, [call for call in ended if call.future.get_loop() is loop])
        return not len(bad), ended

    def fail(self, step: Step, error: EngineError) -> None:
        """Fail the calls of a step, which the engine has survived."""
        self.steps += 1
        for call, _, _ in step.pieces:
            self._refuse(call, error)

    def close(self, reason: str) -> None:
        """Take no more calls; who takes steps has to end, and to `fail_all`."""
        self._end = self._end or reason
        self._arrived.put(None)

    def fail_all(self, steps: Iterable[Step] = ()) -> None:
        """Fail every call that there is; those of steps in which the engine has ended may be the reason."""
        reason = self._end or ""
        for step in steps:
            self.fail(step, EngineCrashError(reason))
        while not self._arrived.empty():
            self._sort_in(self._arrived.get())
        for call in (*self._people, *self._bulk, *(call for call, _ in self._doubtful)):
            self._refuse(call, EngineDeadError(reason))

    def check(self) -> None:
        """Raise EngineDeadError once closed."""
        if self._end is not None:
            raise EngineDeadError(self._end)

    def _sort_in(self, call: Call | None) -> None:
        if call is None:
            return
        if not call.bulk:
            self._last_person = call.arrived
        # A suspect never would get its turn among bulk work, as long as people come.
        (self._bulk if call.bulk and (call.by_token or not call.alone) else self._people).append(call)

    def _budget(self, share: float) -> float:
        return min(self.times.tokens(share), self._max_tokens)

    def _fill(
        self,
        pieces: list[tuple[Call, int, int]],
        lane: deque[Call],
        budget: float,
        tokens: int,
        at_least_one: bool,
    ) -> int:
        """Add a lane's inputs to a step of so many tokens, up to its budget; return the tokens then."""
        while lane and not (pieces and (pieces[0][0].alone or lane[0].alone)):
            call = lane[0]
            before = int(call.ends[call.taken - 1]) if call.taken else 0
            count = int(np.searchsorted(call.ends, before + budget - tokens, side="right")) - call.taken
            if count <= 0 and not at_least_one:
                break
            count, at_least_one = len(call.batch) if call.by_token else max(count, 1), False
            pieces.append((call, call.taken, count))
            call.taken += count
            tokens += int(call.ends[call.taken - 1]) - before
            if call.taken < len(call.batch):
                break
            lane.popleft()
        return tokens

    def _refuse(self, call: Call, error: EngineError) -> None:
        for lane in (self._people, self._bulk):
            with contextlib.suppress(ValueError):
                lane.remove(call)
        _tell(call.future.get_loop(), _give_error, call, error)


def _joined(pieces: list[tuple[Call, int, int]]) -> Step:
    batches = [call.batch[first : first + count] for call, first, count in pieces]
    if len(batches) == 1:
        return Step(batches[0], pieces)
    ids = np.concatenate([batch.ids for batch in batches])
    return Step(TokenBatch(ids, np.concatenate([batch.lengths for batch in batches])), pieces)


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[..., None], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(what, *arguments)


def _give(calls: list[Call]) -> None:
    for call in calls:
        if not call.future.done():
            assert call.rows is not None
            call.future.set_result(call.rows)


def _give_error(call: Call, error: EngineError) -> None:
    if not call.future.done():
        call.future.set_exception(error)
