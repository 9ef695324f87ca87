"""One process's way to the replicas, for everything but HTTP: an event loop on a thread, a dispatch on it.

texts → rows that can be embedded → chunks → room in the window → tokenised → the ingress's dispatch → rows

A job's work waits for room instead of being refused, and for a model that is away instead of failing.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from deployments.api.encoding import truncate
from deployments.api.openai import OpenAIRequest
from deployments.api.request import Prompt, Truncation
from deployments.bulk.patience import Patience
from deployments.bulk.window import TOKENS_PER_CHARACTER, Window
from deployments.config.worker import Worker
from deployments.dispatch.catalog import Catalog, Served
from deployments.dispatch.dispatch import Dispatch
from deployments.dispatch.prepare import Prepared, prepare
from deployments.dispatch.work import Lane
from deployments.engine import ModelCard
from deployments.engine.batch import TokenBatch
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EmbeddingError,
    FatalInputError,
    InvalidRequestError,
    ModelUnavailableError,
)
from deployments.tracing import WAIT, Attributes, describe, stage, traced

# Chunks are as large as what flies, times this: the parts that they are cut into lose little by rounding.
CHUNK_FLIGHTS = 2
# One of them is with the replicas, one waits behind it, one is being tokenised.
WINDOW_CHUNKS = 3
# Short texts: more would be a long time on one thread.
MAX_CHUNK_TEXTS = 4096
# How much the last chunk counts in the running ratio.
RATIO_SHARE = 0.3

FIELD = "texts"
# Texts as a client means them have this limit for each alone, since there is no request to bound.
UNBOUNDED = {"max_inputs": 2**31, "max_request_tokens": 2**62}


class HowOptions(TypedDict, total=False):
    """The arguments of `How`."""

    dimensions: int | None
    input_type: str | None
    instruction: str | None
    truncation: Truncation | None
    bulk: bool
    timeout_s: float
    dry_run: bool


@dataclass(frozen=True, kw_only=True)
class How:
    """How texts are embedded. `timeout_s` is how long a piece of work may wait for an answer.

    A `dry_run` only finds out what is wrong with them, and how many tokens they have: vectors have no length.
    """

    dimensions: int | None = None
    input_type: str | None = None
    instruction: str | None = None
    truncation: Truncation | None = None
    bulk: bool = True
    timeout_s: float = 600.0
    dry_run: bool = False


@dataclass(frozen=True)
class Attempt:
    """What became of some texts.

    `vectors` is float32 of shape (texts without an error, dimension), in order; `errors` holds those of the
    other texts by index. `versions` are those of the engines that answered: more than one where the model
    changed meanwhile.
    """

    vectors: np.ndarray
    errors: dict[int, EmbeddingError] = field(default_factory=dict)
    tokens: int = 0
    versions: frozenset[str] = frozenset()


class Connection:
    """One worker's replicas, as this process reaches them. Lives on the event loop of `background`."""

    def __init__(self, worker: Worker, dispatch: Dispatch) -> None:
        """Call nothing yet."""
        self.dispatch = dispatch
        self.catalog = Catalog({})
        self.update(worker)
        self._window = Window(lambda: WINDOW_CHUNKS * self._chunk_tokens)
        self._tokens_per_character = TOKENS_PER_CHARACTER  # until some have been tokenised

    def update(self, worker: Worker) -> None:
        """Take over the worker file as it is now."""
        self.dispatch.worker = worker
        self.catalog.update({worker.name: self.dispatch})

    @property
    def _chunk_tokens(self) -> int:
        return CHUNK_FLIGHTS * self.dispatch.flying_tokens

    async def describe(self, served: Served, how: How) -> ModelCard:
        """Return the model's card once a replica is there. Raises what `how` asks for in vain."""
        served.check_embeds()
        deadline = asyncio.get_running_loop().time() + how.timeout_s
        card, tokenizer = await self.dispatch.model(deadline)
        await self._prepare(["a"], served, how, card, tokenizer)
        return card

    async def embed(self, texts: Sequence[Any], served: Served, how: How, caller: str) -> Attempt:
        """Embed what can be embedded, and say of each other text why not.

        Raises ModelUnavailableError or DeadlineExceededError after `timeout_s` without an answer.
        """
        errors: dict[int, EmbeddingError] = {}
        for row, text in enumerate(texts):
            if (error := mistake(text)) is not None:
                errors[row] = error
        good = np.fromiter((row for row in range(len(texts)) if row not in errors), np.int64)
        about: Attributes = {"gen_ai.request.model": served.name, "embedding.inputs": len(good)}
        with traced("embed", about | {"gen_ai.operation.name": "embeddings"}), stage(WAIT):
            tasks = [
                asyncio.create_task(self._embed_chunk([texts[row] for row in rows], served, how, caller))
                for rows in self._cut(texts, good)
            ]
            try:
                attempts = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
            describe({"gen_ai.usage.input_tokens": sum(attempt.tokens for attempt in attempts)})
        begin = 0
        for attempt in attempts:
            errors |= {int(good[begin + row]): error for row, error in attempt.errors.items()}
            begin += len(attempt.vectors) + len(attempt.errors)
        return _joined(attempts, {row: errors[row] for row in sorted(errors)})

    def _cut(self, texts: Sequence[str], rows: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the rows of one chunk after the other."""
        if not len(rows):
            return
        tokens = np.fromiter((self._estimate([texts[row]]) for row in rows), np.float64, len(rows))
        # Each text belongs to the chunk in which it begins; none is cut.
        numbers = ((np.cumsum(tokens) - tokens) // self._chunk_tokens).astype(np.int64)
        borders = np.flatnonzero(np.diff(numbers)) + 1
        for chunk in np.split(rows, borders):
            yield from np.split(chunk, range(MAX_CHUNK_TEXTS, len(chunk), MAX_CHUNK_TEXTS))

    def _estimate(self, texts: Sequence[str]) -> int:
        """Return about how many tokens some texts have."""
        return 1 + int(sum(map(len, texts)) * self._tokens_per_character)

    async def _embed_chunk(self, texts: Sequence[str], served: Served, how: How, caller: str) -> Attempt:
        async with self._window.room(self._estimate(texts)):
            return await self._narrow_down(texts, served, how, caller)

    async def _narrow_down(self, texts: Sequence[str], served: Served, how: How, caller: str) -> Attempt:
        """Embed a chunk; where it fails, its halves, until the texts at fault are found."""
        try:
            return await self._patiently(texts, served, how, caller)
        except (ModelUnavailableError, DeadlineExceededError):
            raise
        except EmbeddingError as error:
            if len(texts) == 1:
                return Attempt(np.empty((0, 0), np.float32), {0: _bare(error)})
            # Each try of a text that ends engines costs two of them.
            size = 1 if isinstance(error, FatalInputError) else -(-len(texts) // 2)
        pieces = [texts[begin : begin + size] for begin in range(0, len(texts), size)]
        attempts = [await self._narrow_down(piece, served, how, caller) for piece in pieces]
        errors = {
            number * size + row: error
            for number, attempt in enumerate(attempts)
            for row, error in attempt.errors.items()
        }
        return _joined(attempts, errors)

    async def _patiently(self, texts: Sequence[str], served: Served, how: How, caller: str) -> Attempt:
        """Try a chunk for as long as its patience lasts: a full queue and a model that is away pass."""
        deadline = asyncio.get_running_loop().time() + how.timeout_s
        patience = Patience(deadline)
        while True:
            try:
                return await self._try(texts, served, how, caller, deadline)
            except EmbeddingError as error:
                await patience.wait_out(error)

    async def _try(
        self, texts: Sequence[str], served: Served, how: How, caller: str, deadline: float
    ) -> Attempt:
        async def tokens_for(card: ModelCard, tokenizer: TextTokenizer) -> Prepared:
            with stage("tokenise"):
                return await self._prepare(texts, served, how, card, tokenizer)

        if how.dry_run:
            card, tokenizer = await self.dispatch.model(deadline)
            prepared = await tokens_for(card, tokenizer)
            vectors = np.empty((len(prepared.batch), 0), np.float32)
        else:
            lane = Lane.BULK if how.bulk else Lane.INTERACTIVE
            card, prepared, vectors = await self.dispatch.embed_by(tokens_for, deadline, lane, caller)
        self._learn(texts, prepared)
        errors: dict[int, EmbeddingError] = {row: _too_long(card.max_model_len) for row in prepared.truncated}
        shown = truncate(vectors, how.dimensions, card.normalizes)
        return Attempt(shown, errors, prepared.batch.tokens, frozenset({card.version}))

    async def _prepare(
        self, texts: Sequence[str], served: Served, how: How, card: ModelCard, tokenizer: TextTokenizer
    ) -> Prepared:
        """Return the token ids of the texts that the model takes; as truncated those that it doesn't."""
        task = served.model.embedding_task
        refuses = (how.truncation or task.truncation) == "none"
        request = OpenAIRequest(
            texts=texts,
            input_field=FIELD,
            dimensions=how.dimensions,
            prompt=Prompt((how.input_type,), "input_type") if how.input_type is not None else None,
            instruction=how.instruction,
            # What is too long is told apart by being cut: one long text doesn't spoil the others.
            truncation="end" if refuses else how.truncation,
        )
        limits = self.dispatch.worker.limits.model_copy(update=UNBOUNDED)
        prepared = await prepare(request, task, limits, card, tokenizer)
        if not refuses or not prepared.truncated:
            return Prepared(prepared.batch)
        too_long = set(prepared.truncated)
        if len(too_long) == len(texts):
            raise _too_long(card.max_model_len)
        kept = [ids for row, ids in enumerate(prepared.batch) if row not in too_long]
        return Prepared(TokenBatch.join(kept), prepared.truncated)

    def _learn(self, texts: Sequence[str], prepared: Prepared) -> None:
        characters = sum(map(len, texts))
        if characters and not prepared.truncated:
            seen = prepared.batch.tokens / characters
            self._tokens_per_character += RATIO_SHARE * (seen - self._tokens_per_character)


def mistake(text: Any) -> InvalidRequestError | None:
    """Return why something can't be embedded, whatever the model; None where it can."""
    if isinstance(text, InvalidRequestError):
        return text  # whoever read it found out already
    if text is None:
        return InvalidRequestError("the text is missing", FIELD)
    if not isinstance(text, str):
        return InvalidRequestError(f"not a text: {type(text).__name__}", FIELD)
    if not text:
        return InvalidRequestError("the text is empty", FIELD)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return InvalidRequestError("the text isn't valid Unicode", FIELD)
    return None


def _too_long(longest: int) -> ContextLengthError:
    return ContextLengthError(f"the text has more than the {longest} tokens that the model takes", FIELD)


def _bare(error: EmbeddingError) -> EmbeddingError:
    """Return the error of a single text as that of a text wherever it stands."""
    message = error.message.replace(f"`{FIELD}[0]`", "the text")
    return type(error)(message, error.param, error.retry_after)


def _joined(attempts: Sequence[Attempt], errors: dict[int, EmbeddingError]) -> Attempt:
    """Return attempts one after the other as one, with errors that are placed in all of it."""
    parts = [attempt.vectors for attempt in attempts if len(attempt.vectors)]
    return Attempt(
        np.concatenate(parts) if parts else np.empty((0, 0), np.float32),
        errors,
        sum(attempt.tokens for attempt in attempts),
        frozenset().union(*(attempt.versions for attempt in attempts)),
    )
