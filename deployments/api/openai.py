"""OpenAI's dialect: the body of `POST /embeddings` → one flat request; vectors → the answer.

Checked by hand rather than by a union of models: one pass over the input, and errors that name the field.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field

from deployments.api import chat
from deployments.api import fields as read
from deployments.api.encoding import (
    EmbedDtype,
    EncodingFormat,
    Endianness,
    check_dtype,
    embedding_texts,
    numbers,
)
from deployments.api.fields import Count, Inputs, Text, Written
from deployments.api.known import ModelBody
from deployments.api.request import LONGEST, EmbeddingRequest, EmbeddingResult, Prompt, Raw, Truncation
from deployments.errors import InvalidRequestError

# vLLM's names for what is dropped, and ours.
SIDES: dict[str, Truncation] = {"left": "start", "right": "end"}
# What an answer in JSON may hold.
JSON_FORMATS = ("float", "base64")
RAW_FORMATS = ("bytes", "bytes_only")
FORMATS = (*JSON_FORMATS, *RAW_FORMATS)
# HAProxy's buffer holds a head of 64 KiB.
MAX_METADATA = 48 * 2**10
PADDING = ("do_not_pad",)
# vLLM's name for it, TEI's and Jina's.
UNIT = ("use_activation", "normalize", "normalized")
# NVIDIA's and Cohere's names for the sides.
TRUNCATIONS: dict[str, Truncation] = {"NONE": "none", "START": "start", "END": "end"}
# What gateways name a text's use, and the names that models give their prompts for it.
QUERY, DOCUMENT = ("query", "search_query"), ("document", "passage", "search_document")
INPUT_TYPES = {
    **dict.fromkeys(QUERY, QUERY),
    **dict.fromkeys(DOCUMENT, DOCUMENT),
    "classification": (),
    "clustering": (),
}
# Whatever else a body holds is rare: a plain one pays nothing for it.
USUAL = frozenset(("model", "input", "encoding_format", "dimensions", "user"))


@dataclass(frozen=True, kw_only=True)
class OpenAIRequest(EmbeddingRequest):
    """The body of `POST /embeddings`."""

    prefix: ClassVar[bytes] = b"embd"
    item: ClassVar[bytes] = b'{"object":"embedding","index":%d,"embedding":%b}'

    encoding_format: EncodingFormat = "float"
    embed_dtype: EmbedDtype = "float32"
    endianness: Endianness = "native"

    def answer(self, result: EmbeddingResult) -> bytes:
        """Return the vectors with their indices, and exact usage; `truncated` stands only where any was."""
        dtype: EmbedDtype = "float32" if self.encoding_format == "float" else self.embed_dtype
        check_dtype(dtype, result.vectors.shape[1], "embed_dtype")
        if self.encoding_format in RAW_FORMATS:
            return self._raw(result, numbers(result.vectors, dtype, self.endianness))
        texts = embedding_texts(result.vectors, self.encoding_format, dtype, self.endianness)
        data = b",".join([self.item % each for each in enumerate(texts)])
        cut = b',"truncated":%b' % orjson.dumps(list(result.truncated)) if result.truncated else b""
        return (
            b'{"object":"list","data":[%b],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d,'
            b'"completion_tokens":0}%b,"id":"%b","created":%d}'
        ) % (
            data,
            orjson.dumps(result.model),
            result.prompt_tokens,
            result.prompt_tokens,
            cut,
            self._id(),
            int(time.time()),
        )

    def _id(self) -> bytes:
        return b"%b-%b" % (self.prefix, os.urandom(16).hex().encode())

    def _raw(self, result: EmbeddingResult, array: np.ndarray) -> bytes:
        """Return the vectors' bytes, with vLLM's `metadata` beside them unless `bytes_only` are wanted."""
        answer, size = Raw(array.tobytes()), array.nbytes // len(array)
        if self.encoding_format == "bytes_only":
            return answer
        usage = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
        item = {"embed_dtype": self.embed_dtype, "endianness": self.endianness, "shape": array.shape[1:]}
        data = [
            {"index": index, **item, "start": index * size, "end": (index + 1) * size}
            for index in range(len(array))
        ]
        metadata = json.dumps(
            {
                "id": self._id().decode(),
                "created": int(time.time()),
                "model": result.model,
                "data": data,
                "usage": usage,
            }
        )
        if len(metadata) > MAX_METADATA:
            raise InvalidRequestError(
                f"the metadata of {len(array)} vectors has no place in a header; ask for `bytes_only`",
                "encoding_format",
            )
        answer.headers = {"metadata": metadata}
        return answer


def parse_fields(fields: read.Fields, formats: Sequence[str] = FORMATS) -> OpenAIRequest:
    """Parse a body's fields, among which none is null, into a request whose answer has one of the formats.

    Raises InvalidRequestError whose `param` names the field.
    """
    chats = chat.holds_messages(fields, "input")
    if not chats and "input" not in fields:
        raise InvalidRequestError("`input` is missing", "input")
    options = _parse_chat(fields) if chats else {} if fields.keys() <= USUAL else _parse_options(fields)
    texts, token_ids = ((), ()) if chats else read.texts_or_ids(fields["input"], "input")
    return OpenAIRequest(
        model=read.model(fields),
        texts=texts,
        token_ids=token_ids,
        encoding_format=_parse_format(fields, formats),
        dimensions=read.whole(fields, "dimensions") if "dimensions" in fields else None,
        **options,
    )


def _parse_format(fields: Mapping[str, Any], formats: Sequence[str]) -> EncodingFormat:
    """Return one of the formats; an empty one is absent, as gateways write that."""
    if fields.get("encoding_format") == "":
        return "float"
    return cast(EncodingFormat, read.choice(fields, "encoding_format", formats, "float"))


def _parse_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return conversations, around which the model's template writes what the model wants."""
    options = _parse_options(fields, ChatRequestBody)
    conversations = chat.parse_chat(fields, "input")
    special = read.flag(fields, "add_special_tokens") is True
    return {**options, "chat": conversations, "input_field": conversations.field, "special_tokens": special}


def _parse_options(fields: Mapping[str, Any], body: type["OptionsBody"] | None = None) -> dict[str, Any]:
    """Return what the fields ask for that few clients send. Raises for those that nobody knows."""
    (body or EmbeddingRequestBody).check(fields)
    read.choice(fields, "padding", PADDING, PADDING[0])
    truncation, longest = _parse_truncation(fields)
    unit = {name: read.flag(fields, name) for name in UNIT if name in fields}
    return {
        "embed_dtype": read.choice(fields, "embed_dtype", get_args(EmbedDtype), "float32"),
        "endianness": read.choice(fields, "endianness", get_args(Endianness), "native"),
        "prompt": _parse_prompt(fields),
        "truncation": truncation,
        "truncation_side": _parse_side(fields),
        "truncate_prompt_tokens": longest,
        "truncate_within": True,
        "tags": read.tags(fields),
        "normalize": read.agreed(**unit),
        "normalize_field": next(iter(unit), UNIT[0]),
        "special_tokens": read.flag(fields, "add_special_tokens") is not False,
    }


def _parse_truncation(fields: Mapping[str, Any]) -> tuple[Truncation | None, int | None]:
    """Return which side is dropped, and how many tokens stay; None where the request doesn't say."""
    side = _parse_side(fields)
    if "truncate" in fields:
        cut = TRUNCATIONS[read.choice(fields, "truncate", tuple(TRUNCATIONS), "")]
        side = cut if side is None or cut == "none" else read.agreed(truncation_side=side, truncate=cut)
    longest = fields.get("truncate_prompt_tokens")
    if type(longest) is not int or longest != LONGEST:
        longest = read.positive(fields, "truncate_prompt_tokens")
    return (side if longest is not None or "truncate" in fields else None), longest


def _parse_side(fields: Mapping[str, Any]) -> Truncation | None:
    """Return which side is dropped wherever something is; None where it is the model's own."""
    side = SIDES[read.choice(fields, "truncation_side", tuple(SIDES), "right")]
    return side if "truncation_side" in fields else None


def _parse_prompt(fields: Mapping[str, Any]) -> Prompt | None:
    """Return the prompt and the field that named it."""
    name = read.string(fields, "prompt_name")
    if kind := read.maybe_string(fields, "input_type"):
        if name is not None:
            raise InvalidRequestError("send `input_type` or `prompt_name`, and not both", "prompt_name")
        return Prompt((kind, *INPUT_TYPES.get(kind, ())), "input_type", usual=kind in INPUT_TYPES)
    return Prompt((name,), "prompt_name") if name else None


# --- the same formats as models, for the OpenAPI document only -------------------------------------


def _both(**schemas: dict[str, Any]) -> dict[str, Any]:
    return {"required": [*schemas], "properties": schemas}


# Several fields for one thing say the same of it: no body is one of these.
DIFFERING = [
    *(_both(**{one: {"const": True}, other: {"const": False}}) for one, other in permutations(UNIT, 2)),
    _both(truncate={"const": "START"}, truncation_side={"const": "right"}),
    _both(truncate={"const": "END"}, truncation_side={"const": "left"}),
    _both(input_type={"type": "string", "minLength": 1}, prompt_name={"type": "string"}),
]


class OptionsBody(ModelBody):
    """What a body says of its vectors."""

    @classmethod
    def complete(cls, schema: dict[str, Any]) -> None:
        """Say also which fields have to agree."""
        super().complete(schema)
        schema["not"] = {"anyOf": [*DIFFERING, *([schema["not"]] if "not" in schema else [])]}

    encoding_format: EncodingFormat | Literal[""] | None = Field(
        "float", description="`base64` holds little-endian float32 and is the faster one; `bytes` are vLLM's."
    )
    embed_dtype: EmbedDtype | None = Field("float32", description="What base64 and bytes hold instead.")
    endianness: Endianness | None = Field("native", description="The order of its bytes; native is little.")
    dimensions: Count | Written | None = Field(
        None, description="Shorter vectors, where the model allows it."
    )
    truncate_prompt_tokens: Count | Literal[-1] | None = Field(
        None, description="Cut each input to that many tokens, special tokens included; -1: the model's most."
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="Which side is cut.")
    truncate: Literal["NONE", "START", "END"] | None = Field(None, description="The same, in other words.")
    padding: Literal["do_not_pad"] | None = Field(None, description="No model here needs any.")
    use_activation: bool | None = Field(
        None, description="Unit length; false is refused by models that give nothing else."
    )
    normalize: bool | None = Field(None, description="The same.")
    normalized: bool | None = Field(None, description="The same.")


class EmbeddingRequestBody(OptionsBody):
    """The body of `POST /embeddings`. Fields that are null count as absent."""

    model_config = ConfigDict(title="EmbeddingRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [{"model": "all-minilm-l6-v2", "input": ["Hello", "world"]}]
    }

    input: Inputs = Field(
        description="A text, several texts, one text's token ids, or several texts' token ids."
    )
    input_type: str | None = Field(
        None, description="Puts the model's prompt of that name before each text: `query`, `document`, …"
    )
    prompt_name: Text | None = Field(None, description="The same, by the model's own name alone.")
    add_special_tokens: bool | None = Field(True, description="The model's own, around each text.")


class ChatRequestBody(chat.ChatBody, OptionsBody):
    """A body of `POST /embeddings` that holds conversations, for models with a chat template."""

    model_config = ConfigDict(title="ChatEmbeddingRequest")
    described: ClassVar[dict[str, Any]] = {
        **chat.ChatBody.described,
        "oneOf": chat.either("messages", "input"),
    }

    messages: chat.Conversations | None = Field(None, description="A conversation, or several.")
    input: chat.Conversations | None = Field(None, description="The same.")


class Embedding(BaseModel):
    """One vector of the answer."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that the model read, special tokens and prompts included."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class EmbeddingResponse(BaseModel):
    """The answer of `POST /embeddings`, in the order of the inputs."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    id: str
    created: int
    truncated: list[int] = Field(
        [], description="Indices of the inputs that were cut; absent where none was."
    )
