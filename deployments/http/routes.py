"""The routes of the dialects: path, what reads the body, what documents it."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from deployments.api import cohere, openai, pharia, tei, vllm
from deployments.api.pharia import schema as pharia_schema
from deployments.api.request import Raw
from deployments.errors import (
    IncompleteError,
    InvalidKeyError,
)
from deployments.http.auth import key_of
from deployments.http.errors import as_json, json_response
from deployments.http.serving import Parse, Serving
from deployments.http.table import EMBEDDING, NICE, Entry, answers
from deployments.keys.ring import KeyRing
from deployments.keys.usage import Counts, usage_answer

VECTOR = [0.0330866, 0.05105618, -0.051683143]
USED = {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0}
LIMITS = {"models": ["*"], "requests_per_minute": 600, "tokens_per_minute": None, "expires": None}
USAGE = {
    "object": "usage",
    "key": "search",
    "models": [{"model": "all-minilm-l6-v2", "requests": 2, "inputs": 3, "tokens": 21}],
    "limits": LIMITS,
    "keys": [{"key": "search", "limits": LIMITS}],
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
        openai.parse_fields,
        (openai.EmbeddingRequestBody, openai.ChatRequestBody),
        openai.EmbeddingResponse,
        {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": VECTOR}],
            "model": "all-minilm-l6-v2",
            "usage": USED,
            "id": "embd-5f0c",
            "created": 1767225600,
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
        cohere.parse_fields,
        (cohere.CohereBody,),
        cohere.CohereResponse,
        {
            "id": "9c3a2d1e-3f4e-4d4b-8d8e-0a8b8f8a8c8e",
            "embeddings": {"float": [VECTOR]},
            "texts": ["Hello"],
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": 3},
                "tokens": {"input_tokens": 3},
            },
            "response_type": "embeddings_by_type",
        },
    ),
    EmbeddingRoute(
        "/embed",
        "Embed texts (text-embeddings-inference, or Cohere: told apart by the body).",
        tei.parse_any,
        (tei.TeiBody, cohere.CohereBody),
        list[list[float]] | cohere.CohereFloats | cohere.CohereResponse,
        [VECTOR],
    ),
    EmbeddingRoute(
        "/pooling",
        "Embed as vLLM's `POST /pooling` does.",
        vllm.parse_pooling,
        (vllm.PoolingBody, vllm.PoolingChatBody),
        vllm.PoolingResponse,
        {
            "object": "list",
            "data": [{"object": "pooling", "index": 0, "data": VECTOR}],
            "model": "all-minilm-l6-v2",
            "usage": USED,
            "id": "pooling-5f0c",
            "created": 1767225600,
        },
    ),
    EmbeddingRoute(
        "/invocations",
        "Embed in whichever form the body has: OpenAI's, Cohere's, text-embeddings-inference's (SageMaker).",
        vllm.parse_invocation,
        (openai.EmbeddingRequestBody, openai.ChatRequestBody, tei.TeiBody, cohere.CohereBody),
        openai.EmbeddingResponse | list[list[float]] | cohere.CohereFloats | cohere.CohereResponse,
        [VECTOR],
    ),
    EmbeddingRoute(
        "/embed_all",
        "Give the vector of each token, before any pooling (text-embeddings-inference).",
        tei.parse_all,
        (tei.TeiAllBody,),
        list[list[list[float]]],
        [[VECTOR]],
    ),
    EmbeddingRoute(
        "/similarity",
        "Compare sentences with one, by cosine (text-embeddings-inference).",
        tei.parse_similarity,
        (tei.SimilarityBody,),
        list[float],
        [0.71, 0.33],
    ),
)
# vLLM's `encoding_format` of `bytes`.
SPEAK_BYTES = {"/embeddings", "/pooling", "/invocations"}
# The same under other paths, which clients make themselves.
HIDDEN: dict[str, Parse] = {
    "/": tei.parse_any,
    "/embed_sparse": tei.refuse_sparse,
}
AZURE = "/openai/deployments/{name:path}/embeddings"


def embedding_routes(serving: Serving) -> Iterator[Entry]:
    """Yield what embeds, in every dialect."""
    for route in EMBEDDING_ROUTES:
        yield Entry(
            path=route.path,
            handler=_embedding(serving, route.parse),
            method="POST",
            summary=route.summary,
            name=route.path.strip("/"),
            responses=answers(route.example, *EMBEDDING, model=route.answer, raw=route.path in SPEAK_BYTES),
            bodies=route.bodies,
            document={"parameters": [NICE]},
        )

    for path, parse in HIDDEN.items():
        yield Entry(path=path, handler=_embedding(serving, parse), method="POST", shown=False)

    async def azure(request: Request, name: str) -> Response:
        return await _embedding(serving, lambda body: openai.parse_fields({**body, "model": name}))(request)

    yield Entry(path=AZURE, handler=azure, method="POST", shown=False)


def _embedding(serving: Serving, parse: Parse) -> Callable[[Request], Awaitable[Response]]:
    async def embeddings(request: Request) -> Response:
        return as_answer(await serving.embed(request, parse))

    return embeddings


def as_answer(printed: bytes) -> Response:
    """Return what a dialect has printed: JSON, unless it is raw."""
    if isinstance(printed, Raw):
        return Response(bytes(printed), 200, printed.headers, "application/octet-stream")
    return json_response(printed)


def usage_route(gather: Callable[[str], Awaitable[list[dict[str, Counts]]]], ring: KeyRing) -> Entry:
    """Return what tells a client of its own key, and an operator of all of the ring."""

    async def usage(request: Request) -> Response:
        key = key_of(request.scope)
        assert key is not None, "this path isn't public"
        return as_json(usage_answer(key, await gather(key.name), ring))

    return Entry(
        path="/usage",
        handler=usage,
        summary="Show what this key has used since the cluster's start, and what it may use; an operator also"
        " sees what each of the `keys` may.",
        responses=answers(USAGE, InvalidKeyError, IncompleteError),
    )
