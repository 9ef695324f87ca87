"""What would change a vector is done, or refused by its name: in every dialect, whoever made the field up."""

import dataclasses
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.api import cohere, known, openai, tei
from deployments.api.pharia import schema
from deployments.engine import ModelCard
from deployments.engine.fake import FakeEngine
from deployments.engine.tokenizer import TextTokenizer
from tests.app.conftest import expected

# A body of each route that holds what it must.
BODIES: dict[str, dict[str, Any]] = {
    "/embeddings": {"input": "x"},
    "/v2/embed": {"texts": ["x"], "input_type": "clustering"},
    "/embed": {"inputs": "x"},
    "/semantic_embed": {"prompt": "x", "representation": "symmetric"},
    "/batch_semantic_embed": {"prompts": ["x"], "representation": "symmetric"},
    "/instructable_embed": {"input": "x", "instruction": "Find x"},
}
MODELS = dict.fromkeys(BODIES, "a") | {"/instructable_embed": "wide"}


async def refusal(client: httpx.AsyncClient, path: str, **fields: Any) -> str:
    """Return the message of a request that must be refused by a field's name."""
    response = await client.post(path, json={"model": MODELS[path], **BODIES[path], **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] in fields
    message: str = error["message"]
    return message


async def vectors(client: httpx.AsyncClient, **fields: Any) -> np.ndarray:
    """Return what OpenAI's route answers."""
    response = await client.post("/embeddings", json={"model": "a", **fields})
    assert response.status_code == 200, response.text
    return np.array([each["embedding"] for each in response.json()["data"]], np.float32)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", ["pooling", "instruct", "prefix", "late_chunking", "extra_body", "é" * 200])
async def test_a_field_that_nobody_knows_is_refused_by_its_name(
    client: httpx.AsyncClient, path: str, name: str
) -> None:
    """Null counts as absent, as everywhere."""
    message = await refusal_of(client, path, name)
    if name == "late_chunking":
        assert message == "`late_chunking`: no model here chunks late"
    else:
        shown = name if len(name) <= 64 else "é" * 64 + "…"
        assert message.startswith(f"`{shown}` isn't known here, and may change the vectors")
    body = {"model": MODELS[path], **BODIES[path], name: None}
    assert (await client.post(path, json=body)).status_code == 200


async def refusal_of(client: httpx.AsyncClient, path: str, name: str) -> str:
    """Return the message for a field of that name, whatever it holds."""
    found = set()
    values: list[Any] = [True, 0, "", "x", [], {}]
    for value in values:
        response = await client.post(path, json={"model": MODELS[path], **BODIES[path], name: value})
        assert response.status_code == 400, response.text
        found.add(response.json()["error"]["message"])
    (message,) = found
    return str(message)


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"use_activation": True, "normalize": False}, "normalize", "use_activation` and `normalize"),
        ({"normalize": False, "normalized": True}, "normalized", "normalize` and `normalized"),
        ({"truncate": "END", "truncation_side": "left"}, "truncate", "truncation_side` and `truncate"),
        ({"truncate": "START", "truncation_side": "right"}, "truncate", "truncation_side` and `truncate"),
        ({"input_type": "query", "prompt_name": "query"}, "prompt_name", None),
    ],
)
async def test_fields_that_differ_are_refused(
    client: httpx.AsyncClient, fields: Any, param: str, told: str | None
) -> None:
    """None of two fields for one thing is ignored; what agrees is taken."""
    response = await client.post("/embeddings", json={"model": "a", "input": "x", **fields})
    error = response.json()["error"]
    said = (
        f"`{told}` ask for different things" if told else "send `input_type` or `prompt_name`, and not both"
    )
    assert (response.status_code, error["param"], error["message"]) == (400, param, said)
    for same in (
        {"normalize": True, "use_activation": True},
        {"truncate": "END", "truncation_side": "right"},
    ):
        assert len(await vectors(client, input="x", **same)) == 1


async def test_options_of_hosted_endpoints_hold_nothing_else(client: httpx.AsyncClient) -> None:
    """LiteLLM puts all that it was given there."""
    body = {"model": "a", "inputs": "x", "options": {"wait_for_model": True, "use_cache": False}}
    assert (await client.post("/embed", json=body)).status_code == 200
    for path in ("/embed", "/embed_all"):
        response = await client.post(path, json={**body, "options": {"normalize": False}})
        assert response.status_code == 400
        told = "`normalize` isn't known here, and may change the vectors"
        assert response.json()["error"]["message"] == told


async def test_a_slip_of_the_pen_is_told(client: httpx.AsyncClient) -> None:
    """`dimension` would give vectors of another size than was meant."""
    assert await refusal(client, "/embeddings", dimension=8) == (
        "`dimension` isn't known here, and may change the vectors; did you mean `dimensions`?"
    )
    assert await refusal(client, "/v2/embed", output_dimensions=8) == (
        "`output_dimensions` isn't known here, and may change the vectors; did you mean `output_dimension`?"
    )


async def test_what_changes_no_vector_is_set_aside(client: httpx.AsyncClient) -> None:
    """Who asks, how it is paid for, found again, cached: with any value, in every dialect."""
    for path, body in BODIES.items():
        aside = dict.fromkeys(known.ASIDE, "x") | {"metadata": {"a": 1}, "priority": 3, "store": False}
        response = await client.post(path, json={"model": MODELS[path], **body, **aside})
        assert response.status_code == 200, response.text


async def test_special_tokens_may_be_left_out(client: httpx.AsyncClient, monkeypatch: Any) -> None:
    """Of every text, cut ones too, which then have room for more of it."""
    await vectors(client, input="x")  # the replica's start reads texts of its own
    asked = []
    encode = TextTokenizer.encode

    def watch(self: TextTokenizer, texts: list[str], special: bool = True) -> list[list[int]]:
        asked.append(special)
        return encode(self, texts, special)

    monkeypatch.setattr(TextTokenizer, "encode", watch)
    for given, special in ((None, True), (True, True), (False, False)):
        asked.clear()
        got = await vectors(client, input="x", add_special_tokens=given)
        assert asked == [special]
        assert np.array_equal(got, expected(["x"]))  # the stand-in's tokenizer has no special tokens
    message = await refusal(client, "/embeddings", add_special_tokens="no")
    assert message == "`add_special_tokens` must be true or false"


@pytest.mark.parametrize("name", ["use_activation", "normalize", "normalized"])
async def test_numbers_before_unit_length_are_given_or_refused(
    client: httpx.AsyncClient, monkeypatch: Any, name: str
) -> None:
    """By a model whose vectors have it, refused; by another one, given; and true makes it."""
    message = await refusal(client, "/embeddings", **{name: False})
    assert message == "the model's vectors have unit length"
    assert np.array_equal(await vectors(client, input="x", **{name: True}), expected(["x"]))
    start, compute = FakeEngine.start, FakeEngine._vectors

    def plain(self: FakeEngine) -> ModelCard:
        return dataclasses.replace(start(self), normalizes=False)

    monkeypatch.setattr(FakeEngine, "start", plain)
    monkeypatch.setattr(FakeEngine, "_vectors", lambda self, batch: 3 * compute(self, batch))
    right = expected(["x"])
    got = await vectors(client, model="b", input="x", **{name: False})
    assert np.array_equal(got, 3 * right)
    assert np.array_equal(await vectors(client, model="b", input="x"), 3 * right)
    assert np.allclose(await vectors(client, model="b", input="x", **{name: True}), right, atol=1e-6)


async def test_tei_is_refused_numbers_before_unit_length(client: httpx.AsyncClient) -> None:
    """Its `normalize: false` was answered with the same vectors as without."""
    assert await refusal(client, "/embed", normalize=False) == "the model's vectors have unit length"


async def test_padding_is_refused(client: httpx.AsyncClient) -> None:
    """It would change the vectors of a model without an attention mask; no padding is what all do."""
    assert await refusal(client, "/embeddings", padding="max_length") == (
        "`padding` must be one of `do_not_pad`"
    )
    assert np.array_equal(await vectors(client, input="x", padding="do_not_pad"), expected(["x"]))


async def test_nothing_is_cut_where_the_request_says_so(client: httpx.AsyncClient) -> None:
    """`truncate: NONE` beside a length refuses longer texts, by NVIDIA's names and by Cohere's."""
    right = {"/embeddings": ("truncate_prompt_tokens", "input"), "/v2/embed": ("max_tokens", "texts")}
    for path, (length, field) in right.items():
        body = {"model": "a", **BODIES[path], "truncate": "NONE", length: 3}
        body[field] = ["abcd"]
        response = await client.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == f"`{field}[0]` has 4 tokens, and the model takes 3"
        body[field] = ["abc"]
        assert (await client.post(path, json=body)).status_code == 200
    assert np.array_equal(
        await vectors(client, input="x" * 500 + "y" * 100, truncate="START"),
        expected(["x" * 412 + "y" * 100]),
    )


async def test_more_tokens_than_the_model_takes_are_no_length_to_cut_to(client: httpx.AsyncClient) -> None:
    """As in vLLM; -1 is as many as it takes."""
    assert await refusal(client, "/embeddings", truncate_prompt_tokens=513) == (
        "`truncate_prompt_tokens` can't be 513; the model takes 512"
    )
    assert np.array_equal(await vectors(client, input="x", truncate_prompt_tokens=512), expected(["x"]))


@pytest.mark.parametrize(
    "body",
    [
        openai.EmbeddingRequestBody,
        cohere.CohereBody,
        tei.TeiBody,
        schema.SemanticBody,
        schema.BatchSemanticBody,
        schema.InstructableBody,
    ],
)
def test_what_is_read_is_not_set_aside(body: type[known.DialectBody]) -> None:
    """Else the document would describe a field that means nothing, or leave one out that does."""
    assert not body.model_fields.keys() & body.aside
