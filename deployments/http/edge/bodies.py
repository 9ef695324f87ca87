"""Bodies as they come: each one bounded, and all of them together."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request

from deployments.dispatch.admission import RETRY_AFTER_SECONDS
from deployments.errors import BodyTooLargeError, QueueFullError
from deployments.http.edge.content import encoding_of, inflate

# Counts bytes of a body. Raises QueueFullError.
Take = Callable[[int], None]

# How many bodies of the largest size may be in hand at a time. Small ones have a place of their own beside
# them, as large as one of those: a few people with much to send shall not shut everybody else out.
LARGEST_BODIES = 16
SMALL_BYTES = 2**16


class BytesInHand:
    """The bytes of all bodies of requests under way: one may be large, not all at once.

    What a body says of its length counts from the beginning: who has no place is told before much is sent.
    """

    def __init__(self, largest: int) -> None:
        """Have nothing in hand yet, of bodies that have `largest` bytes at most."""
        self._most = LARGEST_BODIES * largest
        self._most_small = self._most + largest
        self._bytes = 0

    @contextmanager
    def hold(self) -> Iterator[Take]:
        """Keep what is taken until the block ends."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            is_small = taken + count <= SMALL_BYTES
            if self._bytes + count > (self._most_small if is_small else self._most):
                raise QueueFullError(
                    "too many bytes of other requests are in hand", "body", RETRY_AFTER_SECONDS
                )
            taken += count
            self._bytes += count

        try:
            yield take
        finally:
            self._bytes -= taken


def declared_length(request: Request, max_body_bytes: int) -> int:
    """Return how long a body is going to be as it says, 0 where it doesn't. Raises BodyTooLargeError."""
    length = request.headers.get("content-length", "")
    size = int(length) if length.isdecimal() else 0
    if size > max_body_bytes:
        raise _too_large(max_body_bytes)
    return size


async def body_chunks(request: Request, max_body_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body as it comes, inflated. Raises BodyTooLargeError before more than the limit is read."""
    declared_length(request, max_body_bytes)
    chunks: AsyncIterator[bytes] = request.stream()
    if (header := request.headers.get("content-encoding")) and (encoding := encoding_of(header)):
        chunks = inflate(chunks, encoding)
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_body_bytes:
            # Made as it is raised: a name for it here would keep the body until the next full collection.
            raise _too_large(max_body_bytes)
        yield chunk


def _too_large(max_body_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is over the limit of {max_body_bytes} bytes", "body")
