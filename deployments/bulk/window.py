"""Room for so many tokens at a time: what callers that may wait go through, instead of being refused."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

# How much room texts take before they have been tokenised: English has some four characters a token.
TOKENS_PER_CHARACTER = 0.25


class Window:
    """Lets work in as long as there is room for it, in the order in which it came."""

    def __init__(self, bound: Callable[[], int]) -> None:
        """Ask `bound` each time how many tokens may be inside; something may always be."""
        self._bound = bound
        self._inside = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def room(self, tokens: int) -> AsyncIterator[None]:
        """Wait for room, and take it until the block ends."""
        place = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, place))
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            # It may have been let in and cancelled in the same moment.
            self._leave(0 if place.cancelled() else tokens)
            raise
        try:
            yield
        finally:
            self._leave(tokens)

    def _leave(self, tokens: int) -> None:
        self._inside -= tokens
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            tokens, place = self._waiting[0]
            if not place.done():
                if self._inside and self._inside + tokens > self._bound():
                    return
                self._inside += tokens
                place.set_result(None)
            self._waiting.popleft()
