"""Pharia's dialect: semantic and instructable embeddings, tokenising, listings.

A prompt is a string, or items of text or token ids that are joined. What asks for a look into the model
(layers, attention control, images) is refused by name: vLLM can't do it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from deployments.api import fields as read
from deployments.api.encoding import json_rows
from deployments.api.pharia.schema import (
    MAX_PROMPTS,
    BatchSemanticBody,
    DetokenizeBody,
    InstructableBody,
    SemanticBody,
    TokenizeBody,
)
from deployments.api.request import EmbeddingRequest, EmbeddingResult, Prompt, Reader, TokensRequest
from deployments.errors import InvalidRequestError, MissingCapabilityError, TooManyInputsError

COMPRESSED_SIZE = 128
# Which of a model's prompts a representation means, under the names that models give them.
REPRESENTATIONS = {
    "symmetric": ("symmetric", "clustering", "STS"),
    "document": ("document", "passage", "search_document"),
    "query": ("query", "search_query"),
}


@dataclass(frozen=True, kw_only=True)
class PhariaRequest(EmbeddingRequest):
    """A body of `/semantic_embed`, `/batch_semantic_embed` or `/instructable_embed`."""

    batch: bool = False

    def answer(self, result: EmbeddingResult) -> bytes:
        """Return the vector, or for a batch the vectors, with the model's version and exact usage."""
        rows = json_rows(result.vectors)
        vectors = b'"embeddings":[%b]' % b",".join(rows) if self.batch else b'"embedding":%b' % rows[0]
        cut = b',"truncated":%b' % orjson.dumps(list(result.truncated)) if result.truncated else b""
        version = orjson.dumps(result.version)
        return b'{"model_version":%b,%b,"num_tokens_prompt_total":%d%b}' % (
            version,
            vectors,
            result.prompt_tokens,
            cut,
        )


def parse_semantic(fields: read.Fields) -> PhariaRequest:
    """Parse a body of `POST /semantic_embed`."""
    SemanticBody.check(fields)
    texts, ids = _read_prompt(fields.get("prompt"), "prompt", "prompt")
    return PhariaRequest(texts=texts, token_ids=ids, **_semantic(fields, "prompt"))


def parse_batch(fields: read.Fields) -> PhariaRequest:
    """Parse a body of `POST /batch_semantic_embed`."""
    BatchSemanticBody.check(fields)
    prompts = read.not_empty(fields.get("prompts"), "prompts")
    if len(prompts) > MAX_PROMPTS:
        raise TooManyInputsError(
            f"{len(prompts)} prompts are more than the {MAX_PROMPTS} of one request", "prompts"
        )
    found = [_read_prompt(prompt, f"prompts[{index}]", "prompts") for index, prompt in enumerate(prompts)]
    texts = [text for each, _ in found for text in each]
    ids = [tokens for _, each in found for tokens in each]
    if texts and ids:
        raise MissingCapabilityError("texts and token ids can't be mixed in one request", "prompts")
    return PhariaRequest(texts=texts, token_ids=ids, batch=True, **_semantic(fields, "prompts"))


def parse_instructable(fields: read.Fields) -> PhariaRequest:
    """Parse a body of `POST /instructable_embed`."""
    InstructableBody.check(fields)
    texts, ids = _read_prompt(fields.get("input"), "input", "input")
    instruction = read.required_string(fields, "instruction")
    return PhariaRequest(texts=texts, token_ids=ids, instruction=instruction, **_common(fields, "input"))


def refuse_raw(fields: Mapping[str, Any]) -> None:
    """Refuse a body of Pharia's `POST /embed`, which asks for the hidden states of layers."""
    field = "layers" if "layers" in fields else "prompt"
    raise MissingCapabilityError(
        "no model here gives the embeddings of its layers; use /semantic_embed", field
    )


def _common(fields: Mapping[str, Any], input_field: str) -> dict[str, Any]:
    """Return what every request may hold."""
    read.refuse(fields, "contextual_control_threshold")
    return {
        "model": read.model(fields),
        "input_field": input_field,
        "own_ids": True,  # they come from our own /tokenize
        "normalize": read.flag(fields, "normalize") or None,  # absent is false, by its API
        "tags": read.tags(fields),
    }


def _semantic(fields: Mapping[str, Any], input_field: str) -> dict[str, Any]:
    if "representation" not in fields:
        raise InvalidRequestError("`representation` is missing", "representation")
    representation = read.choice(fields, "representation", tuple(REPRESENTATIONS), "")
    size = read.positive(fields, "compress_to_size")
    if size not in (None, COMPRESSED_SIZE):
        raise InvalidRequestError(f"`compress_to_size` must be {COMPRESSED_SIZE}", "compress_to_size")
    return {
        **_common(fields, input_field),
        "prompt": Prompt(REPRESENTATIONS[representation], "representation", required=False),
        "dimensions": size,
        "dimensions_field": "compress_to_size",
    }


def _read_prompt(value: Any, name: str, param: str) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Return a prompt's one text, or its one list of token ids."""
    if isinstance(value, str):
        if not value:
            raise InvalidRequestError(f"`{name}` must not be empty", param)
        return [value], []
    if value is None:
        raise InvalidRequestError(f"`{name}` is missing", param)
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f"`{name}` must be a string or a list of items", param)
    items = [_read_item(item, f"{name}[{index}]", param) for index, item in enumerate(value)]
    texts = [item for item in items if isinstance(item, str)]
    ids = [token for item in items if isinstance(item, list) for token in item]
    if texts and ids:
        raise MissingCapabilityError(f"`{name}` mixes text and token ids", param)
    if ids:
        return [], [ids]
    if not (text := "".join(texts)):
        raise InvalidRequestError(f"`{name}` must not be empty", param)
    return [text], []


def _read_item(item: Any, name: str, param: str) -> str | list[int]:
    """Return an item's text or its token ids."""
    if not isinstance(item, dict):
        raise InvalidRequestError(f"`{name}` must be an item with `type` and `data`", param)
    if item.get("controls") not in (None, []):
        raise MissingCapabilityError(f"`{name}` asks for attention control", param)
    kind, data = item.get("type"), item.get("data")
    if kind == "text" and isinstance(data, str):
        return data
    if kind == "token_ids":
        return read.token_ids(data, f"{name}.data", param)
    if kind == "image":
        raise MissingCapabilityError("no model here reads images", param)
    raise InvalidRequestError(f"`{name}` must be of type `text` or `token_ids`, with fitting `data`", param)


# --- tokens ----------------------------------------------------------------------------------------


def parse_tokenize(fields: read.Fields) -> TokensRequest:
    """Parse the fields of a body of `POST /tokenize`, which says which of two lists are wanted."""
    TokenizeBody.check(fields)
    wanted = {name: read.flag(fields, name) for name in ("tokens", "token_ids")}
    for name, value in wanted.items():
        if value is None:
            raise InvalidRequestError(f"`{name}` is missing", name)

    def answer(texts: Sequence[str], reader: Reader, _: int) -> bytes:
        encoding = reader.read(texts[0])
        found = {"tokens": encoding.tokens, "token_ids": encoding.ids}
        return orjson.dumps({name: found[name] for name in wanted if wanted[name]})

    return TokensRequest(
        model=read.model(fields),
        texts=[read.text(fields, "prompt")],
        answer=answer,
        tags=read.tags(fields),
    )


def parse_detokenize(fields: read.Fields) -> TokensRequest:
    """Parse the fields of a body of `POST /detokenize`."""
    DetokenizeBody.check(fields)
    ids = [read.few_or_no_ids(fields, "token_ids")]
    return TokensRequest(
        model=read.model(fields),
        ids=ids,
        field="token_ids",
        answer=lambda _, reader, __: orjson.dumps({"result": reader.decode(ids[0])}),
        tags=read.tags(fields),
    )


# --- listings --------------------------------------------------------------------------------------


def model_settings(listing: Mapping[str, Any], available: bool, instructable: bool) -> dict[str, Any]:
    """Return a model's entry in `/model-settings` and `/models_available`, out of its entry in ours."""
    supported = listing["embedding_task"]["supported"]
    kind = ("instructable" if instructable else "semantic") if supported else "none"
    return {
        "name": listing["id"],
        "status": "available" if available else "unavailable",
        "worker_type": "vllm",
        "description": listing["description"],
        "multimodal": False,
        "max_context_size": listing["max_model_len"],
        "maximum_completion_tokens": listing["maximum_completion_tokens"],
        "semantic_embedding": supported,
        "completion_type": "none",
        "embedding_type": kind,
        "chat": False,
        "prompt_template": None,
    }
