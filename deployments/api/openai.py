"""OpenAI's dialect: the body of `POST /embeddings` → one flat request; vectors → the answer.

Checked by hand rather than by a union of models: one pass over the input, and errors that name the field.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field

from deployments.api import fields as read
from deployments.api.encoding import EmbedDtype, EncodingFormat, check_dtype, embedding_texts
from deployments.api.fields import Count, Inputs, Text
from deployments.api.request import EmbeddingRequest, EmbeddingResult, Prompt, Truncation
from deployments.errors import InvalidRequestError

# vLLM's names for what is dropped, and ours.
SIDES: dict[str, Truncation] = {"left": "start", "right": "end"}
# vLLM's way to say: as many as the model takes.
LONGEST = -1
ENDIANNESS = ("native", "little")


@dataclass(frozen=True, kw_only=True)
class OpenAIRequest(EmbeddingRequest):
    """The body of `POST /embeddings`."""

    encoding_format: EncodingFormat = "float"
    embed_dtype: EmbedDtype = "float32"

    def answer(self, result: EmbeddingResult) -> bytes:
        """Return the vectors with their indices, and exact usage; `truncated` stands only where any was."""
        dtype: EmbedDtype = self.embed_dtype if self.encoding_format == "base64" else "float32"
        check_dtype(dtype, result.vectors.shape[1], "embed_dtype")
        data = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%b}' % item
            for item in enumerate(embedding_texts(result.vectors, self.encoding_format, dtype))
        )
        cut = b',"truncated":%b' % orjson.dumps(list(result.truncated)) if result.truncated else b""
        return (
            b'{"object":"list","data":[%b],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}%b}'
            % (data, orjson.dumps(result.model), result.prompt_tokens, result.prompt_tokens, cut)
        )


def parse_request(body: read.Body) -> OpenAIRequest:
    """Parse a body. Raises InvalidRequestError whose `param` names the field."""
    return parse_fields(read.read_object(body))


def parse_fields(fields: read.Fields) -> OpenAIRequest:
    """Parse a body's fields, among which none is null."""
    if "input" not in fields:
        raise InvalidRequestError("`input` is missing", "input")
    texts, token_ids = read.texts_or_ids(fields["input"], "input")
    read.any_string(fields, "user")
    read.any_string(fields, "hosting")
    truncation, longest = _parse_truncation(fields)
    return OpenAIRequest(
        model=read.required_string(fields, "model"),
        texts=texts,
        token_ids=token_ids,
        encoding_format=cast(
            EncodingFormat, read.choice(fields, "encoding_format", get_args(EncodingFormat), "float")
        ),
        embed_dtype=_parse_dtype(fields),
        dimensions=read.positive(fields, "dimensions"),
        prompt=_parse_prompt(fields),
        truncation=truncation,
        truncate_prompt_tokens=longest,
        tags=read.tags(fields),
    )


def _parse_dtype(fields: Mapping[str, Any]) -> EmbedDtype:
    read.choice(fields, "endianness", ENDIANNESS, "little")
    return cast(EmbedDtype, read.choice(fields, "embed_dtype", get_args(EmbedDtype), "float32"))


def _parse_truncation(fields: Mapping[str, Any]) -> tuple[Truncation | None, int | None]:
    """Return which side is dropped, and how many tokens stay; None where the request doesn't say."""
    side = SIDES[read.choice(fields, "truncation_side", tuple(SIDES), "right")]
    named = side if "truncation_side" in fields else None
    if type(fields.get("truncate_prompt_tokens")) is int and fields["truncate_prompt_tokens"] == LONGEST:
        return side, None
    longest = read.positive(fields, "truncate_prompt_tokens")
    return (named if longest is not None else None), longest


def _parse_prompt(fields: Mapping[str, Any]) -> Prompt | None:
    """Return the prompt and the field that named it; `input_type` goes before `prompt_name`."""
    named = {name: read.string(fields, name) for name in ("input_type", "prompt_name")}
    return next((Prompt((value,), name) for name, value in named.items() if value is not None), None)


# --- the same formats as models, for the OpenAPI document only -------------------------------------


class EmbeddingRequestBody(BaseModel):
    """The body of `POST /embeddings`. Fields that are null count as absent."""

    model_config = ConfigDict(
        title="EmbeddingRequest",
        json_schema_extra={"examples": [{"model": "all-minilm-l6-v2", "input": ["Hello", "world"]}]},
    )

    model: Text = Field(description="One of the names that `GET /models` lists.")
    input: Inputs = Field(
        description="A text, several texts, one text's token ids, or several texts' token ids."
    )
    encoding_format: EncodingFormat | None = Field(
        "float", description="`base64` holds little-endian float32 and is the faster one."
    )
    embed_dtype: EmbedDtype | None = Field("float32", description="What `base64` holds instead of float32.")
    endianness: Literal["native", "little"] | None = Field("little", description="The order of its bytes.")
    dimensions: Count | None = Field(None, description="Shorter vectors, where the model allows it.")
    user: str | None = Field(None, description="Accepted and not used.")
    hosting: str | None = Field(None, description="Accepted and not used.")
    tags: list[Text] | None = Field(None, description="Only a worker that has all of them may serve this.")
    input_type: Text | None = Field(
        None, description="Puts the model's prompt of that name before each text: `query`, `document`, …"
    )
    prompt_name: Text | None = Field(None, description="The same as `input_type`.")
    truncate_prompt_tokens: Count | Literal[-1] | None = Field(
        None, description="Cut each input to that many tokens, special tokens included; -1: the model's most."
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="Which side is cut.")


class Embedding(BaseModel):
    """One vector of the answer."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that the model read, special tokens and prompts included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """The answer of `POST /embeddings`, in the order of the inputs."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    truncated: list[int] = Field(
        [], description="Indices of the inputs that were cut; absent where none was."
    )
