"""The routes of the dialects: path, what reads the body, what documents it."""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from deployments.api import cohere, openai, pharia, pharia_schema, tei
from deployments.errors import (
    DeadlineExceededError,
    EmbeddingError,
    IncompleteError,
    InvalidKeyError,
    ModelNotAllowedError,
    ModelNotFoundError,
    ModelUnavailableError,
)
from deployments.http.auth import key_of
from deployments.http.documentation import BODY, EMBEDDING, answers, body
from deployments.http.pharia import PhariaServing
from deployments.http.serving import Parse, Serving
from deployments.keys.usage import Counts, usage_answer

VECTOR = [0.0330866, 0.05105618, -0.051683143]
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
USAGE = {
    "object": "usage",
    "key": "search",
    "models": [{"model": "all-minilm-l6-v2", "requests": 2, "inputs": 3, "tokens": 21}],
    "limits": {"models": ["*"], "requests_per_minute": 600, "tokens_per_minute": None, "expires": None},
}


@dataclass(frozen=True)
class EmbeddingRoute:
    """A route that embeds: its path, what it says of itself, its formats, an answer."""

    path: str
    summary: str
    parse: Parse
    bodies: tuple[type[BaseModel], ...]
    answer: Any
    example: Any


EMBEDDING_ROUTES = (
    EmbeddingRoute(
        "/embeddings",
        "Embed one text or many; the answer keeps their order (OpenAI).",
        openai.parse_request,
        (openai.EmbeddingRequestBody,),
        openai.EmbeddingResponse,
        {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": VECTOR}],
            "model": "all-minilm-l6-v2",
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
        },
    ),
    EmbeddingRoute(
        "/semantic_embed",
        "Embed one prompt for comparing, as a document or as a query (Pharia).",
        pharia.parse_semantic,
        (pharia_schema.SemanticBody,),
        pharia_schema.SemanticResponse,
        {"model_version": "1", "embedding": VECTOR, "num_tokens_prompt_total": 7},
    ),
    EmbeddingRoute(
        "/batch_semantic_embed",
        "Embed up to 100 prompts; the answer keeps their order (Pharia).",
        pharia.parse_batch,
        (pharia_schema.BatchSemanticBody,),
        pharia_schema.BatchSemanticResponse,
        {"model_version": "1", "embeddings": [VECTOR], "num_tokens_prompt_total": 7},
    ),
    EmbeddingRoute(
        "/instructable_embed",
        "Embed one prompt for the purpose that an instruction names (Pharia).",
        pharia.parse_instructable,
        (pharia_schema.InstructableBody,),
        pharia_schema.SemanticResponse,
        {"model_version": "1", "embedding": VECTOR, "num_tokens_prompt_total": 7},
    ),
    EmbeddingRoute(
        "/v2/embed",
        "Embed texts, in several types at once (Cohere).",
        cohere.parse_request,
        (cohere.CohereBody,),
        cohere.CohereResponse,
        {
            "id": "9c3a2d1e-3f4e-4d4b-8d8e-0a8b8f8a8c8e",
            "embeddings": {"float": [VECTOR]},
            "texts": ["Hello"],
            "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 3}},
            "response_type": "embeddings_by_type",
        },
    ),
    EmbeddingRoute(
        "/embed",
        "Embed texts (text-embeddings-inference, or Cohere: told apart by the body).",
        tei.parse_any,
        (tei.TeiBody, cohere.CohereBody),
        list[list[float]] | cohere.CohereResponse,
        [VECTOR],
    ),
)
BODIES: tuple[type[BaseModel], ...] = (
    *dict.fromkeys(model for route in EMBEDDING_ROUTES for model in route.bodies),
    pharia_schema.TokenizeBody,
    pharia_schema.DetokenizeBody,
)


class BareRoute(APIRoute):
    """A route whose endpoint takes the request and nothing else, and is called with it at once.

    FastAPI looks for dependencies at each request otherwise: a sixth of what our own code costs.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the endpoint itself."""
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def add_embedding_routes(router: APIRouter, serving: Serving) -> None:
    """Add what embeds, in every dialect."""
    for route in EMBEDDING_ROUTES:
        router.add_api_route(
            route.path,
            _embedding(serving, route.parse),
            methods=["POST"],
            route_class_override=BareRoute,
            summary=route.summary,
            name=route.path.strip("/"),
            responses=answers(route.example, *EMBEDDING, model=route.answer),
            openapi_extra=body(*route.bodies, nice=True),
        )


def _embedding(serving: Serving, parse: Parse) -> Callable[[Request], Awaitable[Response]]:
    async def embeddings(request: Request) -> Response:
        return Response(await serving.embed(request, parse), media_type="application/json")

    return embeddings


def add_usage_route(
    router: APIRouter,
    gather: Callable[[str], Awaitable[list[dict[str, Counts]]]],
    as_json: Callable[[Any], Response],
) -> None:
    """Add what tells a client of its own key."""

    async def usage(request: Request) -> Response:
        key = key_of(request.scope)
        assert key is not None, "this path isn't public"
        return as_json(usage_answer(key, await gather(key.name)))

    router.add_api_route(
        "/usage",
        usage,
        summary="Show what this key has used since the cluster's start, and what it may use.",
        responses=answers(USAGE, InvalidKeyError, IncompleteError),
    )


def add_pharia_routes(router: APIRouter, served: PhariaServing, as_json: Callable[[Any], Response]) -> None:
    """Add what else Pharia's clients ask for. Before `/models/{name}`, whose names may hold slashes."""

    async def tokenize(request: Request) -> Response:
        return Response(await served.tokenize(request), media_type="application/json")

    async def detokenize(request: Request) -> Response:
        return Response(await served.detokenize(request), media_type="application/json")

    async def tokenizer(request: Request, name: str) -> Response:
        return Response(await served.tokenizer(request, name), media_type="application/json")

    async def settings(request: Request) -> Response:
        return as_json(await served.settings(request))

    router.add_api_route(
        "/tokenize",
        tokenize,
        methods=["POST"],
        summary="Show the tokens that the model would read of a text, special tokens included (Pharia).",
        responses=answers(
            {"tokens": ["[CLS]", "hello", "[SEP]"], "token_ids": [101, 7592, 102]},
            *BODY,
            model=pharia_schema.TokenizeResponse,
        ),
        openapi_extra=body(pharia_schema.TokenizeBody),
    )
    router.add_api_route(
        "/detokenize",
        detokenize,
        methods=["POST"],
        summary="Turn token ids into text (Pharia).",
        responses=answers({"result": "hello"}, *BODY, model=pharia_schema.DetokenizeResponse),
        openapi_extra=body(pharia_schema.DetokenizeBody),
    )
    router.add_api_route(
        "/models/{name:path}/tokenizer",
        tokenizer,
        summary="Give the model's tokenizer, in the JSON of Hugging Face's `tokenizers` (Pharia).",
        responses=answers(
            {"version": "1.0", "model": {"type": "WordPiece"}},
            InvalidKeyError,
            ModelNotAllowedError,
            ModelNotFoundError,
            DeadlineExceededError,
            ModelUnavailableError,
            EmbeddingError,
        ),
    )
    for path in ("/models_available", "/model-settings"):
        router.add_api_route(
            path,
            settings,
            summary="List the models, and which can answer now (Pharia).",
            name=path.strip("/"),
            responses=answers([SETTINGS], InvalidKeyError, model=list[pharia_schema.ModelSettings]),
        )
