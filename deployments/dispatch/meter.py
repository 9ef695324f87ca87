"""How fast a worker drains, and how many retries it may spend."""

# Over how many seconds of work the rate is averaged: long enough to be calm, short enough to follow.
WINDOW_SECONDS = 5.0
SETTLED_SECONDS = 0.2


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
