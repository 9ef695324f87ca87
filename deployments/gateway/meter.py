"""How fast a worker drains, and how many retries it may spend."""

# Over how many seconds of work the rate is averaged: long enough to be calm, short enough to follow.
WINDOW_SECONDS = 5.0
SETTLED_SECONDS = 0.2


class DrainMeter:
    """Tokens per second of a worker while it has work, over all its replicas."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._tokens = 0.0
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def rate(self) -> float | None:
        """Tokens per second; None until enough has been measured."""
        return self._tokens / self._seconds if self._seconds >= SETTLED_SECONDS else None

    def begin(self, now: float) -> None:
        """There is work from now on."""
        if self._since is None:
            self._since = now

    def done(self, tokens: int, now: float, idle: bool) -> None:
        """Count so many tokens as done; `idle` when nothing is in flight any more.

        Only time in which more was waiting tells what the worker can do; the rest, for which `tokens` are 0,
        tells what it was asked for.
        """
        if self._since is None:
            return
        if tokens:
            self._seconds += now - self._since
            self._tokens += tokens
        if self._seconds > WINDOW_SECONDS:
            self._tokens *= WINDOW_SECONDS / self._seconds
            self._seconds = WINDOW_SECONDS
        self._since = None if idle else now


class RetryBudget:
    """Retries are a fraction of the calls that succeed, so that a failing cluster isn't finished off.

    One for each process that sends; a burst is allowed, since one dead replica fails many calls at once.
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
