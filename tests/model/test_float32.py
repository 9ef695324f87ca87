"""In float32 the vectors are sentence-transformers' own; the published example serves a Qwen3."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from scipy.stats import spearmanr

from tests.harness import checkpoints, workers
from tests.harness.server import Server, serve
from tests.model.conftest import cosines, encode
from tests.model.test_two_models import token_ids, vectors_of

pytestmark = pytest.mark.model
QWEN = "qwen3-embedding-8b"


@pytest.fixture(scope="module", params=["vllm", "sentence-transformers"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine, which have to do the same."""
    return str(request.param)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, qwen3: Path, engine: str) -> Iterator[Server]:
    """MiniLM in float32, and the published example with only model_path and engine changed."""
    folder = tmp_path_factory.mktemp("float32")
    config = folder / "workers"
    config.mkdir()
    named = f'[generator]\nengine = "{engine}"'
    # A client may wait until a killed replica's successor is there.
    more = "[deployment]\nnum_gpus = 0\n[limits]\nrequest_timeout_s = 150"
    minilm = workers.vllm("minilm", checkpoints.minilm(), 'dtype = "float32"', more)
    published = workers.PUBLISHED.replace("/path/to/weights/Qwen/Qwen3-Embedding-8B", str(qwen3))
    (config / "minilm.toml").write_text(minilm.replace("[generator]", named))
    (config / "config.toml").write_text(published.replace("[generator]", named))
    with serve(config, folder, tuned=engine != "vllm") as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    """The official SDK."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")


def test_vectors_agree_with_sentence_transformers(
    client: openai.OpenAI,
    reference: dict[str, np.ndarray],
    lee_documents: list[str],
    human_judgements: np.ndarray,
) -> None:
    """Cosine of each text, and the rank correlation with what people say of the 50 documents."""
    got = vectors_of(client.embeddings.create(model="minilm", input=list(reference)))
    expected = np.stack(list(reference.values()))
    assert cosines(got, expected).min() >= 0.9999
    pairs = np.triu_indices(len(lee_documents), 1)
    count = len(lee_documents)
    judged = human_judgements[pairs]
    ours = spearmanr((got[:count] @ got[:count].T)[pairs], judged).statistic
    theirs = spearmanr((expected[:count] @ expected[:count].T)[pairs], judged).statistic
    assert theirs > 0.4
    assert abs(ours - theirs) <= 0.005


def test_a_text_alone_in_a_batch_and_as_token_ids_is_one_vector(
    client: openai.OpenAI, lee_documents: list[str], sentences: list[str]
) -> None:
    """A batch of 64 mixed lengths against each of its texts alone."""
    batch = [text for pair in zip(lee_documents, sentences, strict=False) for text in pair][:64]
    together = vectors_of(client.embeddings.create(model="minilm", input=batch))
    ids = vectors_of(client.embeddings.create(model="minilm", input=[token_ids(text) for text in batch]))
    alone = np.concatenate(
        [vectors_of(client.embeddings.create(model="minilm", input=text)) for text in batch]
    )
    assert cosines(together, alone).min() >= 0.99999
    assert cosines(together, ids).min() >= 0.99999


def test_the_published_example_embeds_with_prompt_and_last_token(
    server: Server, client: openai.OpenAI, qwen3: Path
) -> None:
    """As sentence-transformers reads the same folder; no matryoshka flag, so no other dimensions."""
    texts = ["What is the capital of China?", "Explain gravity", "a"]
    got = vectors_of(client.embeddings.create(model=QWEN, input=texts))
    assert got.shape == (3, 256)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-2)
    assert cosines(got, encode(qwen3, texts)).min() >= 0.999
    body = {"model": QWEN, "input": texts, "input_type": "query"}
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60).json()
    queries = np.array([item["embedding"] for item in answer["data"]])
    assert cosines(queries, encode(qwen3, [checkpoints.PROMPT + text for text in texts])).min() >= 0.999
    wrong = {"model": QWEN, "input": "a", "dimensions": 64}
    refused = httpx.post(f"{server.url}/v1/embeddings", json=wrong, timeout=60)
    assert refused.json()["error"]["param"] == "dimensions"


async def test_of_sixty_strangers_only_the_one_whose_vector_is_nan_fails(
    server: Server, qwen3: Path, sentences: list[str]
) -> None:
    """And nothing of it stays in the caches of a causal model: who comes next is served right."""
    replicas = server.titled(f"ServeReplica:default:{QWEN}")
    texts = sentences[:60]
    texts[30] = f"{checkpoints.NAN_WORD} {sentences[60]} {sentences[61]}"
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)

    async def ask(text: str) -> np.ndarray | openai.APIStatusError:
        try:
            vector: np.ndarray = vectors_of(await client.embeddings.create(model=QWEN, input=text))[0]
        except openai.APIStatusError as error:
            return error
        return vector

    right = encode(qwen3, sentences[:60])
    for _ in range(3):
        answers = await asyncio.gather(*map(ask, texts))
        failed = {n: each for n, each in enumerate(answers) if not isinstance(each, np.ndarray)}
        assert {n: (each.status_code, each.code) for n, each in failed.items()} == {
            30: (500, "non_finite_embedding")
        }
        good = [each for each in answers if isinstance(each, np.ndarray)]
        assert cosines(np.stack(good), np.delete(right, 30, axis=0)).min() >= 0.999
    assert server.titled(f"ServeReplica:default:{QWEN}") == replicas


def test_a_text_with_a_token_beyond_the_table_is_refused_by_field(server: Server, qwen3: Path) -> None:
    """It would end the engine, and the next one; its neighbours are served, by the same replica."""
    replicas = server.titled(f"ServeReplica:default:{QWEN}")
    assert len(replicas) == 1
    for text in (checkpoints.UNKNOWN_WORD, f"a {checkpoints.UNKNOWN_WORD}"):
        body = {"model": QWEN, "input": ["a", text]}
        refused = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
        assert (refused.status_code, refused.json()["error"]) == (
            400,
            {
                "message": "`input[1]` holds a token id beyond the vocabulary of 30522",
                "type": "invalid_request_error",
                "param": "input",
                "code": "invalid_request",
            },
        )
    served = httpx.post(f"{server.url}/v1/embeddings", json={"model": QWEN, "input": ["a"]}, timeout=60)
    assert served.status_code == 200
    assert server.titled(f"ServeReplica:default:{QWEN}") == replicas


def test_listings_and_metrics_name_the_engine(server: Server, engine: str) -> None:
    """And `/ready` says how it computes."""
    listed = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
    assert {each["engine"] for each in listed} == {engine}
    metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
    assert f'embedding_engine_replicas{{dtype="float32",engine="{engine}",worker="minilm"}} 1.0' in metrics
    ready = httpx.get(f"{server.url}/ready", timeout=60).json()
    assert {each["engine"] for each in ready["models"]} == {engine}


def test_a_killed_replica_is_replaced_and_embeds_right(
    server: Server, reference: dict[str, np.ndarray]
) -> None:
    """Whoever asks meanwhile waits for the new one, inside of their own deadline."""
    (killed,) = server.titled("ServeReplica:default:minilm")
    killed.kill()
    text, expected = next(iter(reference.items()))
    answer = httpx.post(
        f"{server.url}/v1/embeddings",
        json={"model": "minilm", "input": text},
        headers={"x-request-timeout-seconds": "150"},
        timeout=180,
    )
    assert answer.status_code == 200, answer.text
    vector = np.array(answer.json()["data"][0]["embedding"])
    assert cosines(vector[None], expected[None])[0] >= 0.9999
    assert killed not in server.titled("ServeReplica:default:minilm")
