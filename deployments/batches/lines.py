"""The lines of batches, embedded as HTTP requests are, but in the bulk lane and with all the time there is.

What only time mends is tried again, and what is wrong with a line is that line's error.
"""

import asyncio
import functools
import weakref
from typing import Any
from weakref import WeakKeyDictionary

from deployments.api import openai
from deployments.api.request import EmbeddingRequest
from deployments.batches.store import owner_of
from deployments.bulk.patience import Patience
from deployments.bulk.window import TOKENS_PER_CHARACTER, Window
from deployments.dispatch.dispatch import Dispatch
from deployments.dispatch.work import Lane
from deployments.errors import (
    EmbeddingError,
)
from deployments.http.serving import Client, Serving
from deployments.keys.file import Key
from deployments.metrics import NO_MODEL, SUCCESS
from deployments.tracing import WAIT, stage

# Nobody waits at the other end, so a call may wait long for those of people.
CALL_SECONDS = 600.0
# So much of an owner's is under way, as a multiple of what flies: if a block's lines all started at once,
# tokenising them would take a core for a third of a second.
WINDOW_FLIGHTS = 2


class Bulk:
    """Embeds a line at a time over a catalog of models; see `batches.run.Embed`."""

    def __init__(self, serving: Serving) -> None:
        """Share what requests share."""
        self._serving = serving
        # By worker and owner; those of a worker that is gone go with it.
        self._windows: WeakKeyDictionary[Dispatch, dict[str, Window]] = WeakKeyDictionary()

    async def embed(self, fields: dict[str, Any], key: Key | None) -> tuple[bytes, int]:
        """Return the answer and its tokens. Raises the EmbeddingError that can't be waited out."""
        model, outcome = NO_MODEL, EmbeddingError.code
        try:
            wanted = openai.parse_fields(fields, openai.JSON_FORMATS)
            served = self._serving.find_for(key, wanted.model, wanted.tags)
            model = served.name
            served.check_embeds()
            with stage(WAIT):
                answer = await self._persist(wanted, key)
            outcome = SUCCESS
            return answer
        except EmbeddingError as error:
            outcome = error.code
            raise
        except asyncio.CancelledError:
            outcome = ""  # it isn't over: it is run again, or not wanted any more
            raise
        finally:
            if outcome:
                self._serving.metrics.batch_lines.labels(model, outcome).inc()

    async def _persist(self, wanted: openai.OpenAIRequest, key: Key | None) -> tuple[bytes, int]:
        """Ask until there is an answer, or an error that stays."""
        client = Client(key, owner_of(key), Lane.BULK)
        patience = Patience()
        while True:
            try:
                # Found anew each time: meanwhile the model may have changed, or gone.
                served = self._serving.find_for(key, wanted.model, wanted.tags)
                window = self._window(served.dispatch, client.caller)
                async with window.room(_estimate(wanted)):
                    deadline = asyncio.get_running_loop().time() + CALL_SECONDS
                    return await self._serving.answer(wanted, served, client, deadline)
            except EmbeddingError as error:
                await patience.wait_out(error)

    def _window(self, dispatch: Dispatch, owner: str) -> Window:
        """Return an owner's window to a worker; each owner has one, so that they still take turns."""
        windows = self._windows.setdefault(dispatch, {})
        if owner not in windows:
            windows[owner] = Window(functools.partial(_room, weakref.ref(dispatch)))
        return windows[owner]


def _room(dispatch: weakref.ref[Dispatch]) -> int:
    """Return how many tokens of an owner's may be under way; none once the worker has gone."""
    found = dispatch()
    return WINDOW_FLIGHTS * found.flying_tokens if found is not None else 0


def _estimate(wanted: EmbeddingRequest) -> int:
    """Return about how many tokens a request has."""
    characters = sum(map(len, wanted.texts)) + (wanted.chat.characters if wanted.chat else 0)
    return int(characters * TOKENS_PER_CHARACTER) + sum(map(len, wanted.token_ids))
