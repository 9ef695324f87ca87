"""OpenAI's wire format: what is read out of a body, what is refused, what an answer looks like."""

import base64
import json

import numpy as np
import pytest

from deployments.api import openai
from deployments.api.encoding import EncodingFormat, error_body, truncate
from deployments.api.fields import read_object
from deployments.api.request import EmbeddingResult
from deployments.errors import InvalidRequestError, QueueFullError


def body(**fields: object) -> bytes:
    """Return a JSON body."""
    return json.dumps({"model": "m", **fields}).encode()


@pytest.mark.parametrize(
    ("value", "texts", "token_ids"),
    [
        ("one", ["one"], ()),
        (["one", "two"], ["one", "two"], ()),
        ([1, 2], (), [[1, 2]]),
        ([[1], [2, 3]], (), [[1], [2, 3]]),
    ],
)
def test_the_four_shapes_of_input(value: object, texts: object, token_ids: object) -> None:
    """A string, strings, token ids, lists of token ids."""
    request = openai.parse_fields(read_object(body(input=value)))
    assert (request.texts, request.token_ids) == (texts, token_ids)


def test_null_means_absent() -> None:
    """Clients send null for what they don't set."""
    fields = read_object(body(input="a", encoding_format=None, dimensions=None, user=None))
    request = openai.parse_fields(fields)
    assert request.encoding_format == "float"
    assert request.dimensions is None


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"{", "body"),
        (b"[]", "body"),
        (b'{"model": "m", "input": NaN}', "body"),
        (b'{"model": "m", "input": "\\ud800"}', "body"),
        (b'{"model": "m", "input": "\xff"}', "body"),
        (body(input=[]), "input"),
        (body(input=""), "input"),
        (body(input=["a", ""]), "input"),
        (body(input=[[]]), "input"),
        (body(input=[True]), "input"),
        (body(input=[-1]), "input"),
        (body(input=[1.5]), "input"),
        (body(input=["a", 1]), "input"),
        (body(input=[1, "a"]), "input"),
        (body(input=[[1], "a"]), "input"),
        (body(input=[[1], 2]), "input"),
        (body(input={"text": "a"}), "input"),
        (body(), "input"),
        (body(input="a", model=7), "model"),
        (body(input="a", encoding_format="int8"), "encoding_format"),
        (body(input="a", dimensions=0), "dimensions"),
        (body(input="a", dimensions=True), "dimensions"),
    ],
)
def test_what_is_refused_names_its_field(raw: bytes, param: str) -> None:
    """`param` is the field at fault, and the message holds nothing of the input."""
    with pytest.raises(InvalidRequestError) as caught:
        openai.parse_fields(read_object(raw))
    assert caught.value.param == param


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_an_answer_holds_every_bit(encoding_format: EncodingFormat) -> None:
    """Both formats give back the same float32 numbers, in order, and exact usage."""
    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    request = openai.OpenAIRequest(encoding_format=encoding_format)
    answer = json.loads(request.answer(EmbeddingResult(vectors, 'na"me', 17)))
    assert "truncated" not in answer
    assert answer["model"] == 'na"me'
    assert answer["usage"] == {"prompt_tokens": 17, "total_tokens": 17, "completion_tokens": 0}
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    for row, item in zip(vectors, answer["data"], strict=True):
        value = item["embedding"]
        numbers = np.frombuffer(base64.b64decode(value), "<f4") if encoding_format == "base64" else value
        assert np.array_equal(np.asarray(numbers, np.float32), row)


def test_shorter_vectors_have_unit_length() -> None:
    """Truncating without normalising again would break cosine similarity by dot product."""
    vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]], np.float32)
    assert np.allclose(truncate(vectors, 2), [[0.6, 0.8], [0.0, 0.0]])
    assert truncate(vectors, 3) is vectors


def test_the_error_body_is_read_by_both_kinds_of_client() -> None:
    """OpenAI's inner code and Pharia's outer one."""
    shown = json.loads(error_body(QueueFullError("full", "model", 2.0)))
    assert shown == {
        "error": {"message": "full", "type": "unavailable_error", "param": "model", "code": "queue_full"},
        "code": "queue_full",
    }
