"""Bodies as they come, and answers as they are read: each one bounded, and all of them together."""

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator, Callable, Iterator

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.dispatch.admission import RETRY_AFTER_SECONDS
from deployments.errors import BodyTooLargeError, QueueFullError
from deployments.http.edge.content import encoding_of, inflate

# Counts bytes of a body. Raises QueueFullError.
Take = Callable[[int], None]

# How long a body may take to come. For which model it is, and so its deadline, is known once it is there.
BODY_SECONDS = 30.0
# How many bodies of the largest size may be in hand at a time. Small ones have a place of their own beside
# them, as large as one of those: a few people with much to send shall not shut everybody else out.
LARGEST_BODIES = 16
SMALL_BYTES = 2**16
# An answer leaves in such pieces, the next one once most of the last has been read, which may take so long.
PIECE_BYTES = 2**18
PIECE_SECONDS = 30.0


class BytesInHand:
    """The bytes of all bodies and answers of requests under way: one may be large, not all at once.

    What a body says of its length counts from the beginning: who has no place is told before much is sent.
    """

    def __init__(self, largest: int) -> None:
        """Have nothing in hand yet, of bodies that have `largest` bytes at most."""
        self._most = LARGEST_BODIES * largest
        self._most_small = self._most + largest
        self._bytes = 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[Take]:
        """Keep what is taken until the block ends."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            is_small = taken + count <= SMALL_BYTES
            if self._bytes + count > (self._most_small if is_small else self._most):
                # To tell a client costs a neighbour more than some of its body does. Whoever has a lot to
                # send comes again when all bodies that have a place now are there, or were given up.
                wait = RETRY_AFTER_SECONDS if is_small else BODY_SECONDS
                raise QueueFullError("too many bytes of other requests are in hand", "body", wait)
            taken += count
            self._bytes += count

        try:
            yield take
        finally:
            self._bytes -= taken


class Buffer:
    """A body as it comes: bytes if it comes at once, else a mapping that goes back to the system with it.

    A bytearray may be copied each time it grows: glibc takes up to 32 MiB from its heap, and where many grow
    side by side that took 50 ms of a body of 30 MiB, up to 20 at a time, with everybody else waiting.
    """

    def __init__(self, most: int) -> None:
        """Have room for so many bytes; the system gives pages for those that come."""
        self._most = most
        self._first = b""
        self._mapping: mmap.mmap | None = None
        self.size = 0

    def append(self, chunk: bytes) -> None:
        """Keep what follows."""
        begin, self.size = self.size, self.size + len(chunk)
        if begin == 0:
            self._first = chunk
        elif chunk:
            if self._mapping is None:
                self._mapping = mmap.mmap(-1, self._most, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self._mapping[:begin] = self._first
            self._mapping[begin : self.size] = chunk

    def content(self) -> bytes | memoryview:
        """Return all of it."""
        return self._first if self._mapping is None else memoryview(self._mapping)[: self.size]


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
    header = ",".join(request.headers.getlist("content-encoding"))
    if header and (encoding := encoding_of(header)):
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


class Unread(Exception):  # noqa: N818 - nobody is told of it
    """A client doesn't read its answer."""


class Paced:
    """Middleware: large answers leave as they are read, and count as bytes in hand until they are.

    A server by itself takes an answer at once, however slowly its client reads. Who has no place is told so
    in the answer's place; who doesn't read is cut off.
    """

    def __init__(self, app: ASGIApp, in_hand: BytesInHand) -> None:
        """Wrap an application."""
        self._app = app
        self._in_hand = in_hand

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises QueueFullError before the answer has begun."""
        start: Message | None = None

        async def paced(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            begin, start = start, None
            size = len(message.get("body", b""))
            if begin is not None and size <= PIECE_BYTES and not message.get("more_body"):
                await send(begin)
                await send(message)  # a socket takes as much, whoever reads it
                return
            with self._in_hand.hold() as take:
                if begin is not None:  # of what streams there is one small piece at a time
                    take(size if size > PIECE_BYTES else 0)
                    await send(begin)
                for piece in pieces(message) if size > PIECE_BYTES else (message,):
                    await _read(send, piece)

        with contextlib.suppress(Unread):
            await self._app(scope, receive, paced)


def pieces(message: Message) -> Iterator[Message]:
    """Yield a message as several with a part of its body each."""
    body = message["body"]
    for begin in range(0, len(body), PIECE_BYTES):
        part = {**message, "body": body[begin : begin + PIECE_BYTES]}
        yield part if begin + PIECE_BYTES >= len(body) else {**part, "more_body": True}


async def _read(send: Send, message: Message) -> None:
    """Send what follows once the client has read most of what went before. Raises Unread."""
    try:
        async with asyncio.timeout(PIECE_SECONDS):
            await send(message)
    except TimeoutError:
        raise Unread from None
