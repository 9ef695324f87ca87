"""Pharia's, Cohere's and text-embeddings-inference's routes, as their clients see them."""

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer

from deployments.api.encoding import convert, truncate
from deployments.http.routes import SPEAK_BYTES
from tests.app.conftest import NAMES, LocalHandle, expected


async def post(client: httpx.AsyncClient, path: str, **fields: Any) -> Any:
    """Return the answer to a request that must succeed."""
    response = await client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(client: httpx.AsyncClient, path: str, **fields: Any) -> tuple[int, str, str | None]:
    """Return status, code and param of a request that must fail."""
    response = await client.post(path, json=fields)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def same(vectors: Any, right: np.ndarray) -> bool:
    """Whether lists of numbers hold the same float32 vectors."""
    return np.array_equal(np.array(vectors, np.float32), right)


# --- Pharia --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "Hello",
        [{"type": "text", "data": "Hello"}],
        [{"type": "text", "data": "He", "controls": []}, {"type": "text", "data": "llo"}],
    ],
)
async def test_a_prompt_is_a_string_or_items(client: httpx.AsyncClient, prompt: Any) -> None:
    """Items of text are joined; the answer has the fields that clients read."""
    answer = await post(client, "/semantic_embed", model="a", prompt=prompt, representation="symmetric")
    assert same(answer.pop("embedding"), expected(["Hello"])[0])
    assert answer == {"model_version": "1", "num_tokens_prompt_total": 5}


async def test_a_representation_is_one_of_the_models_prompts(client: httpx.AsyncClient) -> None:
    """`query` is; a model without a prompt for it gets the text as it is."""
    body = {"prompt": "x", "normalize": True, "hosting": "aleph-alpha", "control_log_additive": True}
    for model, representation, text in [
        ("a", "query", "find: x"),
        ("a", "document", "x"),
        ("b", "query", "x"),
    ]:
        answer = await post(
            client, "/semantic_embed?nice=true", model=model, representation=representation, **body
        )
        assert same(answer["embedding"], expected([text])[0])


async def test_token_ids_of_a_prompt_are_the_models_own(client: httpx.AsyncClient) -> None:
    """Even where OpenAI's clients send cl100k's: these come from our own /tokenize."""
    for model in ("a", "foreign"):
        ids = (await post(client, "/tokenize", model=model, prompt="abc", tokens=False, token_ids=True))[
            "token_ids"
        ]
        prompt = [{"type": "token_ids", "data": ids[:2]}, {"type": "token_ids", "data": ids[2:]}]
        answer = await post(client, "/semantic_embed", model=model, prompt=prompt, representation="symmetric")
        assert same(answer["embedding"], expected(["abc"])[0])


async def test_no_prompt_is_put_before_token_ids(client: httpx.AsyncClient) -> None:
    """Where the model has one for what is asked for; it would be another vector than that of the text."""
    body = {"prompt": [{"type": "token_ids", "data": [87]}], "representation": "query"}
    response = await client.post("/semantic_embed", json={"model": "a", **body})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "a prompt can't be put before token ids; send text"
    await post(client, "/semantic_embed", model="b", **body)  # has none


async def test_a_batch_keeps_its_order(client: httpx.AsyncClient) -> None:
    """A hundred prompts, and not one more."""
    prompts = [f"text {number}" for number in range(100)]
    body: dict[str, Any] = {"model": "a", "representation": "document"}
    answer = await post(client, "/batch_semantic_embed", prompts=prompts, **body)
    assert same(answer["embeddings"], expected(prompts))
    assert answer["num_tokens_prompt_total"] == sum(map(len, prompts))
    answer = await refused(client, "/batch_semantic_embed", prompts=[*prompts, "x"], **body)
    assert answer == (400, "too_many_inputs", "prompts")


async def test_compressing_takes_the_first_128_dimensions(client: httpx.AsyncClient) -> None:
    """Where the worker file allows them."""
    body = {"prompt": "x", "representation": "symmetric", "compress_to_size": 128}
    answer = await post(client, "/semantic_embed", model="wide", **body)
    assert np.allclose(answer["embedding"], truncate(expected(["x"], 256), 128)[0], atol=1e-6)
    assert await refused(client, "/semantic_embed", model="a", **body) == (
        400,
        "invalid_request",
        "compress_to_size",
    )


async def test_an_instruction_takes_its_place_in_the_prompt(client: httpx.AsyncClient) -> None:
    """In the prompt `instruction`, or in one written as the E5 and Qwen3 families do it."""
    body = {"input": "x", "instruction": "Find greetings"}
    answer = await post(client, "/instructable_embed", model="wide", **body)
    assert same(answer["embedding"], expected(["Find greetings -> x"], 256)[0])
    answer = await post(client, "/instructable_embed", model="instruct", **body)
    assert same(answer["embedding"], expected(["Instruct: Find greetings\nQuery: x"])[0])
    answer = await refused(client, "/instructable_embed", model="a", **body)
    assert answer == (400, "MISSING_CAPABILITY", "instruction")


IMAGE = [{"type": "image", "data": ""}]
MIXED = [{"type": "text", "data": "x"}, {"type": "token_ids", "data": [1]}]
CONTROLLED = [{"type": "text", "data": "x", "controls": [{"start": 0, "length": 1, "factor": 2.0}]}]


@pytest.mark.parametrize(
    ("path", "fields", "code", "param"),
    [
        ("/semantic_embed", {"prompt": IMAGE}, "MISSING_CAPABILITY", "prompt"),
        ("/semantic_embed", {"prompt": MIXED}, "MISSING_CAPABILITY", "prompt"),
        ("/semantic_embed", {"prompt": CONTROLLED}, "MISSING_CAPABILITY", "prompt"),
        (
            "/semantic_embed",
            {"prompt": "x", "contextual_control_threshold": 0.5},
            "MISSING_CAPABILITY",
            "contextual_control_threshold",
        ),
        ("/semantic_embed", {"prompt": "x", "tags": ["eu"]}, "MISSING_CAPABILITY", "tags"),
        ("/batch_semantic_embed", {"prompts": ["x", MIXED[1:]]}, "MISSING_CAPABILITY", "prompts"),
        ("/embed", {"prompt": "x", "layers": [-1], "pooling": ["mean"]}, "MISSING_CAPABILITY", "layers"),
        ("/semantic_embed", {}, "invalid_request", "prompt"),
        ("/semantic_embed", {"prompt": ""}, "invalid_request", "prompt"),
        ("/semantic_embed", {"prompt": []}, "invalid_request", "prompt"),
        ("/semantic_embed", {"prompt": [{"type": "text", "data": ""}]}, "invalid_request", "prompt"),
        ("/semantic_embed", {"prompt": ["x"]}, "invalid_request", "prompt"),
        ("/semantic_embed", {"prompt": "x", "representation": "other"}, "invalid_request", "representation"),
        ("/semantic_embed", {"prompt": "x", "representation": None}, "invalid_request", "representation"),
        ("/semantic_embed", {"prompt": "x", "compress_to_size": 64}, "invalid_request", "compress_to_size"),
        ("/semantic_embed", {"prompt": "x", "normalize": "yes"}, "invalid_request", "normalize"),
        ("/semantic_embed", {"prompt": "x", "model": None}, "invalid_request", "model"),
        ("/batch_semantic_embed", {"prompts": []}, "invalid_request", "prompts"),
        ("/instructable_embed", {"input": "x"}, "invalid_request", "instruction"),
        ("/tokenize", {"prompt": 1, "tokens": True, "token_ids": True}, "invalid_request", "prompt"),
        ("/tokenize", {"prompt": "x", "tokens": True}, "invalid_request", "token_ids"),
        ("/detokenize", {"token_ids": [256]}, "invalid_request", "token_ids"),
        ("/detokenize", {}, "invalid_request", "token_ids"),
        ("/embed", {}, "invalid_request", "inputs"),
        ("/embed", {"inputs": [1, "x"]}, "invalid_request", "inputs"),
        ("/embed", {"inputs": "x", "truncation_direction": "Up"}, "invalid_request", "truncation_direction"),
        ("/v2/embed", {"input_type": "search_query"}, "invalid_request", "texts"),
        (
            "/v2/embed",
            {"texts": ["x"], "input_type": "search_query", "embedding_types": ["int4"]},
            "invalid_request",
            "embedding_types",
        ),
        ("/v2/embed", {"images": ["x"], "input_type": "image"}, "MISSING_CAPABILITY", "images"),
        ("/v2/embed", {"texts": ["x"], "input_type": "made-up"}, "MISSING_CAPABILITY", "input_type"),
    ],
)
async def test_what_is_refused_names_its_field(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], code: str, param: str
) -> None:
    """400 in every dialect, never 5xx."""
    representation = {"representation": "query"} if "semantic" in path else {}
    assert await refused(client, path, **({"model": "a"} | representation | fields)) == (400, code, param)


async def test_tokens_are_those_that_the_model_reads(client: httpx.AsyncClient) -> None:
    """And back again; a client asks for one list or both."""
    body = {"model": "a", "prompt": "héllo"}
    answer = await post(client, "/tokenize", tokens=True, token_ids=True, **body)
    assert len(answer["tokens"]) == len(answer["token_ids"]) == 6
    assert set(await post(client, "/tokenize", tokens=True, token_ids=False, **body)) == {"tokens"}
    text = await post(client, "/detokenize", model="a", token_ids=answer["token_ids"])
    assert text == {"result": "héllo"}
    assert await post(client, "/detokenize", model="a", token_ids=[]) == {"result": ""}
    raw = (await client.get("/models/a/tokenizer")).text
    assert Tokenizer.from_str(raw).encode("héllo").ids == answer["token_ids"]
    assert (await client.get("/models/nope/tokenizer")).status_code == 404


async def test_listings_say_which_models_can_answer(
    client: httpx.AsyncClient, handles: dict[str, LocalHandle]
) -> None:
    """Now: one whose replica is gone is unavailable."""
    from ray.exceptions import ActorDiedError

    for path in ("/model-settings", "/models_available"):
        listed = {model["name"]: model for model in (await client.get(path)).json()}
        assert sorted(listed) == NAMES
        assert {model["status"] for model in listed.values()} == {"available"}
        assert listed["a"]["max_context_size"] == 512
        kinds = {name: listed[name]["embedding_type"] for name in ("a", "mute", "wide", "instruct")}
        assert kinds == {
            "a": "semantic",
            "mute": "none",
            "wide": "instructable",
            "instruct": "instructable",
        }
    handles["b"].failures = [ActorDiedError()] * 20
    listed = {model["name"]: model["status"] for model in (await client.get("/model-settings")).json()}
    assert listed["b"] == "unavailable"
    assert listed["a"] == "available"


async def test_tags_choose_among_the_models(client: httpx.AsyncClient) -> None:
    """Where no model is named; without tags there are several."""
    body = {"prompt": "x", "representation": "symmetric"}
    answer = await post(client, "/semantic_embed", tags=["eu"], **body)
    assert same(answer["embedding"], expected(["x"])[0])
    assert (await refused(client, "/semantic_embed", tags=["us"], **body))[1:] == (
        "MISSING_CAPABILITY",
        "tags",
    )


# --- Cohere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v2/embed", "/embed", "http://cluster/v2/embed"])
async def test_cohere_gets_every_type_it_asks_for(client: httpx.AsyncClient, path: str) -> None:
    """Floats, bytes, bits and base64 of the same vectors; texts, and exact usage."""
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = await post(
        client, path, model="a", texts=["x", "y"], input_type="search_query", embedding_types=types
    )
    vectors = expected(["find: x", "find: y"])
    got = answer["embeddings"]
    assert list(got) == types
    assert same(got["float"], vectors)
    for kind in ("int8", "uint8", "binary", "ubinary"):
        assert np.array_equal(got[kind], convert(vectors, kind))
    assert [np.frombuffer(base64.b64decode(row), "<f4").tolist() for row in got["base64"]] == vectors.tolist()
    assert answer["texts"] == ["x", "y"]
    assert answer["meta"]["billed_units"] == answer["meta"]["tokens"] == {"input_tokens": 14}
    assert answer["response_type"] == "embeddings_by_type"


async def test_cohere_cuts_unless_told_not_to(client: httpx.AsyncClient) -> None:
    """At the end by default, as its API does, and the answer says so."""
    body: dict[str, Any] = {"model": "a", "input_type": "clustering", "texts": ["x", "a" * 300 + "b" * 300]}
    answer = await post(client, "/v2/embed", **body)
    assert same(answer["embeddings"]["float"], expected(["x", "a" * 300 + "b" * 212]))
    assert answer["meta"]["warnings"] == ["texts were truncated: 1"]
    answer = await post(client, "/v2/embed", truncate="START", **body)
    assert same(answer["embeddings"]["float"], expected(["x", "a" * 212 + "b" * 300]))
    assert (await refused(client, "/v2/embed", truncate="NONE", **body))[1] == "context_length_exceeded"


async def test_cohere_inputs_of_several_parts(client: httpx.AsyncClient) -> None:
    """Their texts are joined; `output_dimension` is `dimensions`."""
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    answer = await post(
        client,
        "/embed",
        model="a",
        inputs=[{"content": parts}],
        input_type="classification",
        output_dimension=8,
    )
    assert np.allclose(answer["embeddings"]["float"], truncate(expected(["Hello"]), 8), atol=1e-6)


# --- text-embeddings-inference -------------------------------------------------------------------


async def test_tei_gets_a_bare_list(client: httpx.AsyncClient) -> None:
    """Of one text, several, or token ids; with a prompt, fewer dimensions, or cut."""
    assert same(await post(client, "/embed", model="a", inputs="x"), expected(["x"]))
    assert same(await post(client, "/embed", model="a", inputs=["x", "y"]), expected(["x", "y"]))
    assert same(await post(client, "/embed", model="a", inputs=[[1, 2], [3]]), _of([[1, 2], [3]]))
    got = await post(client, "/embed", model="a", inputs="x", prompt_name="query", dimensions=4)
    assert np.allclose(got, truncate(expected(["find: x"]), 4), atol=1e-6)
    long = "a" * 300 + "b" * 300
    got = await post(client, "/embed", model="a", inputs=long, truncate=True, truncation_direction="Left")
    assert same(got, expected([long[-512:]]))
    for side, kept in (({"truncation_direction": "Left"}, long[-512:]), ({}, long[:512])):
        got = await post(client, "/embed", model="texts", inputs=long, **side)  # which cuts by itself
        assert same(got, expected([kept], 64))
    answer = await refused(client, "/embed", model="texts", inputs=long, truncate=False)
    assert answer == (400, "context_length_exceeded", "inputs")


async def test_tei_has_no_name_for_the_model(client: httpx.AsyncClient) -> None:
    """It must be given where there are several, and the message says which."""
    response = await client.post("/embed", json={"inputs": "x"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "model")
    assert "`a`, `b`" in error["message"]
    assert same(await post(client, "/embed", inputs="x", tags=["eu"]), expected(["x"]))


def _of(ids: list[list[int]]) -> np.ndarray:
    from deployments.engine.batch import TokenBatch
    from deployments.engine.fake import fake_vectors

    return fake_vectors(TokenBatch.of(ids), 16)


# --- documentation -------------------------------------------------------------------------------


async def test_every_route_is_documented_with_examples(client: httpx.AsyncClient) -> None:
    """Answers and errors; every reference resolves."""
    document = (await client.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            for status, response in operation["responses"].items():
                kinds = dict(response["content"])
                raw = kinds.pop("application/octet-stream", None)
                assert (raw is not None) == (status == "200" and path.removeprefix("/v1") in SPEAK_BYTES)
                assert raw is None or raw["example"], path
                (content,) = kinds.values()
                assert content.get("example") is not None or content["examples"], (path, status)
            if "requestBody" in operation:
                assert operation["requestBody"]["content"]["application/json"]["examples"], path
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for part in text.split('"$ref": "')[1:]:
        reference = part.partition('"')[0]
        assert reference.removeprefix("#/components/schemas/") in schemas, reference


async def test_the_documentation_page_asks_no_other_host(client: httpx.AsyncClient) -> None:
    """Its parts come from here, whatever Host the client made up."""
    page = await client.get("/docs", headers={"host": "evil.example"})
    assert "://" not in page.text
    assert "//" not in page.text.replace("</", "")
    assert "evil" not in page.text
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
        assert f"docs/{name}" in page.text
        assert (await client.get(f"/docs/{name}")).status_code == 200
    assert (await client.get("/docs/index.html")).status_code == 404
