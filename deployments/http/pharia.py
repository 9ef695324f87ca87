"""What Pharia's clients ask besides vectors: tokens, tokenizers, and which models can answer now."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request, Response

from deployments.api import pharia, pharia_schema
from deployments.api.fields import Body
from deployments.dispatch.catalog import Served
from deployments.dispatch.offload import offload
from deployments.dispatch.prepare import GROUP_CHARACTERS, takes_instructions
from deployments.engine import ModelCard
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EmbeddingError,
    InvalidKeyError,
    InvalidRequestError,
    ModelNotAllowedError,
    ModelNotFoundError,
    ModelUnavailableError,
)
from deployments.http.auth import key_of
from deployments.http.errors import as_json, json_response
from deployments.http.serving import BODY_SECONDS, Serving, wanted_seconds
from deployments.http.table import BODY, Entry, answers
from deployments.keys.rates import REQUESTS

# How long a listing waits for a model that says that it is ready.
CARD_SECONDS = 2.0

SETTINGS = {
    "name": "all-minilm-l6-v2",
    "status": "available",
    "worker_type": "vllm",
    "description": "English sentences and short paragraphs",
    "multimodal": False,
    "max_context_size": 256,
    "maximum_completion_tokens": None,
    "semantic_embedding": True,
    "completion_type": "none",
    "embedding_type": "semantic",
    "chat": False,
    "prompt_template": None,
}
TOKENIZER = (
    InvalidKeyError,
    ModelNotAllowedError,
    ModelNotFoundError,
    DeadlineExceededError,
    ModelUnavailableError,
    EmbeddingError,
)

Asked = TypeVar("Asked", pharia.TokenizeRequest, pharia.DetokenizeRequest)


class PhariaServing:
    """Tokenises and lists over the same catalog of models."""

    def __init__(self, serving: Serving) -> None:
        """Share the reading, counting and catalog of `serving`."""
        self._serving = serving

    async def tokenize(self, request: Request) -> Response:
        """Return what the model would read of a text."""
        async with self._asked(request, pharia.parse_tokenize) as (wanted, (_, tokenizer)):
            if len(wanted.prompt) > GROUP_CHARACTERS:
                raise ContextLengthError(f"`prompt` may have {GROUP_CHARACTERS} characters", "prompt")
            ids, tokens = await offload(len(wanted.prompt), tokenizer.read, wanted.prompt)
            return json_response(await offload(len(ids), pharia.answer_tokenize, wanted, ids, tokens))

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        async with self._asked(request, pharia.parse_detokenize) as (wanted, (card, tokenizer)):
            if max(wanted.token_ids, default=0) >= card.vocab_size:
                raise InvalidRequestError(
                    f"`token_ids` holds an id beyond the vocabulary of {card.vocab_size}", "token_ids"
                )
            ids = wanted.token_ids
            return json_response(pharia.answer_detokenize(await offload(len(ids), tokenizer.decode, ids)))

    async def tokenizer(self, request: Request, name: str) -> Response:
        """Return a model's tokenizer in the JSON of Hugging Face's `tokenizers`."""
        arrival = asyncio.get_running_loop().time()
        card, _ = await _model(self._serving.find(request, name), request, arrival)
        return json_response(card.tokenizer)

    async def settings(self, request: Request) -> Response:
        """Return every model that the client may use, and whether it can answer now."""
        models = self._serving.visible(request)
        return as_json(await asyncio.gather(*map(_settings, models)))

    @asynccontextmanager
    async def _asked(
        self, request: Request, parse: Callable[[Body], Asked]
    ) -> AsyncIterator[tuple[Asked, tuple[ModelCard, TextTokenizer]]]:
        """Charge, read and count a request of tokens; give what it asks, and the model that it asks."""
        arrival = asyncio.get_running_loop().time()
        with self._serving.counted(arrival, request) as counted, self._serving.in_hand.hold() as take:
            await self._serving.charge(key_of(request.scope), REQUESTS)
            deadline = arrival + min(BODY_SECONDS, wanted_seconds(request))
            wanted = await self._serving.parse(parse, await self._serving.read(request, deadline, take))
            served = self._serving.find(request, wanted.model, wanted.tags)
            counted.model = served.name
            yield wanted, await _model(served, request, arrival)


async def _model(served: Served, request: Request, arrival: float) -> tuple[ModelCard, TextTokenizer]:
    """Return a model's card and tokenizer before the request's deadline."""
    seconds = min(served.dispatch.worker.limits.request_timeout_s, wanted_seconds(request))
    return await served.dispatch.model(arrival + seconds)


async def _settings(served: Served) -> dict[str, Any]:
    state = await served.dispatch.state()
    listing = served.listing()
    prompts = served.model.embedding_task.prompts
    if state["ready"] and state.get("replicas"):
        try:
            card, _ = await served.dispatch.model(asyncio.get_running_loop().time() + CARD_SECONDS)
        except ModelUnavailableError:
            return pharia.model_settings(listing, False, takes_instructions(prompts))
        prompts = card.prompts | prompts
        listing["max_model_len"] = card.max_model_len
    return pharia.model_settings(listing, state["ready"], takes_instructions(prompts))


def pharia_routes(served: PhariaServing) -> Iterator[Entry]:
    """Yield what else Pharia's clients ask for. Before `/models/{name}`, whose names may hold slashes."""
    tokens = {"tokens": ["[CLS]", "hello", "[SEP]"], "token_ids": [101, 7592, 102]}
    yield Entry(
        path="/tokenize",
        handler=served.tokenize,
        method="POST",
        summary="Show the tokens that the model would read of a text, special tokens included (Pharia).",
        responses=answers(tokens, *BODY, model=pharia_schema.TokenizeResponse),
        bodies=(pharia_schema.TokenizeBody,),
    )
    yield Entry(
        path="/detokenize",
        handler=served.detokenize,
        method="POST",
        summary="Turn token ids into text (Pharia).",
        responses=answers({"result": "hello"}, *BODY, model=pharia_schema.DetokenizeResponse),
        bodies=(pharia_schema.DetokenizeBody,),
    )
    yield Entry(
        path="/models/{name:path}/tokenizer",
        handler=served.tokenizer,
        summary="Give the model's tokenizer, in the JSON of Hugging Face's `tokenizers` (Pharia).",
        responses=answers({"version": "1.0", "model": {"type": "WordPiece"}}, *TOKENIZER),
    )
    for path in ("/models_available", "/model-settings"):
        yield Entry(
            path=path,
            handler=served.settings,
            summary="List the models, and which can answer now (Pharia).",
            name=path.strip("/"),
            responses=answers([SETTINGS], InvalidKeyError, model=list[pharia_schema.ModelSettings]),
        )
