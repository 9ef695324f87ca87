"""Files and batches, as the ingress stores and shows them (OpenAI).

Any of several ingress replicas may be asked, since all of it lies in the storage. The work is the runner's.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deployments.api.batches import expiry_seconds, parse_create, parse_page
from deployments.api.batches.schema import DeletedFile, FileObject
from deployments.api.batches.upload import FILE, Upload
from deployments.api.fields import decimal
from deployments.batches.store import Batches, owner_of
from deployments.errors import DeadlineExceededError, EmbeddingError, InvalidRequestError
from deployments.http.auth import key_of
from deployments.http.edge.bodies import BODY_SECONDS, body_chunks
from deployments.http.errors import json_response
from deployments.http.serving import Serving, wanted_seconds
from deployments.keys.rates import REQUESTS

# OpenAI's own.
MAX_FILES, DEFAULT_BATCHES, MAX_BATCHES = 10_000, 20, 100
PURPOSE: Literal["batch"] = "batch"
FORM_EXPIRY = "expires_after"
CONTENT_TYPE = "application/octet-stream"


class BatchServing:
    """Stores and shows the files and batches of whoever asks."""

    def __init__(
        self, batches: Batches, max_file_bytes: int, wake: Callable[[], None], serving: Serving
    ) -> None:
        """Share the reading and charging of `serving`; `wake` tells the runner of something new."""
        self._batches = batches
        self._files = batches.files
        self._max_file_bytes = max_file_bytes
        self._wake = wake
        self._serving = serving

    # --- files -----------------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        """Store a file as it comes."""
        key = key_of(request.scope)
        owner = owner_of(key)
        await self._serving.charge(key, REQUESTS)
        form = Upload(request.headers.get("content-type", ""))
        length = request.headers.get("content-length", "")
        await self._files.check_room(owner, 1, decimal(length) or 0)
        name, path = self._files.upload(owner)
        content = form.content(_lively(body_chunks(request, self._max_file_bytes)))
        size = await self._files.storage.write_stream(path, content)
        try:
            if form.fields.get("purpose") != PURPOSE:
                raise InvalidRequestError(f"`purpose` must be `{PURPOSE}`", "purpose")
            seconds = _expiry(form.fields)
            await self._files.check_room(owner)  # of several at once, and of those that don't say their size
        except EmbeddingError:
            await self._files.forget(owner, name, None)
            raise
        now = self._files.now()
        file = FileObject(
            id=name,
            bytes=size,
            created_at=now,
            filename=form.filename or FILE,
            purpose=PURPOSE,
            expires_at=now + seconds if seconds else None,
        )
        return _json(await self._files.add(owner, file, (path,)))

    async def files(self, request: Request) -> Response:
        """List files."""
        page = parse_page(request.query_params, MAX_FILES, MAX_FILES)
        purpose = request.query_params.get("purpose")
        return _json(await self._files.list(owner_of(key_of(request.scope)), page, purpose))

    async def file(self, request: Request, file_id: str) -> Response:
        """Show a file."""
        record = await self._files.find(owner_of(key_of(request.scope)), file_id)
        return _json(record.shown)

    async def delete(self, request: Request, file_id: str) -> Response:
        """Remove a file."""
        await self._files.remove(owner_of(key_of(request.scope)), file_id)
        return _json(DeletedFile(id=file_id))

    async def content(self, request: Request, file_id: str) -> Response:
        """Send what is in a file."""
        record = await self._files.find(owner_of(key_of(request.scope)), file_id)
        # Browsers shall not take what a client stored for a page of ours.
        headers = {"content-length": str(record.shown.bytes), "x-content-type-options": "nosniff"}
        return StreamingResponse(self._files.content(record), 200, headers, CONTENT_TYPE)

    # --- batches ---------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        """Make a batch."""
        arrival = asyncio.get_running_loop().time()
        key = key_of(request.scope)
        await self._serving.charge(key, REQUESTS)
        deadline = arrival + min(BODY_SECONDS, wanted_seconds(request))
        with self._serving.in_hand.hold() as take:
            wanted = await self._serving.parse(
                parse_create, await self._serving.read(request, deadline, take)
            )
        batch = await self._batches.create(owner_of(key), wanted)
        self._wake()
        return _json(batch)

    async def batches(self, request: Request) -> Response:
        """List batches."""
        page = parse_page(request.query_params, DEFAULT_BATCHES, MAX_BATCHES)
        return _json(await self._batches.list(owner_of(key_of(request.scope)), page))

    async def batch(self, request: Request, batch_id: str) -> Response:
        """Show a batch."""
        return _json(await self._batches.find(owner_of(key_of(request.scope)), batch_id))

    async def cancel(self, request: Request, batch_id: str) -> Response:
        """Let a batch end."""
        batch = await self._batches.cancel(owner_of(key_of(request.scope)), batch_id)
        self._wake()
        return _json(batch)


async def _lively(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield what comes. Raises DeadlineExceededError where nothing comes for long."""
    while True:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise DeadlineExceededError("the body took too long to arrive", "body") from None
        if chunk is None:
            return
        yield chunk


def _expiry(fields: dict[str, str]) -> int | None:
    """Return how long a file is to be kept, as OpenAI's clients write that into a form."""
    anchor, seconds = (fields.get(f"{FORM_EXPIRY}[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    return expiry_seconds(anchor, decimal(seconds or ""), FORM_EXPIRY)


def _json(shown: BaseModel) -> Response:
    return json_response(shown.model_dump_json())
