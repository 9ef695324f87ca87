"""How fast a worker drains, what a call to it should hold and may take, how many retries it may spend.

All of it is learned from the calls that were answered.
"""

from collections import deque

from deployments.dispatch.work import MAX_CALL_INPUTS, Part

# Over how many seconds of work the rate is averaged: long enough to be calm, short enough to follow.
WINDOW_SECONDS = 5.0
SETTLED_SECONDS = 0.2
# A part is as many tokens as a replica embeds in this time: short enough to let others in between,
# long enough that the hop there and back doesn't count.
PART_SECONDS = 0.1
FIRST_PART_TOKENS = 4096
MIN_PART_TOKENS = 512
MAX_PART_TOKENS = 16_384
# A call that takes this many times as long as the slowest of the last ones has met a replica that hangs.
CUT_FACTOR = 10.0
MIN_CUT_SECONDS = 2.0
RECENT_CALLS = 128
UNKNOWN_CUT_SECONDS = 15.0


class DrainMeter:
    """Tokens per second of a worker while each of its replicas has a large call.

    Small calls tell what was asked for, not what a replica can do: most of their time is what any call costs.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._tokens = 0.0
        self._seconds = 0.0
        self._large = 0  # in flight
        self._since: float | None = None

    @property
    def rate(self) -> float | None:
        """Tokens per second; None until enough has been measured.

        Where all have failed nothing has: at a rate of 0 whatever waits would be too much.
        """
        is_measured = self._tokens > 0 and self._seconds >= SETTLED_SECONDS
        return self._tokens / self._seconds if is_measured else None

    def begin(self, now: float, large: bool, replicas: int) -> None:
        """A call leaves for one of so many replicas."""
        self._large += large
        if self._since is None and self._large >= replicas:
            self._since = now

    def done(self, tokens: int | None, now: float, large: bool, replicas: int) -> None:
        """A call ends with so many tokens embedded, 0 if it failed; None if it was broken off: no measure."""
        if self._since is not None and tokens is not None:
            self._seconds += now - self._since
            self._tokens += tokens
            self._since = now
        if self._seconds > WINDOW_SECONDS:
            self._tokens *= WINDOW_SECONDS / self._seconds
            self._seconds = WINDOW_SECONDS
        self._large -= large
        if self._large < replicas:
            self._since = None


class RetryBudget:
    """Retries are a fraction of the calls that succeed, so that a failing cluster isn't finished off.

    One for each worker, so that a failing model leaves the others theirs; a burst is allowed, since one dead
    replica fails many calls at once.
    """

    BURST = 100.0
    PER_CALL = 0.2

    def __init__(self) -> None:
        """Start with the burst."""
        self._left = self.BURST

    def earn(self) -> None:
        """A call succeeded."""
        self._left = min(self.BURST, self._left + self.PER_CALL)

    def spend(self) -> bool:
        """Take one retry; False when there is none left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Pace:
    """What one worker's replicas are known to do."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._seconds: deque[float] = deque(maxlen=RECENT_CALLS)  # of calls that were answered
        self._tokens: deque[int] = deque(maxlen=RECENT_CALLS)
        self._speeds: deque[float] = deque(maxlen=RECENT_CALLS)  # of the replicas that answered
        self.part_tokens = FIRST_PART_TOKENS

    def learn(self, seconds: float, tokens: int, speed: float) -> None:
        """A call has been answered; `speed` is in tokens per second, as its replica knows it, or 0."""
        self._seconds.append(seconds)
        self._tokens.append(tokens)
        if not speed:
            return
        self._speeds.append(speed)
        # Not the drain rate: that takes large calls to be known, and includes the way there and back.
        part_tokens = int(self.speed * PART_SECONDS)
        self.part_tokens = min(max(part_tokens, MIN_PART_TOKENS), MAX_PART_TOKENS)

    @property
    def speed(self) -> float:
        """Tokens per second of one replica where it has enough to do; 0 until one has told."""
        return max(self._speeds, default=0.0)

    def is_large(self, part: Part) -> bool:
        """Whether a call is at least half of what one may hold."""
        return 2 * part.tokens >= self.part_tokens or 2 * len(part.inputs) >= MAX_CALL_INPUTS

    def cut_after(self, tokens: int) -> float:
        """Seconds after which a call is taken to hang: many times what the slowest of the last ones took."""
        if not self._seconds:
            return UNKNOWN_CUT_SECONDS
        return max(MIN_CUT_SECONDS, CUT_FACTOR * max(self._seconds) * max(1.0, tokens / max(self._tokens)))
