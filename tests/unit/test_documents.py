"""What the OpenAPI document says of a body is what its parser takes, and what it doesn't say is refused."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs
import pytest
from pydantic import BaseModel

from deployments.api import batches, cohere, embed, openai, pharia, tei
from deployments.errors import EmbeddingError

PARSERS: dict[type[BaseModel], Callable[[bytes], Any]] = {
    openai.EmbeddingRequestBody: openai.parse_request,
    pharia.SemanticBody: pharia.parse_semantic,
    pharia.BatchSemanticBody: pharia.parse_batch,
    pharia.InstructableBody: pharia.parse_instructable,
    pharia.TokenizeBody: pharia.parse_tokenize,
    pharia.DetokenizeBody: pharia.parse_detokenize,
    cohere.CohereBody: cohere.parse_request,
    tei.TeiBody: embed.parse_request,
    batches.BatchBody: batches.parse_create,
}
TEXT, IDS = {"type": "text", "data": "a"}, {"type": "token_ids", "data": [1]}
# Of every kind that JSON has, well and ill formed for one field or another.
VALUES: list[Any] = [
    *(None, "", "a", "1h", 0, 1, -1, -2, 128, 3600, 1.5, True, False, {}, {"a": "b"}, {"a": 1}, {"a": None}),
    *(
        [],
        ["a"],
        [""],
        ["a", "b"],
        ["a", 1],
        ["a"] * 101,
        [None],
        [True],
        [1],
        [-1],
        [1.5],
        [1, "a"],
        [1, [1]],
    ),
    *([1, [1]], [[1]], [[]], [[1], []], [["a"]], [[1], "a"], [[1], [True]], [{}]),
    *(
        [TEXT],
        [TEXT, TEXT],
        [IDS],
        [TEXT, IDS],
        [[TEXT], "a"],
        [[TEXT, IDS]],
        [{"type": "image", "data": "a"}],
    ),
    *([{"type": "text", "data": ""}], [{"type": "token_ids", "data": []}], [{"type": "text", "data": [1]}]),
    *([{"content": [{"type": "text", "text": "a"}]}], [{"content": []}], [{"content": "a"}]),
    *([{"content": [{"type": "text", "text": ""}]}], [{"content": [{"type": "image_url", "text": "a"}]}]),
    *({"anchor": "created_at", "seconds": 3600}, {"anchor": "created_at", "seconds": 1}, {"anchor": "a"}),
    *({"anchor": "created_at", "seconds": 3600.5}, {"a" * 64: "b" * 512}, {"a" * 65: "b"}, {"a": "b" * 513}),
    {str(n): "a" for n in range(17)},
]


def enumerated(schema: Any) -> Iterator[Any]:
    """Yield the values that a schema names, alone and in a list."""
    if isinstance(schema, dict):
        for value in [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]:
            yield from (value, [value])
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from enumerated(inner)


def bodies(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the example, one field of it changed, left out or added."""
    (example,) = schema["examples"]
    yield example
    values = [*VALUES, *enumerated(schema)]
    for name in schema["properties"]:
        yield {field: value for field, value in example.items() if field != name}
        for value in values:
            yield example | {name: value}


@pytest.mark.parametrize("model", list(PARSERS))
def test_a_parser_takes_what_its_document_says_and_nothing_else(model: type[BaseModel]) -> None:
    """Null counts as absent, as the document says too where a field may be absent."""
    schema = model.model_json_schema()
    validator = jsonschema_rs.validator_for(schema)
    differ = []
    for body in bodies(schema):
        try:
            PARSERS[model](json.dumps(body).encode())
            taken = True
        except EmbeddingError:
            taken = False
        if taken != validator.is_valid(body):
            differ.append((taken, body))
    assert differ == []
