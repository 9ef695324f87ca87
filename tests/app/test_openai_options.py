"""OpenAI's dialect beyond the plain call: truncation, other number formats, foreign token ids, tags."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.api.encoding import convert
from tests.app.conftest import expected


async def post(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """Return the answer to a request that must succeed."""
    response = await client.post("/embeddings", json={"model": "a", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def refused(client: httpx.AsyncClient, **fields: Any) -> tuple[int, str, str]:
    """Return status, code and param of a request that must fail."""
    response = await client.post("/embeddings", json={"model": "a", **fields})
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


async def test_the_answer_says_which_inputs_were_cut(client: httpx.AsyncClient) -> None:
    """By index, beside the usage, which counts what the model read; where none was, nothing is said."""
    answer = await post(client, input=["abcdef", "ab", "uvwxyz"], truncate_prompt_tokens=3)
    assert answer["truncated"] == [0, 2]
    assert answer["usage"] == {"prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0}
    assert "truncated" not in await post(client, input=["abc"], truncate_prompt_tokens=3)
    assert (await post(client, model="texts", input=["x", "y" * 600]))["truncated"] == [1]


async def test_a_request_says_which_side_is_cut(client: httpx.AsyncClient) -> None:
    """By vLLM's names; -1 is the model's own length, and without it too long stays too long."""
    long = "x" * 500 + "y" * 100
    answer = await post(client, input="abcdef", truncate_prompt_tokens=2, truncation_side="left")
    assert np.allclose(answer["data"][0]["embedding"], expected(["ef"])[0])
    answer = await post(client, input=long, truncate_prompt_tokens=-1, truncation_side="left")
    assert np.allclose(answer["data"][0]["embedding"], expected([long[-512:]])[0])
    assert (await refused(client, input=long, truncation_side="left"))[1] == "context_length_exceeded"
    # Of a model that cuts by itself it is the side that is asked for, and the model's own where none is.
    for side, kept in (({"truncation_side": "left"}, long[-512:]), ({}, long[:512])):
        answer = await post(client, model="texts", input=long, **side)
        assert answer["truncated"] == [0]
        assert np.allclose(answer["data"][0]["embedding"], expected([kept], 64)[0])
    assert await refused(client, input="x", truncate_prompt_tokens=-2) == (
        400,
        "invalid_request",
        "truncate_prompt_tokens",
    )


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [
        ("float32", "<f4"),
        ("float16", "<f2"),
        ("bfloat16", "<u2"),
        ("int8", "i1"),
        ("uint8", "u1"),
        ("binary", "i1"),
        ("ubinary", "u1"),
    ],
)
async def test_base64_holds_the_type_that_was_asked_for(
    client: httpx.AsyncClient, dtype: Any, numpy_dtype: str
) -> None:
    """Byte for byte what `convert` makes of the vector."""
    answer = await post(client, input=["x", "y"], encoding_format="base64", embed_dtype=dtype)
    right = convert(expected(["x", "y"]), dtype)
    for item, row in zip(answer["data"], right, strict=True):
        assert np.array_equal(np.frombuffer(base64.b64decode(item["embedding"]), numpy_dtype), row)


async def test_other_types_leave_float_lists_as_they_are(client: httpx.AsyncClient) -> None:
    """As in vLLM; and bits that fill no bytes are refused."""
    answer = await post(client, input="x", embed_dtype="float16")
    assert np.array_equal(np.array(answer["data"][0]["embedding"], np.float32), expected(["x"])[0])
    options = {"input": "x", "dimensions": 4, "encoding_format": "base64", "embed_dtype": "binary"}
    assert await refused(client, **options) == (400, "invalid_request", "embed_dtype")
    assert await refused(client, input="x", embed_dtype="fp8") == (400, "invalid_request", "embed_dtype")


async def test_cl100k_ids_are_read_as_the_text_that_they_were(client: httpx.AsyncClient) -> None:
    """With the model's prompt, if one is asked for; ids beyond the vocabulary are refused."""
    import tiktoken

    encoding = tiktoken.get_encoding("cl100k_base")
    texts = ["Hello world", "übergrößengeschäft 東京 🙂", "<|endoftext|>"]
    ids = [encoding.encode(text, disallowed_special=()) for text in texts]
    answer = await post(client, model="foreign", input=ids)
    got = np.array([item["embedding"] for item in answer["data"]], np.float32)
    assert np.array_equal(got, expected(texts))
    answer = await post(client, model="foreign", input=ids[0], input_type="query")
    assert np.allclose(answer["data"][0]["embedding"], expected(["find: Hello world"])[0])
    answer = await post(client, model="foreign", input=[[*ids[0], 100_257], [100_276]])
    got = np.array([item["embedding"] for item in answer["data"]], np.float32)
    assert np.array_equal(got, expected(["Hello world<|endoftext|>", "<|endofprompt|>"]))
    for beyond in (100_256, 100_261, 100_277, 2**40):
        assert await refused(client, model="foreign", input=[beyond]) == (400, "invalid_request", "input")


async def test_tags_must_all_be_the_workers(client: httpx.AsyncClient) -> None:
    """A worker that lacks one of them doesn't serve the request."""
    await post(client, model="foreign", input="x", tags=["eu", "fast"], hosting="aleph-alpha")
    await post(client, input="x", tags=[])
    status = 400, "MISSING_CAPABILITY", "tags"
    assert await refused(client, model="foreign", input="x", tags=["eu", "us"]) == status
    assert await refused(client, input="x", tags=["eu"]) == status
    assert await refused(client, input="x", tags="eu") == (400, "invalid_request", "tags")
