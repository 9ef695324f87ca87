"""text-embeddings-inference's dialect: the body of `POST /embed` → one flat request; vectors, bare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Encoding

from deployments.api import cohere, pharia
from deployments.api import fields as read
from deployments.api.encoding import json_rows
from deployments.api.fields import Count, Inputs, Text, TokenIds
from deployments.api.known import DialectBody, ModelBody
from deployments.api.request import (
    EmbeddingRequest,
    EmbeddingResult,
    Prompt,
    Reader,
    TokensRequest,
    Truncation,
)
from deployments.errors import InvalidRequestError, MissingCapabilityError

SIDES: dict[str, Truncation] = {"Left": "start", "Right": "end"}


@dataclass(frozen=True, kw_only=True)
class TeiRequest(EmbeddingRequest):
    """The body of `POST /embed`."""

    def answer(self, result: EmbeddingResult) -> bytes:
        """Return a list of vectors; the format has no place for anything else."""
        return b"[%b]" % b",".join(json_rows(result.vectors))


def parse_fields(fields: Mapping[str, Any]) -> TeiRequest:
    """Parse the fields of a body."""
    TeiBody.check(fields)
    return TeiRequest(
        **_inputs(fields),
        dimensions=read.positive(fields, "dimensions"),
        normalize=read.flag(fields, "normalize") is not False,
    )


def _inputs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is embedded, by which model, and how it is read."""
    if "options" in fields:
        Options.check(_object(fields, "options"))
    texts, ids = read.texts_or_ids(fields.get("inputs"), "inputs")
    return {
        "model": read.model(fields),
        "texts": texts,
        "token_ids": ids,
        "input_field": "inputs",
        "own_ids": True,  # each server of this kind has one model, whose ids they are
        "prompt": _prompt(fields),
        **_truncation(fields),
        "tags": read.tags(fields),
    }


def _prompt(fields: Mapping[str, Any]) -> Prompt | None:
    name = read.string(fields, "prompt_name")
    return Prompt((name,), "prompt_name") if name is not None else None


def _truncation(fields: Mapping[str, Any]) -> dict[str, Any]:
    side = SIDES[read.choice(fields, "truncation_direction", tuple(SIDES), "Right")]
    cut = read.flag(fields, "truncate")
    return {
        "truncation": None if cut is None else side if cut else "none",
        "truncation_side": side if "truncation_direction" in fields else None,
    }


@dataclass(frozen=True, kw_only=True)
class SimilarityRequest(EmbeddingRequest):
    """The body of `POST /similarity`: one sentence, and those that it is compared with."""

    def answer(self, result: EmbeddingResult) -> bytes:
        """Return the cosine of each with the first."""
        source, *others = result.vectors
        return b"[%b]" % b",".join(orjson.dumps(float(each @ source)) for each in others)


def parse_similarity(fields: read.Fields) -> SimilarityRequest:
    """Parse a body of `POST /similarity`."""
    SimilarityBody.check(fields)
    pair = _object(fields, "inputs")
    Pairs.check(pair)
    options = _object(fields, "parameters") if "parameters" in fields else {}
    Parameters.check(options)
    others = read.not_empty(pair.get("sentences"), "sentences")
    read.check_texts(others, "sentences")
    return SimilarityRequest(
        model=read.model(fields),
        texts=[read.required_string(pair, "source_sentence"), *others],
        input_field="inputs",
        prompt=_prompt(options),
        **_truncation(options),
        normalize=True,
        tags=read.tags(fields),
    )


def _object(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise InvalidRequestError(f"`{name}` must be an object", name)
    return read.present(value)


def _tokens(text: str, encoding: Encoding) -> list[dict[str, Any]]:
    """Return a text's tokens: id, text, and where it stands, in characters."""
    parts = zip(encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True)
    return [
        {"id": token, "text": name, "special": True, "start": None, "stop": None}
        if special
        else {"id": token, "text": text[start:stop], "special": False, "start": start, "stop": stop}
        for token, name, special, (start, stop) in parts
    ]


def parse_tokenize(fields: Mapping[str, Any]) -> TokensRequest:
    """Parse the fields of a body of `POST /tokenize` with `inputs`."""
    TeiTokenizeBody.check(fields)
    texts = [fields["inputs"]] if isinstance(fields["inputs"], str) else read.strings(fields, "inputs")
    model, special = read.model(fields), read.flag(fields, "add_special_tokens") is not False

    def answer(texts: Sequence[str], reader: Reader, _: int) -> bytes:
        return orjson.dumps([_tokens(text, reader.read(text, special)) for text in texts])

    return TokensRequest(
        model=model,
        texts=texts,
        field="inputs",
        answer=answer,
        prompt=_prompt(fields),
        tags=read.tags(fields),
    )


def parse_decode(fields: read.Fields) -> TokensRequest:
    """Parse a body of `POST /decode`."""
    TeiDecodeBody.check(fields)
    given = read.not_empty(fields.get("ids"), "ids")
    lists = given if isinstance(given[0], list) else [given]
    model = read.model(fields)
    found = [read.token_ids(ids, f"ids[{index}]", "ids") for index, ids in enumerate(lists)]
    special = read.flag(fields, "skip_special_tokens") is False
    return TokensRequest(
        model=model,
        ids=found,
        field="ids",
        answer=lambda _, reader, __: orjson.dumps([reader.decode(ids, special) for ids in found]),
        tags=read.tags(fields),
    )


@dataclass(frozen=True, kw_only=True)
class TeiTokensRequest(EmbeddingRequest):
    """The body of `POST /embed_all`."""

    by_token = True

    def answer(self, result: EmbeddingResult) -> bytes:
        """Return a list for each input, of a vector for each token."""
        rows = iter(json_rows(result.vectors))
        return b"[%b]" % b",".join(b"[%b]" % b",".join(islice(rows, int(each))) for each in result.lengths)


def parse_all(fields: read.Fields) -> TeiTokensRequest:
    """Parse a body of `POST /embed_all`."""
    TeiAllBody.check(fields)
    return TeiTokensRequest(**_inputs(fields))


def refuse_sparse(_: read.Fields) -> EmbeddingRequest:
    """Refuse a body of `POST /embed_sparse`."""
    raise MissingCapabilityError("no model here gives sparse vectors; /embed gives dense ones")


# --- the same format as a model, for the OpenAPI document only -------------------------------------


class Options(DialectBody):
    """Of Hugging Face's hosted endpoints: whether to wait, and to cache."""

    aside = frozenset(("wait_for_model", "use_cache", "use_gpu"))


class TeiBody(ModelBody):
    """The body of text-embeddings-inference's `POST /embed`. Fields that are null count as absent."""

    model_config = ConfigDict(title="TeiEmbedRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [{"model": "all-minilm-l6-v2", "inputs": ["Hello", "world"]}]
    }

    inputs: Inputs
    normalize: bool | None = True
    truncate: bool | None = Field(None, description="Default: as the worker file says.")
    truncation_direction: Literal["Left", "Right"] | None = "Right"
    prompt_name: Text | None = None
    dimensions: Count | None = None
    options: Options | None = None
    # With any of these a body is Cohere's.
    texts: None = None
    images: None = None
    embedding_types: None = None
    input_type: None = None


class TeiAllBody(ModelBody):
    """The body of text-embeddings-inference's `POST /embed_all`."""

    model_config = ConfigDict(title="TeiEmbedAllRequest")
    described: ClassVar[dict[str, Any]] = {"examples": [{"model": "all-minilm-l6-v2", "inputs": ["Hello"]}]}

    inputs: Inputs
    truncate: bool | None = Field(None, description="Default: as the worker file says.")
    truncation_direction: Literal["Left", "Right"] | None = "Right"
    prompt_name: Text | None = None
    options: Options | None = None


class Pairs(DialectBody):
    """What is compared."""

    aside = frozenset()

    source_sentence: Text
    sentences: Annotated[list[Text], Field(min_length=1)]


class Parameters(DialectBody):
    """How it is read."""

    aside = frozenset()

    truncate: bool | None = None
    truncation_direction: Literal["Left", "Right"] | None = "Right"
    prompt_name: Text | None = None


class SimilarityBody(ModelBody):
    """The body of text-embeddings-inference's `POST /similarity`."""

    model_config = ConfigDict(title="TeiSimilarityRequest")
    described: ClassVar[dict[str, Any]] = {
        "examples": [{"inputs": {"source_sentence": "Hello", "sentences": ["Hi", "Goodbye"]}}]
    }

    inputs: Pairs
    parameters: Parameters | None = None


class TeiTokenizeBody(ModelBody):
    """text-embeddings-inference's body of `POST /tokenize`."""

    model_config = ConfigDict(title="TeiTokenizeRequest")
    described: ClassVar[dict[str, Any]] = {"examples": [{"inputs": "Hello"}]}

    inputs: str | list[Text]
    add_special_tokens: bool | None = True
    prompt_name: Text | None = None
    # With either of these a body is Pharia's.
    tokens: None = None
    token_ids: None = None


class Token(BaseModel):
    """A token of the answer of `/tokenize`."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class TeiDecodeBody(ModelBody):
    """The body of text-embeddings-inference's `POST /decode`."""

    model_config = ConfigDict(title="TeiDecodeRequest")
    described: ClassVar[dict[str, Any]] = {"examples": [{"ids": [101, 7592, 102]}]}

    ids: TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    skip_special_tokens: bool | None = True


def parse_any(fields: read.Fields) -> EmbeddingRequest:
    """Parse a body of `POST /embed`, whichever dialect it is; Pharia's asks for what vLLM can't do."""
    if cohere.is_mine(fields):
        return cohere.parse_first(fields)
    if "inputs" in fields:
        return parse_fields(fields)
    if "prompt" in fields or "layers" in fields:
        pharia.refuse_raw(fields)
    raise InvalidRequestError("`texts` (Cohere) or `inputs` (text-embeddings-inference) is missing", "inputs")
