"""Bodies that are compressed on their way: inflated piece by piece, and never beyond what a body may have."""

import asyncio
import zlib
from collections.abc import AsyncIterable, AsyncIterator

from deployments.errors import InvalidRequestError, UnsupportedEncodingError

# What clients write where nothing is encoded: the name of a charset, which has another header, for one.
PLAIN = frozenset(("", "identity", "none", "utf-8", "utf8", "us-ascii"))
GZIP, DEFLATE = "gzip", "deflate"
ACCEPTED = f"{GZIP}, {DEFLATE}"
# So much comes out at a time; other requests have a turn in between.
PIECE_BYTES = 2**18
# zlib's names: a gzip header, and no header at all.
WITH_GZIP, RAW = zlib.MAX_WBITS | 16, -zlib.MAX_WBITS


def encoding_of(header: str) -> str | None:
    """Return the one encoding that a Content-Encoding names; None where it names none.

    Raises UnsupportedEncodingError for others, and for several.
    """
    named = [each for each in (part.strip().lower() for part in header.split(",")) if each not in PLAIN]
    if not named:
        return None
    kind = named[0].removeprefix("x-")
    if len(named) > 1 or kind not in (GZIP, DEFLATE):
        raise UnsupportedEncodingError(
            f"bodies may be encoded with {GZIP} or {DEFLATE}, once", "content-encoding"
        )
    return kind


async def inflate(chunks: AsyncIterable[bytes], kind: str) -> AsyncIterator[bytes]:
    """Yield what compressed chunks hold. Raises InvalidRequestError where they are something else."""
    stream = None
    async for chunk in chunks:
        data = chunk
        while data:
            stream = stream or zlib.decompressobj(_bits(kind, data))
            try:
                piece = stream.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise InvalidRequestError(f"the body isn't valid {kind}", "body") from None
            data = stream.unconsumed_tail
            if stream.eof:
                # Several gzip files in a row are one; nothing may follow the other kind.
                data, stream = stream.unused_data, None
                if data and kind == DEFLATE:
                    raise InvalidRequestError(f"the body isn't valid {kind}", "body")
            if piece:
                yield piece
                await asyncio.sleep(0)
    if stream is not None:
        raise InvalidRequestError(f"the body's {kind} ends too early", "body")


def _bits(kind: str, data: bytes) -> int:
    """Return how zlib is to read data: `deflate` is zlib's format, which some send without its header."""
    if kind == GZIP:
        return WITH_GZIP
    has_header = data[0] & 0x0F == zlib.DEFLATED and int.from_bytes(data[:2]) % 31 == 0
    return zlib.MAX_WBITS if has_header else RAW
