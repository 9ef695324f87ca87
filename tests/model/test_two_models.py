"""Two real models behind one address: clients, routing, accuracy in the default dtype, bad input."""

import asyncio
import json
import subprocess
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from aleph_alpha_client import Client, EmbeddingV2Request
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from tests.harness import checkpoints
from tests.harness.collector import Collector, covered
from tests.harness.prometheus import names
from tests.harness.server import Server, wait_for
from tests.model.conftest import MINILM, cosines, encode

pytestmark = pytest.mark.model
MODEL = MINILM
TEXT = "Input text to be embedded"


@pytest.fixture
def client(two_models: Server) -> openai.OpenAI:
    """The official SDK."""
    return openai.OpenAI(base_url=f"{two_models.url}/v1", api_key="unused")


def vectors_of(response: Any) -> np.ndarray:
    """Return an SDK answer's vectors."""
    return np.array([item.embedding for item in response.data], np.float32)


def token_ids(text: str) -> list[int]:
    """Return MiniLM's ids of a text, special tokens included."""
    tokenizer = Tokenizer.from_file(str(checkpoints.minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def test_openai_sdk_gets_the_same_vector_every_way(client: openai.OpenAI) -> None:
    """Base64 by default, floats, a list, token ids."""
    default = client.embeddings.create(model=MODEL, input=TEXT)
    expected = vectors_of(default)
    assert expected.shape == (1, 384)
    assert default.model == MODEL
    assert default.usage.prompt_tokens == len(token_ids(TEXT))
    floats = client.embeddings.create(model=MODEL, input=TEXT, encoding_format="float", user="someone")
    assert np.array_equal(vectors_of(floats), expected)
    several = client.embeddings.create(model=MODEL, input=[TEXT, "another", TEXT])
    assert vectors_of(several).shape == (3, 384)
    assert cosines(vectors_of(several)[[0, 2]], np.repeat(expected, 2, 0)).min() > 0.9999
    ids = client.embeddings.create(model=MODEL, input=token_ids(TEXT))
    assert cosines(vectors_of(ids), expected).min() > 0.9999
    lists = client.embeddings.create(model=MODEL, input=[token_ids(TEXT), token_ids("another")])
    assert cosines(vectors_of(lists), vectors_of(several)[:2]).min() > 0.9999


def test_openai_sdk_lists_models_and_reads_errors(client: openai.OpenAI) -> None:
    """Typed errors with code, param and the request's id."""
    assert [model.id for model in client.models.list()] == [MODEL, "sre"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="nope", input=TEXT)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.request_id


def test_aleph_alpha_client_runs_the_published_snippet(two_models: Server, client: openai.OpenAI) -> None:
    """The host with /v1, as published."""
    pharia = Client(host=f"{two_models.url}/v1", token="unused")
    request = EmbeddingV2Request(input=TEXT, encoding_format="float")
    response = pharia.embeddings(request=request, model=MODEL)
    expected = vectors_of(client.embeddings.create(model=MODEL, input=TEXT))
    assert np.array_equal(np.array([response.data[0].embedding], np.float32), expected)
    assert response.usage.prompt_tokens == len(token_ids(TEXT))


def test_curl_runs_the_published_command(two_models: Server) -> None:
    """The published body, with our model's name."""
    body = json.dumps({"input": TEXT, "encoding_format": "float", "model": MODEL})
    command = ["curl", "-sS", f"{two_models.url}/v1/embeddings", "-H", "Authorization: Bearer x"]
    command += ["-H", "Content-Type: application/json", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert len(answer["data"][0]["embedding"]) == 384


def test_a_request_id_is_taken_or_made_and_returned_once(two_models: Server) -> None:
    """In the answer's header, also of an error."""
    mine = {"x-request-id": "mine-1"}
    for body, status in (({"model": MODEL, "input": "x"}, 200), ({"model": MODEL}, 400)):
        taken = httpx.post(f"{two_models.url}/v1/embeddings", json=body, headers=mine, timeout=60)
        assert taken.status_code == status
        assert taken.headers.get_list("x-request-id") == ["mine-1"]
        made = httpx.post(f"{two_models.url}/v1/embeddings", json=body, timeout=60)
        assert len(made.headers.get_list("x-request-id")) == 1


async def test_five_hundred_interleaved_requests_reach_the_right_model(
    two_models: Server, sentences: list[str]
) -> None:
    """A misrouted request would show in the vector, since both models have one shape."""
    texts = (sentences * 2)[:250]
    right = {MODEL: encode(checkpoints.minilm(), texts), "sre": encode(checkpoints.sre(), texts)}
    assert cosines(right[MODEL], right["sre"]).max() < 0.9
    client = openai.AsyncOpenAI(base_url=f"{two_models.url}/v1", api_key="unused", max_retries=0)
    slots = asyncio.Semaphore(16)

    async def one(index: int) -> float:
        model = (MODEL, "sre")[index % 2]
        async with slots:
            response = await client.embeddings.create(model=model, input=texts[index // 2])
        return float(cosines(vectors_of(response), right[model][index // 2 : index // 2 + 1])[0])

    assert min(await asyncio.gather(*(one(index) for index in range(500)))) >= 0.999


def test_what_vllm_counts_is_passed_on(two_models: Server, client: openai.OpenAI) -> None:
    """By worker; health checks embed, too."""

    def counted(model: str) -> float:
        text = httpx.get(f"{two_models.url}/metrics", timeout=30).text
        families = text_string_to_metric_families(text)
        samples = (sample for family in families for sample in family.samples)
        return sum(
            sample.value
            for sample in samples
            if sample.name == "vllm:prompt_tokens_total" and sample.labels["model_name"] == model
        )

    before = counted(MODEL)
    assert before
    tokens = client.embeddings.create(
        model=MODEL, input=[f"{n} words" for n in range(300)]
    ).usage.prompt_tokens
    assert tokens <= counted(MODEL) - before < 2 * tokens
    assert 0 < counted("sre") < before + tokens
    text = httpx.get(f"{two_models.url}/metrics", timeout=30).text
    for name in names("vllm:"):  # that the dashboard asks for
        assert f"\n{name}{{" in text, name


def test_the_default_dtype_is_close_to_float32(
    client: openai.OpenAI, reference: dict[str, np.ndarray]
) -> None:
    """Cosine to sentence-transformers of 50 documents and 200 sentences."""
    got = vectors_of(client.embeddings.create(model=MODEL, input=list(reference)))
    assert cosines(got, np.stack(list(reference.values()))).min() >= 0.999


BAD = [
    (b'{"model": ', "body"),
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": [True]}, "input"),
    ({"input": [-1]}, "input"),
    ({"input": [30522]}, "input"),
    ({"input": ["a", 1]}, "input"),
    (b'{"model": "all-minilm-l6-v2", "input": "\\ud800"}', "body"),
    (b'{"model": "all-minilm-l6-v2", "input": NaN}', "body"),
    ({"model": "nope", "input": "a"}, "model"),
    ({"input": [2000] * 257}, "input"),
    ({"input": "word " * 255}, "input"),
    ({"input": ["a"] * 2049}, "input"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_input_is_refused_and_the_next_request_served(
    two_models: Server, body: bytes | dict[str, Any], param: str
) -> None:
    """A 4xx with `param`, as JSON, and nothing else is lost."""
    content = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body}).encode()
    response = httpx.post(f"{two_models.url}/v1/embeddings", content=content, timeout=60)
    assert response.status_code == (404 if param == "model" else 400)
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["param"] == param
    right = {"model": MODEL, "input": "a"}
    good = httpx.post(f"{two_models.url}/v1/embeddings", json=right, timeout=60)
    assert good.status_code == 200


def test_the_longest_input_is_served(two_models: Server) -> None:
    """256 tokens, two of them special; one more is refused above."""
    body = {"model": MODEL, "input": "word " * 254}
    response = httpx.post(f"{two_models.url}/v1/embeddings", json=body, timeout=60)
    assert response.json()["usage"]["prompt_tokens"] == 256


def test_a_trace_shows_where_the_time_went(
    two_models: Server, collected: Collector, lee_documents: list[str]
) -> None:
    """By gRPC, of the one request whose caller is sampled: most of it is the engine's."""
    body = {"model": MODEL, "input": lee_documents * 4}
    for flags in ("00", "01"):
        headers = {"traceparent": f"00-{int(flags) + 1:032x}-00000000000000ff-{flags}"}
        httpx.post(f"{two_models.url}/v1/embeddings", json=body, headers=headers, timeout=120)
    wait_for(collected.traces, 30, "a trace")
    ((name, (root, *spans)),) = collected.traces().items()
    assert (name, root.parent) == (f"{2:032x}", "00000000000000ff")
    assert covered([each.times for each in spans], root.times) >= 0.95
    assert covered([each.times for each in spans if each.name == "engine"], root.times) >= 0.5
    assert lee_documents[0][:20].encode() not in collected.raw
