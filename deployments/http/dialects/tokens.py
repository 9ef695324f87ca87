"""Tokens of texts, and texts of tokens, in every dialect that has them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from fastapi import Request, Response

from deployments.api import tei, vllm
from deployments.api.fields import Fields
from deployments.api.pharia import schema as pharia_schema
from deployments.api.request import TokensRequest
from deployments.dispatch.offload import offload
from deployments.dispatch.prepare import GROUP_CHARACTERS, prompt_text, write_messages
from deployments.engine import ModelCard
from deployments.errors import ContextLengthError, InvalidRequestError, TooManyInputsError
from deployments.http.auth import key_of
from deployments.http.dialects.pharia import model_of
from deployments.http.edge.bodies import BODY_SECONDS
from deployments.http.errors import json_response
from deployments.http.serving import Serving, wanted_seconds
from deployments.http.table import BODY, Entry, answers
from deployments.keys.rates import REQUESTS
from deployments.tracing import PARSE, stage

Parse = Callable[[Fields], TokensRequest]


def tokens_routes(serving: Serving) -> Iterator[Entry]:
    """Yield what turns texts into tokens and back."""
    yield Entry(
        path="/tokenize",
        handler=_tokens(serving, vllm.parse_tokenize),
        method="POST",
        summary="Show the tokens that the model would read (Pharia, vLLM, text-embeddings-inference).",
        name="tokenize",
        responses=answers(
            {"tokens": ["[CLS]", "hello", "[SEP]"], "token_ids": [101, 7592, 102]},
            *BODY,
            model=pharia_schema.TokenizeResponse | vllm.VllmTokenizeResponse | list[list[tei.Token]],
        ),
        bodies=(
            pharia_schema.TokenizeBody,
            vllm.VllmTokenizeBody,
            vllm.VllmTokenizeChatBody,
            tei.TeiTokenizeBody,
        ),
    )
    yield Entry(
        path="/detokenize",
        handler=_tokens(serving, vllm.parse_detokenize),
        method="POST",
        summary="Turn token ids into text (Pharia, vLLM).",
        name="detokenize",
        responses=answers(
            {"result": "hello"}, *BODY, model=pharia_schema.DetokenizeResponse | vllm.VllmDetokenizeResponse
        ),
        bodies=(pharia_schema.DetokenizeBody, vllm.VllmDetokenizeBody),
    )
    yield Entry(
        path="/decode",
        handler=_tokens(serving, tei.parse_decode),
        method="POST",
        summary="Turn token ids into text (text-embeddings-inference).",
        name="decode",
        responses=answers(["hello"], *BODY, model=list[str]),
        bodies=(tei.TeiDecodeBody,),
    )


def _tokens(serving: Serving, parse: Parse) -> Callable[[Request], Awaitable[Response]]:
    async def tokens(request: Request) -> Response:
        return json_response(await read_tokens(serving, request, parse))

    return tokens


async def read_tokens(serving: Serving, request: Request, parse: Parse) -> bytes:
    """Charge, read and count a request of tokens, and return its answer."""
    arrival = asyncio.get_running_loop().time()
    with serving.counted(arrival, request) as counted, serving.in_hand.hold() as take:
        await serving.charge(key_of(request.scope), REQUESTS)
        deadline = arrival + min(BODY_SECONDS, wanted_seconds(request))
        body = await serving.read(request, deadline, take)
        with stage(PARSE):
            wanted = await serving.parse(parse, body)
        del body
        served = serving.find_wanted(request, wanted, counted)
        limits = served.dispatch.worker.limits
        if len(wanted.texts) + len(wanted.ids) > limits.max_inputs:
            raise TooManyInputsError(f"one request may hold {limits.max_inputs} inputs", wanted.field)
        card, tokenizer = await model_of(served, request, arrival)
        before = prompt_text(wanted.prompt, card.prompts | served.model.embedding_task.prompts)
        texts = [before + text for text in wanted.texts]
        if wanted.chat is not None:
            texts = await write_messages(wanted.chat, tokenizer, GROUP_CHARACTERS)
        size = sum(map(len, texts)) + sum(map(len, wanted.ids))
        _check(wanted, size, card)
        with stage("tokenise"):
            return await offload(size, wanted.answer, texts, tokenizer, card.max_model_len)


def _check(wanted: TokensRequest, size: int, card: ModelCard) -> None:
    """Raise the error of a request that asks for too much, or for ids that aren't the model's."""
    if size > GROUP_CHARACTERS:
        raise ContextLengthError(f"`{wanted.field}` may have {GROUP_CHARACTERS} characters", wanted.field)
    if any(max(ids, default=0) >= card.vocab_size for ids in wanted.ids):
        raise InvalidRequestError(
            f"`{wanted.field}` holds an id beyond the vocabulary of {card.vocab_size}", wanted.field
        )
