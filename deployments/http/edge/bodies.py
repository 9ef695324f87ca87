"""Bodies as they come, each one bounded."""

from collections.abc import AsyncIterator

from starlette.requests import Request

from deployments.errors import BodyTooLargeError
from deployments.http.edge.content import encoding_of, inflate


async def body_chunks(request: Request, max_body_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body as it comes, inflated. Raises BodyTooLargeError before more than the limit is read."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_body_bytes:
        raise _too_large(max_body_bytes)
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
