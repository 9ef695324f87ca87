"""Who may have how much waiting at one worker: refused at once is better than timed out later."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.config.worker import Limits
from deployments.dispatch.work import Outstanding
from deployments.errors import QueueFullError

RETRY_AFTER_SECONDS = 5.0
MAX_RETRY_AFTER_SECONDS = 120.0
# Until the rate is known, so much may wait; from then on what can be embedded in this share of the deadline.
FIRST_BOUND_TOKENS = 600_000
QUEUE_SHARE_OF_DEADLINE = 0.5
# One caller alone fills eight ninths of the queue.
CALLER_SHARE = 8.0
# A caller is alone when nobody else has asked for so long.
ALONE_SECONDS = 3.0


class Admission:
    """The tokens that a worker's callers have outstanding, and the bounds that they keep."""

    def __init__(self, outstanding: Outstanding, clock: Callable[[], float] = time.monotonic) -> None:
        """Keep `outstanding` up to date from now on."""
        self._outstanding = outstanding
        self._clock = clock
        self._held: Counter[str] = Counter()  # tokens by caller
        self._small: Counter[str] = Counter()  # of those, in requests of a single part
        self._last_caller: str | None = None
        self._last_change = -ALONE_SECONDS

    def check(self, tokens: int, caller: str, limits: Limits, rate: float | None) -> None:
        """Refuse what couldn't be done in time at `rate` tokens per second. Raises QueueFullError.

        A caller may hold at most `CALLER_SHARE` times what it leaves free, so that however much it sends,
        somebody else's request is let in.
        """
        bound: float = max(FIRST_BOUND_TOKENS, 2 * limits.max_request_tokens)
        if limits.max_outstanding_tokens is not None:
            bound = limits.max_outstanding_tokens
        elif rate is not None:
            bound = rate * limits.request_timeout_s * QUEUE_SHARE_OF_DEADLINE
        outstanding = self._outstanding.tokens
        free = bound - outstanding
        # With nothing outstanding every request is let in: it can't be done sooner by waiting.
        if outstanding and (tokens > free or self._held[caller] + tokens > CALLER_SHARE * free):
            wait = outstanding / rate if rate else RETRY_AFTER_SECONDS
            raise QueueFullError(
                f"the queue is full: {outstanding} tokens wait",
                "model",
                min(max(wait, 1.0), MAX_RETRY_AFTER_SECONDS),
            )

    @contextmanager
    def hold(self, tokens: int, caller: str, small: bool) -> Iterator[None]:
        """Count a request as outstanding; `small` when it is a single part."""
        small_tokens = tokens if small else 0
        self._outstanding.tokens += tokens
        self._outstanding.requests += 1
        self._held[caller] += tokens
        self._small[caller] += small_tokens
        try:
            yield
        finally:
            self._outstanding.tokens -= tokens
            self._outstanding.requests -= 1
            self._held[caller] -= tokens
            self._small[caller] -= small_tokens
            if not self._held[caller]:
                del self._held[caller], self._small[caller]

    def is_flood(self, caller: str, flying_tokens: int) -> bool:
        """Whether a caller has more under way than flies at once, while there are other callers."""
        now = self._clock()
        if self._last_caller not in (None, caller):
            self._last_change = now
        self._last_caller = caller
        alone = now > self._last_change + ALONE_SECONDS
        return not alone and self._small[caller] > flying_tokens
