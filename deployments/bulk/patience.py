"""How long work that may wait is tried again: what only time mends passes, what is at fault doesn't."""

import asyncio
import math
import random

from deployments.errors import (
    DeadlineExceededError,
    EmbeddingError,
    HarmfulInputError,
    ModelUnavailableError,
    QueueFullError,
    RateLimitError,
)

FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 5.0
# A model or a bug that fails on an input will mostly do so again: after so many the input is at fault.
INTERNAL_ERRORS = 3


class Patience:
    """The patience with one piece of work, until `deadline` on the event loop's clock."""

    def __init__(self, deadline: float = math.inf) -> None:
        """Have met no error yet."""
        self._deadline = deadline
        self._pause = FIRST_PAUSE_SECONDS
        self._internal = 0

    async def wait_out(self, error: EmbeddingError) -> None:
        """Sleep until the work may be tried again. Raises the error where that is in vain or too late."""
        passes = isinstance(error, ModelUnavailableError | RateLimitError | DeadlineExceededError)
        if not passes:
            self._internal += 1
            ours = error.status >= EmbeddingError.status and not isinstance(error, HarmfulInputError)
            if not ours or self._internal == INTERNAL_ERRORS:
                raise error
        # A full queue of ours has room as soon as anything ends, long before all of it has. Not all who wait
        # should come back at the same moment.
        least = 0.0 if isinstance(error, QueueFullError) else self._pause / 2
        pause = random.uniform(least, self._pause)  # noqa: S311 - no secret
        if isinstance(error, RateLimitError):
            pause += error.retry_after or 0.0
        if asyncio.get_running_loop().time() + pause > self._deadline:
            raise error
        self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)
        await asyncio.sleep(pause)
