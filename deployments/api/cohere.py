"""Cohere's dialect: the body of `POST /v2/embed` → one flat request; vectors in every type asked for."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field

from deployments.api import fields as read
from deployments.api.encoding import EmbedDtype, base64_rows, check_dtype, convert, json_rows
from deployments.api.fields import Count, Text
from deployments.api.known import ModelBody
from deployments.api.request import EmbeddingRequest, EmbeddingResult, Prompt, Truncation
from deployments.errors import InvalidRequestError, MissingCapabilityError

# Which of a model's prompts an input type means, under the names that models give them.
INPUT_TYPES = {
    "search_document": ("search_document", "document", "passage"),
    "search_query": ("search_query", "query"),
    "classification": ("classification",),
    "clustering": ("clustering",),
}
EMBEDDING_TYPES = ("float", "int8", "uint8", "binary", "ubinary", "base64")
TRUNCATIONS: dict[str, Truncation] = {"NONE": "none", "START": "start", "END": "end"}
INPUTS = ("texts", "inputs", "images")


@dataclass(frozen=True, kw_only=True)
class CohereRequest(EmbeddingRequest):
    """The body of `POST /v2/embed`."""

    embedding_types: Sequence[str] = ("float",)
    version: Literal["1", "2"] = "2"
    by_type: bool = True

    def answer(self, result: EmbeddingResult) -> bytes:
        """Return the vectors, by type unless version 1 asks for none, the texts, and exact usage."""
        rows = [(kind, _rows(result.vectors, kind)) for kind in self.embedding_types]
        types = b",".join(b'"%b":[%b]' % (kind.encode(), each) for kind, each in rows)
        meta: dict[str, Any] = {
            "api_version": {"version": self.version},
            "billed_units": {"input_tokens": result.prompt_tokens},
            "tokens": {"input_tokens": result.prompt_tokens},
        }
        if result.truncated:
            meta["warnings"] = [f"texts were truncated: {', '.join(map(str, result.truncated))}"]
        return b'{"id":"%b","embeddings":%b,"texts":%b,"meta":%b,"response_type":"%b"}' % (
            str(uuid.uuid4()).encode(),
            b"{%b}" % types if self.by_type else b"[%b]" % rows[0][1],
            orjson.dumps(list(self.texts)),
            orjson.dumps(meta),
            b"embeddings_by_type" if self.by_type else b"embeddings_floats",
        )


def _rows(vectors: np.ndarray, kind: str) -> bytes:
    """Return the vectors in one of Cohere's types, as the inside of a JSON list."""
    if kind == "base64":
        return b",".join(base64_rows(convert(vectors, "float32")))
    dtype = cast(EmbedDtype, "float32" if kind == "float" else kind)
    check_dtype(dtype, vectors.shape[1], "embedding_types")
    return b",".join(json_rows(convert(vectors, dtype)))


def is_mine(fields: Mapping[str, Any]) -> bool:
    """Whether a body of `POST /embed` is Cohere's."""
    inputs = fields.get("inputs")
    items = isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], dict)
    return items or any(name in fields for name in ("texts", "images", "embedding_types", "input_type"))


def parse_first(fields: Mapping[str, Any]) -> CohereRequest:
    """Parse the fields of a body of version 1, whose answer is a bare list unless types are named."""
    request = parse_fields(fields)
    by_type = "embedding_types" in fields or request.input_field != "texts"
    return replace(request, version="1", by_type=by_type)


def parse_fields(fields: Mapping[str, Any]) -> CohereRequest:
    """Parse the fields of a body of `POST /v2/embed`."""
    CohereBody.check(fields)
    texts, field = _read_texts(fields)
    types = fields.get("embedding_types", [])
    types = ["float"] if types == [] else read.not_empty(types, "embedding_types")
    if any(kind not in EMBEDDING_TYPES for kind in types if isinstance(kind, str)) or not all(
        isinstance(kind, str) for kind in types
    ):
        raise InvalidRequestError(
            f"`embedding_types` may hold {', '.join(EMBEDDING_TYPES)}", "embedding_types"
        )
    return CohereRequest(
        model=read.model(fields),
        texts=texts,
        input_field=field,
        dimensions=read.positive(fields, "output_dimension"),
        dimensions_field="output_dimension",
        prompt=_read_prompt(fields),
        truncation=TRUNCATIONS[read.choice(fields, "truncate", tuple(TRUNCATIONS), "END")],
        truncate_prompt_tokens=read.positive(fields, "max_tokens"),
        tags=read.tags(fields),
        embedding_types=tuple(dict.fromkeys(types)),
    )


def _read_prompt(fields: Mapping[str, Any]) -> Prompt | None:
    """Return the prompt that an input type means; one that Cohere hasn't must be the model's own."""
    kind = read.string(fields, "input_type")
    if kind is None:
        return None
    if kind == "image":
        raise MissingCapabilityError("no model here reads images", "input_type")
    if kind in INPUT_TYPES:
        return Prompt(INPUT_TYPES[kind], "input_type", required=False)
    return Prompt((kind,), "input_type")


def _read_texts(fields: Mapping[str, Any]) -> tuple[list[str], str]:
    """Return the texts, and the one field that holds them."""
    given = [name for name in INPUTS if name in fields]
    if len(given) != 1:
        raise InvalidRequestError("one of `texts` and `inputs` must be given", "texts")
    (field,) = given
    if field == "images":
        raise MissingCapabilityError("no model here reads images", "images")
    items = read.not_empty(fields[field], field)
    texts = items if field == "texts" else [_read_content(each, i) for i, each in enumerate(items)]
    read.check_texts(texts, field)
    return texts, field


def _read_content(item: Any, index: int) -> str:
    """Return the text of one of `inputs`, whose parts are joined."""
    content = item.get("content") if isinstance(item, dict) else None
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InvalidRequestError(f"`inputs[{index}]` must hold a list `content`", "inputs")
    if any(part.get("type") in ("image", "image_url") for part in content):
        raise MissingCapabilityError("no model here reads images", "inputs")
    if any(part.get("type") != "text" for part in content):
        raise InvalidRequestError(f"`inputs[{index}]` must hold parts of type `text`", "inputs")
    texts = [part.get("text") for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(f"`inputs[{index}]` must hold texts", "inputs")
    return "".join(cast(list[str], texts))


# --- the same formats as models, for the OpenAPI document only -------------------------------------


class Content(BaseModel):
    """A part of an input."""

    type: Literal["text"]
    text: str


class Input(BaseModel):
    """An input of several parts, not all of them empty."""

    content: list[Content] = Field(json_schema_extra={"contains": {"properties": {"text": {"minLength": 1}}}})


class CohereBody(ModelBody):
    """The body of `POST /v2/embed`. Fields that are null count as absent."""

    model_config = ConfigDict(title="CohereEmbedRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [
            {
                "model": "all-minilm-l6-v2",
                "texts": ["Hello"],
                "input_type": "search_query",
                "embedding_types": ["float"],
            }
        ],
        "oneOf": [
            {"required": [one], "properties": {one: {"type": "array"}, other: {"type": "null"}}}
            for one, other in (("texts", "inputs"), ("inputs", "texts"))
        ],
    }

    input_type: Text | None = Field(
        None,
        description="search_document, search_query, classification, clustering, or a prompt of the model",
        json_schema_extra={"not": {"const": "image"}},
    )
    texts: Annotated[list[Text], Field(min_length=1)] | None = None
    inputs: Annotated[list[Input], Field(min_length=1)] | None = None
    embedding_types: list[Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]] | None = None
    images: None = Field(None, description="No model here reads images.")
    output_dimension: Count | None = None
    max_tokens: Count | None = Field(None, description="Cut each text to that many.")
    truncate: Literal["NONE", "START", "END"] | None = Field("END", description="Which side is cut.")


class CohereFloats(BaseModel):
    """The answer of version 1 where no types are named."""

    id: str
    embeddings: list[list[float]]
    texts: list[str]
    meta: dict[str, Any]
    response_type: Literal["embeddings_floats"]


class CohereResponse(BaseModel):
    """The answer: vectors by type, in the order of the texts."""

    id: str
    embeddings: dict[str, list[list[float]] | list[str]]
    texts: list[str]
    meta: dict[str, Any]
    response_type: Literal["embeddings_by_type"]
