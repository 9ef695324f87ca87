"""vLLM's server beside its embeddings: tokens, pooling, and a body of any of its routes (SageMaker's)."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from deployments.api import chat, openai, pharia, tei
from deployments.api import fields as read
from deployments.api.fields import TokenId
from deployments.api.known import ModelBody
from deployments.api.request import EmbeddingRequest, Reader, TokensRequest
from deployments.errors import InvalidRequestError, MissingCapabilityError

# The one task of vLLM's that every model here has.
EMBED = "embed"


def parse_tokenize(fields: read.Fields) -> TokensRequest:
    """Parse a body of `POST /tokenize`: TEI's has `inputs`, Pharia's says what it wants, or it is vLLM's."""
    if "tokens" in fields or "token_ids" in fields:
        return pharia.parse_tokenize(fields)
    if "inputs" in fields:
        return tei.parse_tokenize(fields)
    chats = "messages" in fields
    if chats and isinstance(read.not_empty(fields["messages"], "messages")[0], list):
        raise InvalidRequestError("`messages` must be one conversation here", "messages")
    (VllmTokenizeChatBody if chats else VllmTokenizeBody).check(fields)
    special = read.flag(fields, "add_special_tokens")
    return TokensRequest(
        model=read.model(fields),
        texts=[] if chats else [read.text(fields, "prompt")],
        chat=chat.parse_chat(fields, "messages", generates=True) if chats else None,
        field="messages" if chats else "prompt",
        answer=functools.partial(
            _tokens,
            special=not chats if special is None else special,
            strings=read.flag(fields, "return_token_strs") is True,
        ),
        tags=read.tags(fields),
    )


def _tokens(texts: Sequence[str], reader: Reader, longest: int, *, special: bool, strings: bool) -> bytes:
    """Return the ids, their count, and what the model takes."""
    encoding = reader.read(texts[0], special)
    strs = encoding.tokens if strings else None
    answer = {"count": len(encoding.ids), "max_model_len": longest, "tokens": encoding.ids}
    return orjson.dumps({**answer, "token_strs": strs})


def parse_detokenize(fields: read.Fields) -> TokensRequest:
    """Parse a body of `POST /detokenize`: vLLM's holds `tokens`, Pharia's `token_ids`."""
    if "tokens" not in fields:
        return pharia.parse_detokenize(fields)
    VllmDetokenizeBody.check(fields)
    ids = [read.few_or_no_ids(fields, "tokens")]
    return TokensRequest(
        model=read.model(fields),
        ids=ids,
        field="tokens",
        answer=lambda _, reader, __: orjson.dumps({"prompt": reader.decode(ids[0], special=True)}),
        tags=read.tags(fields),
    )


class PoolingRequest(openai.OpenAIRequest):
    """A body of `POST /pooling`, whose answer holds the same under other names."""

    prefix = b"pooling"
    item = b'{"object":"pooling","index":%d,"data":%b}'


def parse_pooling(fields: read.Fields) -> PoolingRequest:
    """Parse a body of `POST /pooling`; what isn't pooled, token by token, no engine here gives."""
    rest = _without_task(fields)
    if "dimensions" in fields:
        raise InvalidRequestError("`dimensions` isn't taken here; /embeddings takes it", "dimensions")
    return PoolingRequest(**vars(openai.parse_fields(rest)))


def _without_task(fields: read.Fields) -> dict[str, Any]:
    if fields.get("task", EMBED) != EMBED:
        raise MissingCapabilityError("no model here has another task than `embed`", "task")
    return {name: value for name, value in fields.items() if name != "task"}


def parse_invocation(fields: read.Fields) -> EmbeddingRequest:
    """Parse a body of `POST /invocations`: that of whichever route it fits."""
    if "input" in fields or "messages" in fields:
        return openai.parse_fields(_without_task(fields))
    return tei.parse_any(fields)


# --- the same formats as models, for the OpenAPI document only -------------------------------------


class VllmTokenizeBody(ModelBody):
    """vLLM's body of `POST /tokenize`. Fields that are null count as absent."""

    model_config = ConfigDict(title="VllmTokenizeRequest")
    described: ClassVar[dict[str, Any]] = {"examples": [{"model": "all-minilm-l6-v2", "prompt": "Hello"}]}

    prompt: str
    add_special_tokens: bool | None = True
    return_token_strs: bool | None = False
    # With any of these a body is Pharia's, or text-embeddings-inference's.
    tokens: None = None
    token_ids: None = None
    inputs: None = None


class VllmTokenizeChatBody(chat.ChatBody):
    """vLLM's body of `POST /tokenize` with a conversation, for models with a chat template."""

    model_config = ConfigDict(title="VllmTokenizeChatRequest")

    messages: chat.Messages
    add_generation_prompt: bool | None = True
    return_token_strs: bool | None = False


class VllmTokenizeResponse(BaseModel):
    """vLLM's answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class VllmDetokenizeBody(ModelBody):
    """vLLM's body of `POST /detokenize`."""

    model_config = ConfigDict(title="VllmDetokenizeRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [{"model": "all-minilm-l6-v2", "tokens": [101, 7592, 102]}]
    }

    tokens: list[TokenId]


class VllmDetokenizeResponse(BaseModel):
    """vLLM's answer of `/detokenize`."""

    prompt: str


class PoolingOptions(openai.OptionsBody):
    """What a body of vLLM's `POST /pooling` says of its vectors."""

    task: Literal["embed"] | None = Field(None, description="No model here has another one.")
    dimensions: None = Field(None, description="`/embeddings` takes it.")


class PoolingBody(PoolingOptions, openai.EmbeddingRequestBody):
    """The body of vLLM's `POST /pooling`."""

    model_config = ConfigDict(title="PoolingRequest")
    described: ClassVar[dict[str, Any]] = {"examples": [{"model": "all-minilm-l6-v2", "input": ["Hello"]}]}


class PoolingChatBody(PoolingOptions, openai.ChatRequestBody):
    """A body of vLLM's `POST /pooling` that holds conversations."""

    model_config = ConfigDict(title="ChatPoolingRequest")
    described = openai.ChatRequestBody.described


class Pooling(BaseModel):
    """One vector of the answer."""

    object: str = "pooling"
    index: int
    data: list[float] | str


class PoolingResponse(BaseModel):
    """The answer of `POST /pooling`, in the order of the inputs."""

    id: str
    object: str = "list"
    created: int
    data: list[Pooling]
    model: str
    usage: openai.Usage
