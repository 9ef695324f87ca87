"""What Pharia's clients ask besides vectors and tokens: tokenizers, and which models can answer now."""

import asyncio
from collections.abc import Iterator
from typing import Any

from fastapi import Request, Response

from deployments.api import pharia
from deployments.api.pharia import schema as pharia_schema
from deployments.dispatch.catalog import Served
from deployments.dispatch.prepare import takes_instructions
from deployments.engine import ModelCard
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import (
    DeadlineExceededError,
    EmbeddingError,
    InvalidKeyError,
    ModelNotAllowedError,
    ModelNotFoundError,
    ModelUnavailableError,
)
from deployments.http.errors import as_json, json_response
from deployments.http.serving import Serving, wanted_seconds
from deployments.http.table import Entry, answers

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


async def model_of(served: Served, request: Request, arrival: float) -> tuple[ModelCard, TextTokenizer]:
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


def pharia_routes(serving: Serving) -> Iterator[Entry]:
    """Yield what else Pharia's clients ask for. Before `/models/{name}`, whose names may hold slashes."""

    async def tokenizer(request: Request, name: str) -> Response:
        """Return a model's tokenizer in the JSON of Hugging Face's `tokenizers`."""
        arrival = asyncio.get_running_loop().time()
        card, _ = await model_of(serving.find(request, name), request, arrival)
        return json_response(card.tokenizer)

    async def settings(request: Request) -> Response:
        """Return every model that the client may use, and whether it can answer now."""
        return as_json(await asyncio.gather(*map(_settings, serving.visible(request))))

    yield Entry(
        path="/models/{name:path}/tokenizer",
        handler=tokenizer,
        summary="Give the model's tokenizer, in the JSON of Hugging Face's `tokenizers` (Pharia).",
        responses=answers({"version": "1.0", "model": {"type": "WordPiece"}}, *TOKENIZER),
    )
    for path in ("/models_available", "/model-settings"):
        yield Entry(
            path=path,
            handler=settings,
            summary="List the models, and which can answer now (Pharia).",
            name=path.strip("/"),
            responses=answers([SETTINGS], InvalidKeyError, model=list[pharia_schema.ModelSettings]),
        )
