"""text-embeddings-inference's dialect: the body of `POST /embed` → one flat request; vectors, bare."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.api import cohere, pharia
from deployments.api import fields as read
from deployments.api.encoding import json_rows
from deployments.api.fields import Count, Inputs, Text
from deployments.api.known import TEI
from deployments.api.request import EmbeddingRequest, EmbeddingResult, Prompt, Truncation
from deployments.errors import InvalidRequestError

SIDES: dict[str, Truncation] = {"Left": "start", "Right": "end"}


@dataclass(frozen=True, kw_only=True)
class TeiRequest(EmbeddingRequest):
    """The body of `POST /embed`."""

    def answer(self, result: EmbeddingResult) -> bytes:
        """Return a list of vectors; the format has no place for anything else."""
        return b"[%b]" % b",".join(json_rows(result.vectors))


def is_mine(fields: Mapping[str, Any]) -> bool:
    """Whether a body of `POST /embed` is this dialect's."""
    return "inputs" in fields


def parse_fields(fields: Mapping[str, Any]) -> TeiRequest:
    """Parse the fields of a body."""
    TEI.check(fields)
    texts, ids = read.texts_or_ids(fields.get("inputs"), "inputs")
    prompt = read.string(fields, "prompt_name")
    side = SIDES[read.choice(fields, "truncation_direction", tuple(SIDES), "Right")]
    cut = read.flag(fields, "truncate")
    unit = read.flag(fields, "normalize")
    return TeiRequest(
        model=read.string(fields, "model"),
        texts=texts,
        token_ids=ids,
        input_field="inputs",
        own_ids=True,  # each server of this kind has one model, whose ids they are
        dimensions=read.positive(fields, "dimensions"),
        prompt=Prompt((prompt,), "prompt_name") if prompt is not None else None,
        truncation={None: None, True: side, False: "none"}[cut],
        normalize=unit is not False,
        tags=read.tags(fields),
    )


# --- the same format as a model, for the OpenAPI document only -------------------------------------


class TeiBody(BaseModel):
    """The body of text-embeddings-inference's `POST /embed`. Fields that are null count as absent."""

    model_config = ConfigDict(
        title="TeiEmbedRequest",
        json_schema_extra=TEI.describe(
            examples=[{"model": "all-minilm-l6-v2", "inputs": ["Hello", "world"]}]
        ),
    )

    inputs: Inputs
    model: Text | None = Field(None, description="May be left out where there is only one.")
    normalize: bool | None = True
    truncate: bool | None = Field(None, description="Default: as the worker file says.")
    truncation_direction: Literal["Left", "Right"] | None = "Right"
    prompt_name: Text | None = None
    dimensions: Count | None = None
    tags: list[Text] | None = Field(None, description="Only a worker that has all of them may serve this.")
    # With any of these a body is Cohere's.
    texts: None = None
    images: None = None
    embedding_types: None = None
    input_type: None = None


def parse_any(body: read.Body) -> EmbeddingRequest:
    """Parse a body of `POST /embed`, whichever dialect it is; Pharia's asks for what vLLM can't do."""
    fields = read.read_object(body)
    if cohere.is_mine(fields):
        return cohere.parse_fields(fields)
    if is_mine(fields):
        return parse_fields(fields)
    if "prompt" in fields or "layers" in fields:
        pharia.refuse_raw(fields)
    raise InvalidRequestError("`texts` (Cohere) or `inputs` (text-embeddings-inference) is missing", "inputs")
