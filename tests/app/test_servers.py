"""vLLM's server, text-embeddings-inference's and Cohere's first client, beyond the plain call."""

import base64
import json
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.api import openai
from deployments.api.encoding import convert
from deployments.dispatch import prepare
from deployments.engine.batch import TokenBatch
from deployments.engine.fake import FakeEngine, fake_vectors
from deployments.errors import InvalidRequestError
from deployments.http.app import make_app
from tests.app.conftest import LocalHandle, expected, make_serving
from tests.harness.fake import TOKENIZER


async def answer(client: httpx.AsyncClient, path: str, **fields: Any) -> Any:
    """Return the answer to a request that must succeed."""
    response = await client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(client: httpx.AsyncClient, path: str, **fields: Any) -> tuple[str, str | None, str]:
    """Return code, param and message of a request that must be refused as 400."""
    response = await client.post(path, json=fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["code"], error["param"], error["message"]


def same(vectors: Any, texts: list[str]) -> bool:
    """Whether lists of numbers are the vectors of texts, to the bit."""
    return np.array_equal(np.array(vectors, np.float32), expected(texts))


@pytest.fixture
async def alone(handles: dict[str, LocalHandle]) -> Any:
    """A client of a server with one model, as the others' servers have."""
    app = make_app(make_serving({"a": handles["a"]}), list)  # type: ignore[arg-type]
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://cluster"
    ) as client:
        yield client


# --- vLLM -----------------------------------------------------------------------------------------


async def test_an_answer_has_an_id_and_a_time(client: httpx.AsyncClient) -> None:
    """Another id each time."""
    first, second = [await answer(client, "/embeddings", model="a", input="x") for _ in range(2)]
    assert first["id"].startswith("embd-")
    assert len(first["id"]) == len("embd-") + 32
    assert first["id"] != second["id"]
    assert isinstance(first["created"], int)
    assert first["usage"] == {"prompt_tokens": 1, "total_tokens": 1, "completion_tokens": 0}


async def test_a_model_need_not_be_named_where_it_is_alone(alone: Any, client: httpx.AsyncClient) -> None:
    """In every dialect; where there are several, the refusal names them."""
    assert (await answer(alone, "/v1/embeddings", input="x"))["model"] == "a"
    assert same((await answer(alone, "/v2/embed", texts=["x"]))["embeddings"]["float"], ["x"])
    assert (await answer(alone, "/tokenize", prompt="x"))["count"] == 1
    for path, field in (("/v1/embeddings", "input"), ("/embed", "inputs"), ("/tokenize", "prompt")):
        await answer(alone, path, **{field: "x", "model": ""})  # as gateways write it
    code, param, message = await refused(client, "/embeddings", input="x")
    assert (code, param) == ("invalid_request", "model")
    assert message.startswith("`model` must name one of `a`, `b`, ")


@pytest.mark.parametrize("endianness", ["native", "little", "big"])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", "f4"), ("float16", "f2"), ("bfloat16", "u2"), ("fp8_e4m3", "u1")]
)
async def test_bytes_hold_what_their_metadata_says(
    client: httpx.AsyncClient, dtype: Any, kind: str, endianness: str
) -> None:
    """One item for each input: where it stands, its shape, type and order; `bytes_only` go without."""
    body = {"model": "a", "input": ["x", "y"], "embed_dtype": dtype, "endianness": endianness}
    right = convert(expected(["x", "y"]), dtype)
    order = ">" if endianness == "big" else "<"
    encoded = await answer(client, "/embeddings", encoding_format="base64", **body)
    for each, row in zip(encoded["data"], right, strict=True):
        assert np.array_equal(np.frombuffer(base64.b64decode(each["embedding"]), order + kind), row)
    response = await client.post("/embeddings", json=body | {"encoding_format": "bytes"})
    assert response.headers["content-type"] == "application/octet-stream"
    metadata = json.loads(response.headers["metadata"])
    assert list(metadata) == ["id", "created", "model", "data", "usage"]
    assert metadata["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    for index, (item, row) in enumerate(zip(metadata["data"], right, strict=True)):
        found = np.frombuffer(response.content[item["start"] : item["end"]], order + kind)
        assert np.array_equal(found.reshape(item["shape"]), row)
        assert (item["index"], item["embed_dtype"], item["endianness"]) == (index, dtype, endianness)
    bare = await client.post("/embeddings", json=body | {"encoding_format": "bytes_only"})
    assert bare.content == response.content
    assert "metadata" not in bare.headers


async def test_metadata_that_no_header_holds_is_refused(client: httpx.AsyncClient) -> None:
    """And the refusal says what to ask for."""
    texts = [str(number) for number in range(1000)]
    code, param, message = await refused(
        client, "/embeddings", model="a", input=texts, encoding_format="bytes"
    )
    assert (code, param) == ("invalid_request", "encoding_format")
    assert message == "the metadata of 1000 vectors has no place in a header; ask for `bytes_only`"


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_eight_bits_are_those_of_torch(dtype: Any) -> None:
    """Of every float16 there is, and of what lies halfway between two numbers."""
    import torch

    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    limit = 448 if dtype == "fp8_e4m3" else 57344
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) <= limit)][None]
    kind = torch.float8_e4m3fn if dtype == "fp8_e4m3" else torch.float8_e5m2
    right = torch.from_numpy(numbers).to(kind).view(torch.uint8).numpy()
    assert np.array_equal(convert(numbers, dtype), right)


async def test_tokens_in_vllms_form(client: httpx.AsyncClient) -> None:
    """Beside Pharia's, which says what it wants; and back."""
    ids = TOKENIZER.encode(["héllo"])[0]
    asked = await answer(client, "/tokenize", model="a", prompt="héllo")
    assert asked == {"count": 6, "max_model_len": 512, "tokens": ids, "token_strs": None}
    shown = await answer(client, "/tokenize", model="a", prompt="héllo", return_token_strs=True)
    assert shown["token_strs"] == TOKENIZER.read("héllo").tokens
    assert (await answer(client, "/tokenize", model="a", prompt=""))["count"] == 0
    plain = await answer(client, "/tokenize", model="a", prompt="héllo", add_special_tokens=False)
    assert plain["tokens"] == ids
    assert await answer(client, "/detokenize", model="a", tokens=ids) == {"prompt": "héllo"}
    assert await answer(client, "/detokenize", model="a", tokens=[]) == {"prompt": ""}
    assert await refused(client, "/detokenize", model="a", tokens=[256]) == (
        "invalid_request",
        "tokens",
        "`tokens` holds an id beyond the vocabulary of 256",
    )


async def test_pooling_gives_one_vector_for_each_input(client: httpx.AsyncClient) -> None:
    """Under vLLM's names; by tokens no engine here gives any."""
    for task in (None, "embed"):
        got = await answer(client, "/pooling", model="a", input=["x", "y"], task=task)
        assert same([each["data"] for each in got["data"]], ["x", "y"])
        assert {each["object"] for each in got["data"]} == {"pooling"}
        assert got["id"].startswith("pooling-")
    others: list[Any] = ["token_embed", "token_classify", "classify", 3]
    for other in others:
        assert await refused(client, "/pooling", model="a", input="x", task=other) == (
            "MISSING_CAPABILITY",
            "task",
            "no model here has another task than `embed`",
        )
    assert await refused(client, "/pooling", model="a", input="x", dimensions=4) == (
        "invalid_request",
        "dimensions",
        "`dimensions` isn't taken here; /embeddings takes it",
    )


async def test_an_invocation_is_answered_as_the_route_that_its_body_fits(client: httpx.AsyncClient) -> None:
    """OpenAI's, TEI's, Cohere's; and a ping by either method, without a key."""
    got = await answer(client, "/invocations", model="a", input="x")
    assert same([got["data"][0]["embedding"]], ["x"])
    assert same(await answer(client, "/invocations", model="a", inputs="x"), ["x"])
    assert same((await answer(client, "/invocations", model="a", texts=["x"]))["embeddings"], ["x"])
    assert (await refused(client, "/invocations", model="a", prompt="x"))[0] == "MISSING_CAPABILITY"
    got = await answer(client, "/invocations", model="a", input="x", task="embed")
    assert same([got["data"][0]["embedding"]], ["x"])
    told = "no model here has another task than `embed`"
    assert (await refused(client, "/invocations", model="a", input="x", task="score"))[1:] == ("task", told)
    for method in ("GET", "POST", "HEAD"):
        response = await client.request(method, "http://cluster/ping")
        assert (response.status_code, response.content) == (200, b"")


def test_a_batch_holds_no_bytes() -> None:
    """Its answers are lines of JSON."""
    with pytest.raises(InvalidRequestError) as caught:
        openai.parse_fields({"input": "x", "encoding_format": "bytes"}, openai.JSON_FORMATS)
    assert caught.value.message == "`encoding_format` must be one of `float`, `base64`"


# --- gateways -------------------------------------------------------------------------------------


async def test_numbers_and_nothings_as_gateways_write_them(client: httpx.AsyncClient) -> None:
    """384, 384.0 and "384" are one number in OpenAI's dialect; an empty text there is an absent one."""
    right = await answer(client, "/embeddings", model="a", input="x", dimensions=8)
    for written in (8.0, "8"):
        got = await answer(client, "/embeddings", model="a", input="x", dimensions=written)
        assert got["data"] == right["data"]
    for written in ("8.5", "", " 8", "08", 8.5, 0, "0", True, -8.0, 1e300, "٨"):
        assert await refused(client, "/embeddings", model="a", input="x", dimensions=written) == (
            "invalid_request",
            "dimensions",
            "`dimensions` must be a positive integer",
        )
    got = await answer(
        client, "/embeddings", model="a", input="x", encoding_format="", user="", input_type=""
    )
    assert same([got["data"][0]["embedding"]], ["x"])
    assert await refused(client, "/embeddings", model="a", input="x", encoding_format="hex") == (
        "invalid_request",
        "encoding_format",
        "`encoding_format` must be one of `float`, `base64`, `bytes`, `bytes_only`",
    )
    for path, name, field in (("/v2/embed", "output_dimension", "texts"), ("/embed", "dimensions", "inputs")):
        assert (await refused(client, path, **{"model": "a", field: ["x"], name: "8"}))[1] == name


@pytest.mark.parametrize("kind", ["passage", "query", "search_document", "clustering"])
async def test_a_use_that_gateways_always_name_is_nothing_to_a_model_without_prompts(
    client: httpx.AsyncClient, kind: str
) -> None:
    """It changes no vector there; a name that nobody uses is refused; a model with prompts refuses both."""
    got = await answer(client, "/embeddings", model="b", input="x", input_type=kind)
    assert same([got["data"][0]["embedding"]], ["x"])
    got = await answer(client, "/embeddings", model="b", input=[120], input_type=kind)
    assert got["usage"]["prompt_tokens"] == 1
    assert await refused(client, "/embeddings", model="b", input="x", input_type="made-up") == (
        "MISSING_CAPABILITY",
        "input_type",
        "the model has no prompt of that name; it has none",
    )
    if kind != "query":
        assert await refused(client, "/embeddings", model="a", input="x", input_type=kind) == (
            "MISSING_CAPABILITY",
            "input_type",
            "the model has no prompt of that name; it has query",
        )


async def test_a_use_is_found_under_the_name_that_the_model_has(client: httpx.AsyncClient) -> None:
    """Cohere's and NVIDIA's `search_query` is what the model calls `query`."""
    got = await answer(client, "/embeddings", model="a", input="x", input_type="search_query")
    assert same([got["data"][0]["embedding"]], ["find: x"])


async def test_texts_and_token_ids_are_not_mixed(client: httpx.AsyncClient) -> None:
    """And the refusal says so, rather than that one of them isn't the other."""
    for path, field in (("/embed", "inputs"), ("/embeddings", "input"), ("/pooling", "input")):
        for mixed in (["x", [1]], [[1], "x"]):
            told = (field, f"`{field}` can't hold both texts and token ids")
            assert (await refused(client, path, model="a", **{field: mixed}))[1:] == told


async def test_no_type_is_coheres_own(client: httpx.AsyncClient) -> None:
    """Where the list of them is empty, as in vLLM's server."""
    got = await answer(client, "/v2/embed", model="a", texts=["x"], embedding_types=[])
    assert same(got["embeddings"]["float"], ["x"])


async def test_azures_address_names_the_model(client: httpx.AsyncClient) -> None:
    """Over that in the body."""
    path = "http://cluster/openai/deployments/a/embeddings?api-version=2024-10-21"
    for body in ({}, {"model": "b"}):
        got = await answer(client, path, input="x", **body)
        assert got["model"] == "a"
        assert same([got["data"][0]["embedding"]], ["x"])
    response = await client.post(path.replace("/a/", "/nope/"), json={"input": "x"})
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")


# --- Cohere's first version -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/embed", "http://cluster/embed"])
async def test_coheres_first_client_gets_a_bare_list(client: httpx.AsyncClient, path: str) -> None:
    """With no use named, or one; by type only where types are named."""
    for use, text in ((None, "x"), ("search_query", "find: x")):
        got = await answer(client, path, model="a", texts=["x"], input_type=use)
        assert same(got["embeddings"], [text])
        assert (got["response_type"], got["meta"]["api_version"]) == ("embeddings_floats", {"version": "1"})
        assert got["texts"] == ["x"]
    got = await answer(client, path, model="a", texts=["x"], embedding_types=["float", "ubinary"])
    assert list(got["embeddings"]) == ["float", "ubinary"]
    assert got["response_type"] == "embeddings_by_type"
    second = await answer(client, "/v2/embed", model="a", texts=["x"])
    assert (second["response_type"], second["meta"]["api_version"]) == (
        "embeddings_by_type",
        {"version": "2"},
    )


# --- text-embeddings-inference --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["http://cluster/", "http://cluster/v1/"])
async def test_tei_embeds_at_the_root(client: httpx.AsyncClient, path: str) -> None:
    """As `POST /embed` does."""
    assert same(await answer(client, path, model="a", inputs=["x", "y"]), ["x", "y"])


async def test_tei_tells_of_its_model(alone: Any, client: httpx.AsyncClient) -> None:
    """Where there is one; else the query names it."""
    told = (await alone.get("/info")).json()
    assert {name: told[name] for name in ("model_id", "max_input_length", "max_client_batch_size")} == {
        "model_id": "a",
        "max_input_length": 512,
        "max_client_batch_size": 2048,
    }
    assert told["auto_truncate"] is False
    assert set(told["model_type"]) == {"embedding"}
    told = (await client.get("/info?model=texts")).json()
    assert (told["model_id"], told["auto_truncate"]) == ("texts", True)
    assert (await client.get("/info")).status_code == 400
    assert (await client.get("/info?model=nope")).status_code == 404


async def test_tei_tokens_say_where_they_stand(client: httpx.AsyncClient) -> None:
    """In characters of each text, its prompt included; and back."""
    ids = TOKENIZER.encode(["xy"])[0]
    one = [
        {"id": ids[0], "text": "x", "special": False, "start": 0, "stop": 1},
        {"id": ids[1], "text": "y", "special": False, "start": 1, "stop": 2},
    ]
    assert await answer(client, "/tokenize", model="a", inputs="xy") == [one]
    assert await answer(client, "/tokenize", model="a", inputs=["xy", "xy"]) == [one, one]
    prompted = await answer(client, "/tokenize", model="a", inputs="xy", prompt_name="query")
    assert "".join(each["text"] for each in prompted[0]) == "find: xy"
    assert await answer(client, "/decode", model="a", ids=ids) == ["xy"]
    assert await answer(client, "/decode", model="a", ids=[ids, ids[:1]], skip_special_tokens=False) == [
        "xy",
        "x",
    ]
    assert await refused(client, "/decode", model="a", ids=[[1], [999]]) == (
        "invalid_request",
        "ids",
        "`ids` holds an id beyond the vocabulary of 256",
    )
    assert await refused(client, "/tokenize", model="b", inputs=["x"] * 4) == (
        "too_many_inputs",
        "inputs",
        "one request may hold 3 inputs",
    )


async def test_tei_compares_sentences(client: httpx.AsyncClient) -> None:
    """By cosine, with a prompt and cut where that is asked for."""
    inputs = {"source_sentence": "x", "sentences": ["x", "y"]}
    x, y = expected(["x", "y"])
    got = await answer(client, "/similarity", model="a", inputs=inputs)
    assert np.allclose(got, [1, x @ y], atol=1e-6)
    got = await answer(client, "/similarity", model="a", inputs=inputs, parameters={"prompt_name": "query"})
    x, y = expected(["find: x", "find: y"])
    assert np.allclose(got, [1, x @ y], atol=1e-6)
    assert await refused(client, "/similarity", model="a", inputs={"source_sentence": "x"}) == (
        "invalid_request",
        "sentences",
        "`sentences` must be a list",
    )
    wrong = await refused(client, "/similarity", model="a", inputs=inputs, parameters={"prompt": "x"})
    assert wrong[1] == "prompt"


async def test_tokens_have_vectors_of_their_own(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list for each input, in order, of ids too; more than an answer holds is refused."""
    texts = ["héllo", "x"]
    ids = TOKENIZER.encode(texts)
    right = [fake_vectors(TokenBatch.of([[each] for each in one]), 16) for one in ids]
    for inputs in (texts, ids):
        got = await answer(client, "/embed_all", model="a", inputs=inputs)
        for one, other in zip(got, right, strict=True):
            assert np.array_equal(np.array(one, np.float32), other)
    got = await answer(client, "/embed_all", model="a", inputs="x" * 600, truncate=True)
    assert [len(one) for one in got] == [512]
    monkeypatch.setattr(prepare, "MOST_NUMBERS", 16 * 100)
    assert await refused(client, "/embed_all", model="a", inputs=["x" * 50, "x" * 51]) == (
        "context_length_exceeded",
        "inputs",
        "101 tokens are more than the 100 of one such answer",
    )


async def test_what_gives_no_tokens_refuses_them(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, as sparse vectors are by all models."""
    assert await refused(client, "/embed_sparse", model="a", inputs="x") == (
        "MISSING_CAPABILITY",
        None,
        "no model here gives sparse vectors; /embed gives dense ones",
    )
    start = FakeEngine.start
    monkeypatch.setattr(FakeEngine, "start", lambda self: replace(start(self), token_dimension=0))
    assert await refused(client, "/embed_all", model="b", inputs="x") == (
        "MISSING_CAPABILITY",
        None,
        "the model gives no vectors of single tokens; /embed gives one for each input",
    )
