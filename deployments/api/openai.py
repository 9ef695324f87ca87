"""OpenAI's dialect: the body of `POST /embeddings` → one flat request; vectors → the answer.

Checked by hand rather than by a union of models: one pass over the input, and errors that name the field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field

from deployments.api.encoding import EncodingFormat, embedding_texts
from deployments.errors import EmbeddingError, InvalidRequestError


@dataclass(frozen=True)
class EmbeddingRequest:
    """A parsed request: either `texts` or `token_ids`, never both."""

    model: str
    texts: Sequence[str] = ()
    token_ids: Sequence[Sequence[int]] = ()
    encoding_format: EncodingFormat = "float"
    dimensions: int | None = None
    use: str | None = None
    use_field: str | None = None
    truncate_prompt_tokens: int | None = None

    def __len__(self) -> int:
        """Return the number of inputs."""
        return len(self.texts) or len(self.token_ids)


def parse_request(body: bytes) -> EmbeddingRequest:
    """Parse a body. Raises InvalidRequestError whose `param` names the field."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # The decoder's own message quotes nothing of the input; line and column help a person.
        raise InvalidRequestError(
            f"the body isn't valid JSON: {error.msg} (line {error.lineno}, column {error.colno})", "body"
        ) from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object", "body")
    fields = {name: value for name, value in fields.items() if value is not None}
    texts, token_ids = _parse_input(fields)
    use, use_field = _parse_use(fields)
    return EmbeddingRequest(
        model=_parse_model(fields),
        texts=texts,
        token_ids=token_ids,
        encoding_format=_parse_encoding_format(fields),
        dimensions=_parse_positive(fields, "dimensions"),
        use=use,
        use_field=use_field,
        truncate_prompt_tokens=_parse_positive(fields, "truncate_prompt_tokens"),
    )


def _parse_model(fields: Mapping[str, Any]) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("`model` must name a model", "model")
    return model


def _parse_input(fields: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Tell the four shapes apart: a string, strings, token ids, lists of token ids."""
    value = fields.get("input")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise InvalidRequestError(
            "`input` must be a string, a list of strings, a list of token ids, or a list of those",
            "input",
        )
    if not value:
        raise InvalidRequestError("`input` must not be empty", "input")
    if isinstance(value[0], str):
        for index, text in enumerate(value):
            if not isinstance(text, str):
                raise InvalidRequestError(f"`input[{index}]` must be a string like the others", "input")
            if not text:
                raise InvalidRequestError(f"`input[{index}]` must not be empty", "input")
        return value, ()
    if isinstance(value[0], list):
        for index, ids in enumerate(value):
            if not isinstance(ids, list):
                raise InvalidRequestError(f"`input[{index}]` must be a list like the others", "input")
            _check_ids(ids, f"input[{index}]")
        return (), value
    _check_ids(value, "input")
    return (), [value]


def _check_ids(ids: list[Any], name: str) -> None:
    if not ids:
        raise InvalidRequestError(f"`{name}` must not be empty", "input")
    # bool is a subclass of int, so the exact type is asked for.
    if any(type(token) is not int for token in ids):
        raise InvalidRequestError(f"`{name}` must hold token ids, which are integers", "input")
    if min(ids) < 0:
        raise InvalidRequestError(f"`{name}` holds a negative token id", "input")


def _parse_encoding_format(fields: Mapping[str, Any]) -> EncodingFormat:
    value = fields.get("encoding_format", "float")
    if value not in get_args(EncodingFormat):
        raise InvalidRequestError("`encoding_format` must be `float` or `base64`", "encoding_format")
    return cast(EncodingFormat, value)


def _parse_positive(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise InvalidRequestError(f"`{name}` must be a positive integer", name)
    return value


def _parse_use(fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the prompt's name and the field that named it."""
    for name in ("input_type", "prompt_name"):
        if (value := fields.get(name)) is not None:
            if not isinstance(value, str) or not value:
                raise InvalidRequestError(f"`{name}` must be a string", name)
            return value, name
    return None, None


def answer(vectors: np.ndarray, model: str, encoding_format: EncodingFormat, prompt_tokens: int) -> bytes:
    """Return the JSON answer for float32 vectors of shape (n, dim)."""
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % item
        for item in enumerate(embedding_texts(vectors, encoding_format))
    )
    return b'{"object":"list","data":[%b],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
        data,
        orjson.dumps(model),
        prompt_tokens,
        prompt_tokens,
    )


def error_body(error: EmbeddingError) -> bytes:
    """Return the error envelope, a superset that OpenAI's and Pharia's clients both read."""
    detail = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    return orjson.dumps({"error": detail, "code": error.code})


# --- the same formats as models, for the OpenAPI document only -------------------------------------


class EmbeddingRequestBody(BaseModel):
    """The body of `POST /embeddings`. Fields that are null count as absent."""

    model_config = ConfigDict(
        title="EmbeddingRequest",
        json_schema_extra={"examples": [{"model": "all-minilm-l6-v2", "input": ["Hello", "world"]}]},
    )

    model: str = Field(description="One of the names that `GET /models` lists.")
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, several texts, one text's token ids, or several texts' token ids."
    )
    encoding_format: EncodingFormat | None = Field(
        "float", description="`base64` holds little-endian float32 and is the faster one."
    )
    dimensions: int | None = Field(None, description="Shorter vectors, where the model allows it.")
    user: str | None = Field(None, description="Accepted and not used.")
    input_type: str | None = Field(
        None, description="Puts the model's prompt of that name before each text: `query`, `document`, …"
    )
    prompt_name: str | None = Field(None, description="The same as `input_type`.")
    truncate_prompt_tokens: int | None = Field(
        None, description="Cut each input to that many tokens, special tokens included."
    )


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


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """The body of every error. `code` stands twice since Pharia's clients read the outer one."""

    error: ErrorDetail
    code: str
