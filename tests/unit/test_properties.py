"""Properties, by hypothesis: parsers against a reference, base64 to the bit, order after a split."""

import asyncio
import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deployments.api import fields, openai, pharia, tei, vllm
from deployments.api.fields import read_object
from deployments.api.request import EmbeddingResult
from deployments.dispatch.work import Input, Lane, Pending, split
from deployments.errors import EmbeddingError, InvalidRequestError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
TEXTS = st.text(min_size=0, max_size=8)
IDS = st.lists(st.integers(-1, 300) | st.booleans(), max_size=4)
INPUTS = JSON | TEXTS | st.lists(TEXTS, max_size=4) | IDS | st.lists(IDS, max_size=4)
FIELDS = (
    *("model", "input", "inputs", "texts", "prompt", "prompts", "layers", "instruction", "representation"),
    *("input_type", "dimensions", "encoding_format", "embed_dtype", "truncate", "normalize", "tags"),
    *("compress_to_size", "embedding_types", "user", "tokens", "token_ids", "truncate_prompt_tokens"),
)


def reference(value: Any) -> tuple[list[str], list[list[int]]] | None:
    """What OpenAI's document says of `input`, as plainly as it can be written; None where it is refused."""

    def is_text(each: Any) -> bool:
        return isinstance(each, str) and each != ""

    def are_ids(each: Any) -> bool:
        # JSON's numbers have no bound; ours are of 64 bits, which no vocabulary comes near.
        return isinstance(each, list) and each != [] and all(type(i) is int and 0 <= i < 2**64 for i in each)

    if is_text(value):
        return [value], []
    if are_ids(value):
        return [], [value]
    if isinstance(value, list) and value:
        if all(map(is_text, value)):
            return value, []
        if all(map(are_ids, value)):
            return [], value
    return None


@given(INPUTS)
@example([2**64])
@example([10**400])
@settings(max_examples=400, deadline=None)
def test_input_is_read_as_the_reference_reads_it(value: Any) -> None:
    """Or refused by its field, and nothing else is raised."""
    try:
        body = json.dumps({"model": "m", "input": value}).encode()
        request = openai.parse_fields(read_object(body))
    except InvalidRequestError as error:
        assert reference(json.loads(body)["input"]) is None
        assert error.param in ("input", "body")
        return
    assert (list(request.texts), [list(ids) for ids in request.token_ids]) == reference(value)


@given(
    st.dictionaries(
        st.sampled_from(FIELDS),
        INPUTS,
    )
    | JSON
)
@settings(max_examples=300, deadline=None)
def test_no_body_breaks_a_parser(fields: Any) -> None:
    """Each reads a request out of it or refuses it as 400."""
    body = json.dumps(fields).encode()
    for parse in (
        openai.parse_fields,
        tei.parse_any,
        pharia.parse_semantic,
        pharia.parse_batch,
        pharia.parse_instructable,
        vllm.parse_tokenize,
        vllm.parse_detokenize,
        vllm.parse_pooling,
        vllm.parse_invocation,
        tei.parse_similarity,
        tei.parse_decode,
    ):
        try:
            parse(read_object(body))
        except EmbeddingError as error:
            assert error.status == 400
            assert error.param


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_no_bytes_break_the_parser(body: bytes) -> None:
    """JSON or not: what isn't a request is refused by field."""
    try:
        request = openai.parse_fields(read_object(body))
    except InvalidRequestError as error:
        assert error.status == 400
        assert error.param
    else:
        assert request.texts or request.token_ids


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@settings(deadline=None)
def test_both_formats_give_back_every_bit(numbers: list[float]) -> None:
    """Of every finite float32: zeros with a sign, the smallest and the largest among them."""
    vectors = np.array([numbers, numbers[::-1]], np.float32)
    for encoding_format in ("float", "base64"):
        request = openai.OpenAIRequest(encoding_format=encoding_format)
        data = json.loads(request.answer(EmbeddingResult(vectors, "m", 1)))["data"]
        for row, item in zip(vectors, data, strict=True):
            value = item["embedding"]
            got = np.frombuffer(base64.b64decode(value), "<f4") if isinstance(value, str) else value
            assert np.array(got, np.float32).tobytes() == row.tobytes()


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    st.integers(1, 5000),
    st.integers(1, 5),
    st.randoms(),
)
@settings(deadline=None)
def test_what_is_split_comes_back_in_order(
    lengths: list[int], part_tokens: int, replicas: int, random: Any
) -> None:
    """Whatever the lengths, the number of replicas, and the order in which parts are done."""

    async def run() -> None:
        job = Pending(len(lengths), asyncio.get_running_loop().create_future())
        inputs = [
            Input(b"", np.full(length, row, np.int32), Lane.BULK, [(job, row)])
            for row, length in enumerate(lengths)
        ]
        parts = split(inputs, part_tokens, replicas)
        assert [each for part in parts for each in part] == inputs
        assert all(parts)
        random.shuffle(parts)
        for part in parts:
            for each in part:
                job.deliver(each.waiters[0][1], each.ids[:1].astype(np.float32))
        assert (await job.future)[:, 0].tolist() == list(range(len(lengths)))

    asyncio.run(run())


def begins(value: Any) -> int:
    """Return how many values begin after another one or in something that opens."""
    if isinstance(value, dict):
        value = [*value.values()]
    if not isinstance(value, list):
        return 0
    return 1 + max(0, len(value) - 1) + sum(map(begins, value))


ODD = st.text('a,[{"\\ é', max_size=8)
ODD_JSON = st.recursive(
    st.none() | st.integers(-99, 99) | ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD, inner, max_size=4),
    max_leaves=20,
)


@given(ODD_JSON, st.integers(1, 9), st.integers(0, 9))
def test_values_are_counted_without_being_made(value: Any, piece: int, few: int) -> None:
    """Whatever stands in texts, and wherever the body is cut in pieces; whether or not they are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fields, "PIECE_BYTES", piece)
        body = json.dumps(value, ensure_ascii=False).encode()
        assert fields.count_values(body) == 1 + begins(value)
        assert (fields.count_values(body, few) > few) == (1 + begins(value) > few)
