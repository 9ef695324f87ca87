"""What waits and what flies: inputs, the requests that wait for them, and how they are cut into parts."""

import asyncio
import enum
import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deployments.engine.batch import Embedded
from deployments.errors import EmbeddingError
from deployments.logs import spent
from deployments.tracing import Call, current, tracer

# Beyond this the engine gains nothing from a larger call, and some thousands have crashed it.
MAX_CALL_INPUTS = 1024

# To tell of a call costs 1 to 3 microseconds for each of its requests: a short one is told to nobody.
TOLD_SECONDS = 0.05


class Lane(enum.IntEnum):
    """Interactive work goes first; bulk work yields to it."""

    INTERACTIVE = 0
    BULK = 1


class Pending:
    """One request: rows of float32 that fill up as its inputs are embedded."""

    def __init__(self, count: int, future: "asyncio.Future[np.ndarray]") -> None:
        """Wait for `count` vectors."""
        self.future = future
        self.spent, self.trace = spent.get(), current.get()
        self.inputs: list[Input] = []
        self._missing = count
        self._count = count
        self._vectors: np.ndarray | None = None

    def deliver(self, row: int, vector: np.ndarray) -> None:
        """Take one vector of shape (dimension,)."""
        if self.future.done():
            return
        if self._vectors is None:
            self._vectors = np.empty((self._count, len(vector)), np.float32)
        self._vectors[row] = vector
        self._missing -= 1
        if not self._missing:
            self.future.set_result(self._vectors)

    @property
    def complete(self) -> bool:
        """Whether every vector is there."""
        return not self._missing

    def fail(self, error: EmbeddingError) -> None:
        """Give the whole request up."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(eq=False, slots=True)
class Input:
    """The token ids of one text, embedded once for everybody who waits for it."""

    key: bytes
    ids: np.ndarray
    lane: Lane
    waiters: list[tuple[Pending, int]] = field(default_factory=list)
    part: "Part | None" = None


@dataclass(eq=False, slots=True)
class Part:
    """Inputs that travel together. `alone` parts are not joined with others: one in them may be at fault.

    `crashes` counts the engines that ended with them. `version` is that of the model that they were tokenised
    for; parts of two versions aren't joined.
    `since` is when it was queued, on `time.perf_counter`; `joined` how many parts became this one;
    `large` is set as it leaves, `answered` when its vectors are there.
    """

    inputs: list[Input]
    caller: str
    lane: Lane
    version: str = ""
    attempts: int = 0
    crashes: int = 0
    alone: bool = False
    task: "asyncio.Task[None] | None" = None
    since: float = 0.0
    joined: int = 1
    large: bool = False
    answered: bool = False

    def by_request(self) -> "Iterator[Part]":
        """Yield a part of its own for each request that still waits for some of the inputs."""
        self.drop_unwanted()
        for _, inputs in itertools.groupby(self.inputs, key=lambda each: each.waiters[0][0]):
            yield replace(self, inputs=list(inputs), alone=True, joined=1)

    def drop_unwanted(self) -> None:
        """Take out the inputs that nobody waits for any more."""
        self.inputs = [each for each in self.inputs if each.waiters]

    def tell(self, wait: float, call: float, engine: float) -> None:
        """Tell all requests that wait for it how many seconds it waited and its call took, unless few."""
        if wait + call < TOLD_SECONDS:
            return
        for pending in self.requests:
            if pending.spent is not None:
                pending.spent.update(wait=wait, call=call, engine=engine)

    def note(self, call: Call) -> None:
        """Put a call with it into the traces of all requests that wait for it."""
        for pending in self.requests:
            if pending.trace is not None:
                pending.trace.calls[call] = None

    @property
    def requests(self) -> set[Pending]:
        """The requests that wait for any of its inputs."""
        return {waiter[0] for each in self.inputs for waiter in each.waiters}

    @property
    def is_awaited(self) -> bool:
        """Whether anybody still waits for any of its inputs."""
        return any(each.waiters for each in self.inputs)

    @property
    def tokens(self) -> int:
        """Tokens of all its inputs."""
        return sum(len(each.ids) for each in self.inputs)


def noted(answer: Coroutine[Any, Any, Embedded], part: Part) -> Coroutine[Any, Any, Embedded]:
    """Let a call with a part stand in the traces of all requests that wait for it."""
    return answer if tracer() is None else _noted(answer, part)


async def _noted(answer: Awaitable[Embedded], part: Part) -> Embedded:
    sizes = {"inputs": len(part.inputs), "tokens": part.tokens, "requests": len(part.requests)}
    call = Call.begin(sizes | {"attempt": part.attempts + 1})
    part.note(call)  # a request may end before it does
    try:
        embedded = await answer
        call.engine_seconds = embedded.engine_seconds
        return embedded
    except Exception as error:
        call.error = type(error).__name__
        raise
    finally:
        call.ended = time.perf_counter()
        part.note(call)  # others may wait for one of its inputs by now


@dataclass(slots=True)
class Outstanding:
    """What has been let in and not yet answered."""

    tokens: int = 0
    requests: int = 0


def split(inputs: Sequence[Input], part_tokens: int, replicas: int) -> list[list[Input]]:
    """Cut inputs into parts of nearly equal tokens, none much above `part_tokens`.

    What is more than a part becomes a multiple of `replicas` parts, so that all finish together.
    """
    lengths = np.fromiter((len(each.ids) for each in inputs), np.int64, len(inputs))
    total = int(lengths.sum())
    if len(inputs) <= MAX_CALL_INPUTS and (total <= part_tokens or len(inputs) <= 1):
        return [list(inputs)] if inputs else []
    rounds = max(-(-total // (part_tokens * replicas)), -(-len(inputs) // (MAX_CALL_INPUTS * replicas)))
    count = min(rounds * replicas, len(inputs))
    # Each input belongs to the part in which its middle token lies.
    middles = np.cumsum(lengths) - lengths / 2
    numbers = np.minimum((middles * count / total).astype(np.int64), count - 1)
    borders = np.searchsorted(numbers, np.arange(count + 1))
    return [list(inputs[a:b]) for a, b in itertools.pairwise(borders) if a < b]


class Lanes:
    """Parts that wait, by lane and caller. A caller with a thousand parts waits behind one with one."""

    def __init__(self) -> None:
        """Start empty."""
        self._lanes: dict[Lane, OrderedDict[str, deque[Part]]] = {lane: OrderedDict() for lane in Lane}

    def put(self, part: Part, first: bool = False) -> None:
        """Queue a part behind its caller's others, or `first` when it has been tried before."""
        waiting = self._lanes[part.lane].setdefault(part.caller, deque())
        if first:
            waiting.appendleft(part)
        else:
            waiting.append(part)

    @property
    def tokens(self) -> int:
        """Tokens of all that waits."""
        lines = (line for callers in self._lanes.values() for line in callers.values())
        return sum(part.tokens for line in lines for part in line)

    def take(self, lane: Lane, part_tokens: int) -> Part | None:
        """Take the next part of a lane, joined with what else waits there, up to `part_tokens`."""
        joined: Part | None = None
        tokens = 0
        while (caller := next(iter(self._lanes[lane]), None)) is not None:
            waiting = self._lanes[lane][caller]
            part = waiting[0]
            part.drop_unwanted()
            if joined is not None and part.inputs:
                if tokens + part.tokens > part_tokens:
                    return joined
                if (part.attempts, part.version) != (joined.attempts, joined.version):
                    return joined
                if len(joined.inputs) + len(part.inputs) > MAX_CALL_INPUTS:
                    return joined
            self._advance(lane, caller)
            if not part.inputs:
                continue
            tokens += part.tokens
            if joined is None:
                joined = part
            else:
                joined.inputs += part.inputs
                joined.joined += part.joined
        return joined

    def _advance(self, lane: Lane, caller: str) -> None:
        """Take a caller's first part off, and send the caller to the end of the line."""
        callers = self._lanes[lane]
        waiting = callers[caller]
        waiting.popleft()
        if waiting:
            callers.move_to_end(caller)
        else:
            del callers[caller]


class Apart:
    """Parts in which one input may be at fault. One flies at a time: none shall end another's engine."""

    def __init__(self) -> None:
        """Start empty."""
        self._waiting: dict[Lane, deque[Part]] = {lane: deque() for lane in Lane}
        self.flies = False

    def put(self, part: Part) -> None:
        """Queue a part that isn't joined with others."""
        self._waiting[part.lane].append(part)

    @property
    def tokens(self) -> int:
        """Tokens of all that waits."""
        return sum(part.tokens for line in self._waiting.values() for part in line)

    def take(self) -> Part | None:
        """Take the next part, which flies from here on; None while another one does."""
        if self.flies:
            return None
        for line in self._waiting.values():
            while line:
                part = line.popleft()
                part.drop_unwanted()
                if part.inputs:
                    self.flies = True
                    return part
        return None
