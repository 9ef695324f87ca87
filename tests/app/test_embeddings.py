"""`POST /embeddings` and its neighbours, as a client sees them."""

import asyncio
import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from deployments.api.encoding import truncate
from deployments.batches.storage import Storage
from deployments.engine.batch import TokenBatch
from deployments.errors import EngineCrashError, EngineDeadError, EngineError
from tests.app.conftest import MAX_BODY_BYTES, NAMES, LocalHandle, expected


async def embed(client: httpx.AsyncClient, **fields: Any) -> np.ndarray:
    """Return the vectors of a request that must succeed."""
    response = await client.post("/embeddings", json={"model": "a", **fields})
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], np.float32)


async def refuse(client: httpx.AsyncClient, status: int, code: str, **fields: Any) -> dict[str, Any]:
    """Return the error of a request that must fail, after one that must succeed."""
    response = await client.post("/embeddings", json={"model": "a", **fields})
    shown = response.json()
    assert (response.status_code, shown["code"]) == (status, code), shown
    assert shown["error"]["code"] == code
    await embed(client, input="the next request is served")
    error: dict[str, Any] = shown["error"]
    return error


async def test_texts_come_back_in_order(client: httpx.AsyncClient) -> None:
    """Each vector is the one of its text, bit for bit."""
    texts = [f"text {number}" * (number % 7 + 1) for number in range(200)]
    assert np.array_equal(await embed(client, input=texts), expected(texts))


async def test_usage_counts_every_token(client: httpx.AsyncClient) -> None:
    """The fake tokenizer makes one token of a byte."""
    response = await client.post("/embeddings", json={"model": "a", "input": ["abc", "de"]})
    assert response.json()["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}
    assert response.json()["model"] == "a"


async def test_both_prefixes_serve_the_same(client: httpx.AsyncClient) -> None:
    """Clients are configured with and without /v1."""
    for path in ("/v1/models", "/models"):
        response = await client.get(f"http://cluster{path}")
        assert [model["id"] for model in response.json()["data"]] == NAMES
    assert (await client.get("/models/b")).json()["id"] == "b"


async def test_a_prompt_is_put_before_each_text(client: httpx.AsyncClient) -> None:
    """By either name of the field; token ids can't have one, and unknown prompts are refused."""
    with_prompt = expected(["find: x"])
    assert np.array_equal(await embed(client, input="x", input_type="query"), with_prompt)
    assert np.array_equal(await embed(client, input="x", prompt_name="query"), with_prompt)
    error = await refuse(client, 400, "MISSING_CAPABILITY", input="x", input_type="passage")
    assert "it has query" in error["message"]
    await refuse(client, 400, "invalid_request", input=[1], input_type="query")


async def test_dimensions_cut_and_normalise(client: httpx.AsyncClient) -> None:
    """Only to the sizes that the worker file allows."""
    got = await embed(client, input="x", dimensions=4)
    assert np.allclose(got, truncate(expected(["x"]), 4), atol=1e-6)
    error = await refuse(client, 400, "invalid_request", input="x", dimensions=5)
    assert error["param"] == "dimensions"
    assert "4, 8, 16" in error["message"]


async def test_truncation_keeps_the_start_where_the_end_is_dropped(client: httpx.AsyncClient) -> None:
    """The model `texts` cuts what is too long; a request can ask for less."""
    text = "abcdefgh" * 100
    got = await embed(client, model="texts", input=text)
    assert np.array_equal(got, expected([text[:512]], 64))
    got = await embed(client, model="texts", input=text, truncate_prompt_tokens=3)
    assert np.array_equal(got, expected(["abc"], 64))


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "nope", "input": "x"}, 404, "model_not_found", "model"),
        ({"model": "mute", "input": "x"}, 400, "MISSING_CAPABILITY", "model"),
        ({"model": "texts", "input": [1]}, 400, "MISSING_CAPABILITY", "input"),
        ({"input": [256]}, 400, "invalid_request", "input"),
        ({"input": [2**40]}, 400, "invalid_request", "input"),
        ({"input": "x" * 513}, 400, "context_length_exceeded", "input"),
        ({"input": [1] * 513}, 400, "context_length_exceeded", "input"),
        ({"input": ["x"] * 2049}, 400, "too_many_inputs", "input"),
        ({"model": "b", "input": ["x"] * 4}, 400, "too_many_inputs", "input"),
        ({"model": "b", "input": ["x" * 50, "x" * 51]}, 400, "context_length_exceeded", "input"),
        ({"model": "slow", "input": "x"}, 408, "deadline_exceeded", None),
    ],
)
async def test_what_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    """The contract's status, code and field; the next request is served."""
    if status == 408:  # what the model is must be known, or it would be 503
        assert (await client.post("/embeddings", json=fields)).status_code in (408, 503)
    error = await refuse(client, status, code, **fields)
    assert error["param"] == param


async def test_an_unknown_model_is_told_which_there_are(client: httpx.AsyncClient) -> None:
    """A typo shows at once."""
    error = await refuse(client, 404, "model_not_found", model="A", input="x")
    assert ", ".join(f"`{name}`" for name in NAMES) in error["message"]


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_isnt_read_whole(client: httpx.AsyncClient, declared: bool) -> None:
    """Neither when its length is declared nor when it comes in chunks."""
    read = 0

    async def chunks() -> Any:
        nonlocal read
        for _ in range(100):
            read += MAX_BODY_BYTES // 10
            yield b" " * (MAX_BODY_BYTES // 10)

    content: Any = b" " * (MAX_BODY_BYTES + 1) if declared else chunks()
    response = await client.post("/embeddings", content=content)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    assert read <= 2 * MAX_BODY_BYTES


async def test_paths_and_methods_that_dont_exist_answer_json(client: httpx.AsyncClient) -> None:
    """Starlette's own refusals have the envelope too."""
    response = await client.get("/nope")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    response = await client.get("/embeddings")
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "failures",
    [
        [ActorDiedError()],
        [EngineCrashError("gone")],
        [ActorUnavailableError("gone", None)] * 2,
        [EngineDeadError("gone")] * 2,
        [EngineDeadError("gone"), ActorDiedError()],
    ],
)
async def test_a_call_is_repeated_when_its_replica_dies(
    client: httpx.AsyncClient, handles: dict[str, LocalHandle], failures: list[Exception]
) -> None:
    """The client sees the right answer and nothing else."""
    await embed(client, input="x")
    handles["a"].failures = failures.copy()
    assert np.array_equal(await embed(client, input="x"), expected(["x"]))
    assert not handles["a"].failures


async def test_a_request_that_two_replicas_died_of_ends_no_third(
    client: httpx.AsyncClient, handles: dict[str, LocalHandle]
) -> None:
    """Nor do clients bring it again, which they do with every other 500."""
    await embed(client, input="x")
    handles["a"].failures = [ActorDiedError()] * 3
    response = await client.post("/embeddings", json={"model": "a", "input": "x"})
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert response.headers["x-should-retry"] == "false"
    assert len(handles["a"].failures) == 1


async def test_a_text_whose_token_the_model_hasnt_is_refused_by_field(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer knows more tokens than the model has weights for; in every dialect, the others served."""
    monkeypatch.setattr("deployments.engine.fake.VOCAB_SIZE", 200)
    for path, body, field in (
        ("/embeddings", {"input": ["x", "x y"]}, "input"),
        ("/semantic_embed", {"prompt": "x y", "representation": "query"}, "prompt"),
        ("/v2/embed", {"texts": ["x y"], "input_type": "search_query"}, "texts"),
        ("/embed", {"inputs": ["x y"]}, "inputs"),
    ):
        response = await client.post(path, json={"model": "a", **body})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, field), path
        assert "holds a token id beyond the vocabulary of 200" in error["message"]
    assert np.array_equal(await embed(client, input="x"), expected(["x"]))


async def test_a_model_without_replicas_answers_503(
    client: httpx.AsyncClient, handles: dict[str, LocalHandle]
) -> None:
    """With Retry-After, while the other models are served."""
    handles["slow"].failures = [ActorDiedError()] * 20
    response = await client.post("/embeddings", json={"model": "slow", "input": "x"})
    assert (response.status_code, response.json()["code"]) == (503, "model_unavailable")
    assert int(response.headers["retry-after"]) >= 1
    await embed(client, input="x")


async def test_ready_tells_each_model(client: httpx.AsyncClient, handles: dict[str, LocalHandle]) -> None:
    """503 as long as one of them can't answer, and which one it is."""
    response = await client.get("/ready")
    assert response.status_code == 200, response.text
    handles["b"].failures = [ActorDiedError()] * 20
    response = await client.get("/ready")
    assert response.status_code == 503
    states = {state["deployment"]: state["ready"] for state in response.json()["models"]}
    assert states == dict.fromkeys(NAMES, True) | {"b": False}
    handles["b"].failures = [RuntimeError("secret")]
    (state,) = [each for each in (await client.get("/ready")).json()["models"] if not each["ready"]]
    assert (state["deployment"], state["reason"]) == ("b", "its replicas fail")


async def test_an_internal_error_shows_nothing(
    client: httpx.AsyncClient, handles: dict[str, LocalHandle], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither to the client nor in the log stands what the client sent."""
    handles["a"].failures = [RuntimeError("the input was: secret text")]
    response = await client.post("/embeddings", json={"model": "a", "input": "secret text"})
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


async def test_a_storage_that_hangs_slows_nobody(client: httpx.AsyncClient) -> None:
    """It takes all the threads that it may have; large texts are tokenised on others."""
    gate = threading.Event()
    hanging = [asyncio.ensure_future(Storage("memory://hangs")._do(gate.wait)) for _ in range(50)]
    try:
        texts = [f"{number} ".ljust(500, "x") for number in range(100)]
        assert np.array_equal(await embed(client, input=texts), expected(texts))
    finally:
        gate.set()
        await asyncio.gather(*hanging)


async def test_a_text_of_many_characters_is_refused_before_it_is_tokenised(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much of it would be cut; many texts are tokenised some at a time, and are what they were."""
    monkeypatch.setattr("deployments.dispatch.prepare.GROUP_CHARACTERS", 1000)
    monkeypatch.setattr("deployments.dispatch.prepare.CHARACTERS_PER_TOKEN", 2)
    body = {"model": "texts", "input": ["x", "y" * 1025]}
    response = await client.post("/embeddings", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["message"]) == (
        400,
        "context_length_exceeded",
        "`input[1]` has 1025 characters, and a text may have 1024",
    )
    texts = [f"{number} ".ljust(300 + number, "x") for number in range(40)]
    assert np.array_equal(await embed(client, input=texts), expected(texts))
    texts[33] = "z" * 600
    answer = (await client.post("/embeddings", json={"model": "texts", "input": texts})).json()
    assert answer["truncated"] == [33]
    assert answer["usage"]["prompt_tokens"] == sum(min(len(text), 512) for text in texts)


async def test_requests_at_once_dont_mix(client: httpx.AsyncClient) -> None:
    """A hundred clients of two models of the same shape."""

    async def one(number: int) -> None:
        text = f"request {number}"
        got = await embed(client, model="ab"[number % 2], input=[text])
        assert np.array_equal(got, expected([text]))

    await asyncio.gather(*(one(number) for number in range(100)))


async def test_the_openapi_document_shows_request_and_errors(client: httpx.AsyncClient) -> None:
    """Every status of the contract stands at the route."""
    document = (await client.get("http://cluster/openapi.json")).json()
    post = document["paths"]["/v1/embeddings"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    for each, inputs in zip(schema["anyOf"], ("input", "messages"), strict=True):
        body = document["components"]["schemas"][each["$ref"].rpartition("/")[2]]
        assert {"model", inputs, "encoding_format", "dimensions"} <= set(body["properties"])
    assert {"200", "400", "404", "408", "413", "500", "503"} <= set(post["responses"])
    assert (await client.get("/docs")).status_code == 200
    assert (await client.get("/openapi.json")).json() == document
    assert json.loads((await client.get("/health")).text) == {"status": "ok"}
    assert (await client.get("/version")).text.split(".")[0] == "1"


async def test_sizes_beyond_the_model_are_not_promised(client: httpx.AsyncClient) -> None:
    """A worker file may list more than its model has."""
    error = await refuse(client, 400, "invalid_request", model="texts", input="x", dimensions=100_000)
    assert error["message"].endswith("this model gives 64")


async def test_a_wrong_prompt_is_blamed_on_the_field_that_named_it(client: httpx.AsyncClient) -> None:
    """There are two names for it."""
    error = await refuse(client, 400, "MISSING_CAPABILITY", input="x", prompt_name="nope")
    assert error["param"] == "prompt_name"


async def test_a_client_may_lower_its_deadline(client: httpx.AsyncClient) -> None:
    """By Ray Serve's header; zero and nonsense don't count."""
    body = {"model": "patient", "input": "x"}
    headers = {"x-request-timeout-seconds": "0.05"}
    await client.post("/embeddings", json=body)
    response = await client.post("/embeddings", json=body, headers=headers)
    assert (response.status_code, response.json()["code"]) == (408, "deadline_exceeded")
    for value in ("0", "-1", "soon"):
        headers = {"x-request-timeout-seconds": value}
        assert (await client.post("/embeddings", json=body, headers=headers)).status_code == 200


async def test_a_busy_engine_is_healthy_and_a_hanging_one_isnt(
    monkeypatch: pytest.MonkeyPatch, handles: dict[str, LocalHandle]
) -> None:
    """The canary waits in line; only when nothing at all was answered it speaks of an illness."""
    monkeypatch.setattr("deployments.replica.replica.CANARY_SECONDS", 0.45)
    await handles["patient"].describe.remote()
    replica = handles["patient"]._replica
    work = [asyncio.ensure_future(replica.embed(TokenBatch.of([[number]]))) for number in range(5)]
    await asyncio.sleep(0)
    await replica.check_health()
    await asyncio.gather(*work)
    monkeypatch.setattr(replica._engine, "_running", asyncio.get_running_loop().create_future())
    with pytest.raises(EngineError, match="the engine has made no step"):
        await replica.check_health()
