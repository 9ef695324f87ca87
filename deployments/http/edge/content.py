"""Bodies that are compressed on their way: inflated piece by piece, and never beyond what a body may have."""

import asyncio
import zlib
from collections.abc import AsyncIterable, AsyncIterator

from deployments.errors import InvalidRequestError, UnsupportedEncodingError

try:
    import zstandard
except ImportError:  # whoever wants zstd installs it
    zstandard = None  # type: ignore[assignment]

# What clients write where nothing is encoded: the name of a charset, which has another header, for one.
PLAIN = frozenset(("", "identity", "none", "utf-8", "utf8", "us-ascii"))
GZIP, DEFLATE, ZSTD = "gzip", "deflate", "zstd"
KINDS = (GZIP, DEFLATE) if zstandard is None else (GZIP, DEFLATE, ZSTD)
ACCEPTED = ", ".join(KINDS)
# So much comes out at a time; other requests have a turn in between.
PIECE_BYTES = 2**18
# zlib's names: a gzip header, and no header at all.
WITH_GZIP, RAW = zlib.MAX_WBITS | 16, -zlib.MAX_WBITS
# Four bytes of zstd may be a block of 128 KiB: so many are 2 MiB at most.
ZSTD_STEP_BYTES = 64
# What RFC 8878 asks a reader to have room for.
ZSTD_WINDOW_BYTES = 2**23

ERRORS = (zlib.error,) if zstandard is None else (zlib.error, zstandard.ZstdError)


def encoding_of(header: str) -> str | None:
    """Return the one encoding that a Content-Encoding names; None where it names none.

    Raises UnsupportedEncodingError for others, and for several.
    """
    named = [each for each in (part.strip().lower() for part in header.split(",")) if each not in PLAIN]
    if not named:
        return None
    kind = named[0].removeprefix("x-")
    if len(named) > 1 or kind not in KINDS:
        told = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise UnsupportedEncodingError(f"bodies may be encoded with {told}, once", "content-encoding")
    return kind


class Unzstd:
    """zstd's decompressor as zlib's, whose answers have no bound but what is put in."""

    eof, unconsumed_tail, unused_data = False, b"", b""

    def __init__(self) -> None:
        """Begin a frame."""
        reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        self._reader = reader.decompressobj()

    def decompress(self, data: bytes, most: int, /) -> bytes:
        """Return what some of the data holds: at most 2 MiB, whatever `most` is. Raises ZstdError."""
        view, piece, begin = memoryview(data), b"", 0
        while begin < len(view) and len(piece) < most and not self.eof:
            piece += self._reader.decompress(view[begin : begin + ZSTD_STEP_BYTES])
            begin += ZSTD_STEP_BYTES
            self.eof = self._reader.eof
        rest = bytes(view[begin:])
        self.unconsumed_tail = b"" if self.eof else rest
        self.unused_data = self._reader.unused_data + rest if self.eof else b""
        return piece


async def inflate(chunks: AsyncIterable[bytes], kind: str) -> AsyncIterator[bytes]:
    """Yield what compressed chunks hold. Raises InvalidRequestError where they are something else."""
    stream: zlib._Decompress | Unzstd | None = None
    async for chunk in chunks:
        data, is_full = chunk, False
        while data or is_full:
            if stream is None or stream.eof:
                # Several gzip files in a row are one, and several of zstd; nothing may follow the other kind.
                if stream is not None and kind == DEFLATE:
                    raise _invalid(kind)
                stream = _stream(kind, data)
            try:
                piece = stream.decompress(data, PIECE_BYTES)
            except ERRORS:
                raise _invalid(kind) from None
            data = stream.unused_data if stream.eof else stream.unconsumed_tail
            # zlib may have taken all there is, and hold back what had no place in this piece.
            is_full = len(piece) >= PIECE_BYTES and not stream.eof
            if piece:
                yield piece
                await asyncio.sleep(0)
    if stream is not None and not stream.eof:
        raise InvalidRequestError(f"the body's {kind} ends too early", "body")


def _invalid(kind: str) -> InvalidRequestError:
    return InvalidRequestError(f"the body isn't valid {kind}", "body")


def _stream(kind: str, data: bytes) -> "zlib._Decompress | Unzstd":
    """Return what reads data: `deflate` is zlib's format, which some send without its header."""
    if kind == ZSTD:
        return Unzstd()
    if kind == GZIP:
        return zlib.decompressobj(WITH_GZIP)
    # No compressor begins so without it: a block that is only stored, with bits set that mean nothing.
    has_header = data[0] & 0x0F == zlib.DEFLATED
    return zlib.decompressobj(zlib.MAX_WBITS if has_header else RAW)
