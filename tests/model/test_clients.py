"""Real clients of every dialect against one server with keys on: the reference's vectors, typed errors."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aleph_alpha_client as aleph
import cohere
import httpx
import litellm
import numpy as np
import openai
import pytest
from aleph_alpha_client.aleph_alpha_client import BusyError
from aleph_alpha_client.embedding import InstructableEmbeddingRequest
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding
from tokenizers import Tokenizer

from tests.harness import checkpoints, workers
from tests.harness.server import Server, program, serve
from tests.model.conftest import MINILM, encode

pytestmark = pytest.mark.model
TEXTS = ["The cat sits on the mat.", "Ein Satz über Größe und 東京 🙂", "stock markets fell"]
QUERY, INSTRUCTION = "query: ", "Find {instruction}: "
# The same model by another name, for clients that send OpenAI's token ids.
FOREIGN = "minilm-for-langchain"


@dataclass
class Site:
    """A running server and the plaintexts of its keys."""

    server: Server
    app: str
    narrow: str
    once: str

    @property
    def base(self) -> str:
        """The address that OpenAI's clients are given."""
        return f"{self.server.url}/v1"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """all-MiniLM in float32 under two names, a model that is too slow, and one that never comes up."""
    folder = tmp_path_factory.mktemp("clients")
    config = folder / "workers"
    config.mkdir()
    task = f'prompts = {{query = "{QUERY}", instruction = "{INSTRUCTION}"}}\ndimensions = [128]'
    foreign = f'[queue.models."{FOREIGN}".embedding_task]\nsupported = true\ntoken_input = "cl100k"'
    minilm = workers.vllm(MINILM, checkpoints.minilm(), 'dtype = "float32"')
    minilm = minilm.replace("supported = true", f"supported = true\n{task}\n\n{foreign}")
    (config / "minilm.toml").write_text(minilm)
    (config / "slow.toml").write_text(
        workers.fake("slow", "call_seconds = 3.0", "[limits]\nrequest_timeout_s = 0.3")
    )
    none = "[deployment.autoscaling]\nmin_replicas = 0\n[limits]\nrequest_timeout_s = 0.5"
    (config / "gone.toml").write_text(workers.fake("gone", "start_seconds = 1000.0", none))
    file = folder / "keys.json"

    def create(*arguments: str) -> str:
        command = [program("embedding-cluster"), "keys", "create", "--keys", str(file), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    secrets = (
        create("app"),
        create("narrow", "--models", "slow"),
        create("once", "--requests-per-minute", "1"),
    )
    with serve(config, folder, keys=file) as server:
        yield Site(server, *secrets)


@pytest.fixture(scope="module")
def right() -> Callable[[list[str]], np.ndarray]:
    """What sentence-transformers gives in float32."""
    return lambda texts: encode(checkpoints.minilm(), texts)


Right = Callable[[list[str]], np.ndarray]


def same(vectors: Any, expected: np.ndarray) -> bool:
    """Whether these are the reference's vectors."""
    return np.asarray(vectors).shape == expected.shape and np.allclose(vectors, expected, atol=1e-5)


# --- OpenAI --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
async def test_openai_python(site: Site, right: Right, options: dict[str, Any]) -> None:
    """Sync and async, by default in base64."""
    expected = right(TEXTS)
    with openai.OpenAI(base_url=site.base, api_key=site.app) as client:
        response = client.embeddings.create(model=MINILM, input=TEXTS, **options)
        assert [model.id for model in client.models.list()] == ["gone", MINILM, FOREIGN, "slow"]
    async with openai.AsyncOpenAI(base_url=site.base, api_key=site.app) as client_:
        again = await client_.embeddings.create(model=MINILM, input=TEXTS, **options)
    for each in (response, again):
        vectors: list[Any] = [item.embedding for item in each.data]
        if options.get("encoding_format") == "base64":
            vectors = [openai_floats(vector) for vector in vectors]
        assert same(vectors, expected)


def openai_floats(vector: Any) -> list[float]:
    """Return the numbers; the SDK decodes base64 by itself only where nobody asked for it."""
    if isinstance(vector, str):
        numbers: list[float] = np.frombuffer(base64.b64decode(vector), "<f4").tolist()
        return numbers
    return list(vector)


@pytest.mark.parametrize(
    ("key", "fields", "kind", "code", "param"),
    [
        ("app", {"model": MINILM, "input": ""}, openai.BadRequestError, "invalid_request", "input"),
        (
            "app",
            {"model": MINILM, "input": "a " * 999},
            openai.BadRequestError,
            "context_length_exceeded",
            "input",
        ),
        ("nobody", {"model": MINILM, "input": "a"}, openai.AuthenticationError, "invalid_api_key", None),
        (
            "narrow",
            {"model": MINILM, "input": "a"},
            openai.PermissionDeniedError,
            "model_not_allowed",
            "model",
        ),
        ("app", {"model": "nope", "input": "a"}, openai.NotFoundError, "model_not_found", "model"),
        ("once", {"model": MINILM, "input": "a"}, openai.RateLimitError, "rate_limit_exceeded", None),
        ("app", {"model": "slow", "input": "a"}, openai.APIStatusError, "deadline_exceeded", None),
        ("app", {"model": "gone", "input": "a"}, openai.InternalServerError, "model_unavailable", "model"),
    ],
)
def test_openai_python_reads_every_error(
    site: Site,
    key: str,
    fields: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str,
    param: str | None,
) -> None:
    """Its class, code, param, type and request id."""
    client = openai.OpenAI(base_url=site.base, api_key=getattr(site, key, "wrong"), max_retries=0)
    if key == "once":
        with contextlib.suppress(openai.RateLimitError):  # the minute may be used up already
            client.embeddings.create(**fields)
    with pytest.raises(kind) as caught:
        client.embeddings.create(**fields)
    error = caught.value
    assert (error.code, error.param) == (code, param)
    assert error.type
    assert error.request_id


NODE = """
import OpenAI from "openai";
const [baseURL, apiKey, model, texts] = process.argv.slice(2);
const client = new OpenAI({baseURL, apiKey});
const answers = [];
for (const options of [{}, {encoding_format: "float"}]) {
  const answer = await client.embeddings.create({model, input: JSON.parse(texts), ...options});
  answers.push(answer.data.map(item => item.embedding));
}
try { await new OpenAI({baseURL, apiKey: "wrong"}).models.list(); }
catch (error) { answers.push([error.status, error.code, error.type, Boolean(error.requestID)]); }
console.log(JSON.stringify(answers));
"""


def test_openai_node(site: Site, right: Right, tmp_path: Path) -> None:
    """Its default, which is base64, and floats; skipped where there is no node or no npm registry."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no node")
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "openai"]
    if subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=120, check=False).returncode:
        pytest.skip("npm can't fetch the openai package")
    (tmp_path / "ask.mjs").write_text(NODE)
    command = ["node", "ask.mjs", site.base, site.app, MINILM, json.dumps(TEXTS)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    decoded, floats, error = json.loads(result.stdout)
    assert same(decoded, right(TEXTS))
    assert same(floats, right(TEXTS))
    assert error == [401, "invalid_api_key", "authentication_error", True]


def test_langchain(site: Site, right: Right) -> None:
    """With its default, cl100k's token ids, to a model that reads them; and with texts to any model."""
    by_ids = OpenAIEmbeddings(model=FOREIGN, base_url=site.base, api_key=site.app)  # type: ignore[arg-type]
    by_text = OpenAIEmbeddings(
        model=MINILM,
        base_url=site.base,
        api_key=site.app,  # type: ignore[arg-type]
        check_embedding_ctx_length=False,
    )
    for client in (by_ids, by_text):
        assert same(client.embed_documents(TEXTS), right(TEXTS))
        assert same(client.embed_query(TEXTS[0]), right(TEXTS[:1])[0])


def test_llama_index(site: Site, right: Right) -> None:
    """Which goes by position."""
    client = OpenAIEmbedding(model_name=MINILM, api_base=site.base, api_key=site.app)
    assert same(client.get_text_embedding_batch(TEXTS), right(TEXTS))
    assert same(client.get_query_embedding(TEXTS[0]), right(TEXTS[:1])[0])


def test_litellm(site: Site, right: Right) -> None:
    """Which omits the encoding format."""
    answer = litellm.embedding(f"openai/{MINILM}", input=TEXTS, api_base=site.base, api_key=site.app)
    assert same([item["embedding"] for item in answer.data], right(TEXTS))


def test_cohere(site: Site, right: Right) -> None:
    """Its own SDK's v2, which is given the host alone."""
    client = cohere.ClientV2(api_key=site.app, base_url=site.server.url)
    answer = client.embed(
        model=MINILM, texts=TEXTS, input_type="clustering", embedding_types=["float", "ubinary"]
    )
    assert same(answer.embeddings.float_, right(TEXTS))
    assert answer.embeddings.ubinary is not None
    assert len(answer.embeddings.ubinary[0]) == 48
    answer = client.embed(model=MINILM, texts=TEXTS, input_type="search_query", embedding_types=["float"])
    assert same(answer.embeddings.float_, right([QUERY + text for text in TEXTS]))


def test_text_embeddings_inference(site: Site, right: Right) -> None:
    """As its clients ask, which have no name for the model but take further fields."""
    headers = {"authorization": f"Bearer {site.app}"}
    body = {"inputs": TEXTS, "truncate": True, "model": MINILM}
    answer = httpx.post(f"{site.server.url}/embed", json=body, headers=headers, timeout=60)
    assert same(answer.json(), right(TEXTS))


# --- Pharia --------------------------------------------------------------------------------------


def requests() -> dict[str, Any]:
    """Return a request for every method that embeds."""
    prompt = aleph.Prompt.from_text(TEXTS[0])
    return {
        "semantic_embed": aleph.SemanticEmbeddingRequest(
            prompt, aleph.SemanticRepresentation.Query, normalize=True
        ),
        "batch_semantic_embed": aleph.BatchSemanticEmbeddingRequest(
            [aleph.Prompt.from_text(text) for text in TEXTS * 50], aleph.SemanticRepresentation.Document
        ),
        "instructable_embed": InstructableEmbeddingRequest(prompt, "cats"),
        "compressed": aleph.SemanticEmbeddingRequest(
            prompt, aleph.SemanticRepresentation.Symmetric, compress_to_size=128
        ),
    }


def compressed(vectors: np.ndarray) -> np.ndarray:
    """Return the first 128 dimensions at unit length."""
    cut = vectors[:, :128]
    unit: np.ndarray = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    return unit


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return what the model reads; the raw file of this model pads to 128 tokens."""
    tokenizer.no_padding()
    return tokenizer.encode(text).ids


def test_aleph_alpha_client(site: Site, right: Right) -> None:
    """Every method that embeds, tokens, listings, its check of the version; a server's address with /v1."""
    client = aleph.Client(token=site.app, host=site.base, nice=True, hosting="aleph-alpha", tags=[])
    client.validate_version()
    assert {m["name"]: m["status"] for m in client.models()}[MINILM] == "available"
    ask = requests()
    got = client.semantic_embed(ask["semantic_embed"], MINILM)
    assert same(got.embedding, right([QUERY + TEXTS[0]])[0])
    got = client.semantic_embed(ask["compressed"], MINILM)
    assert same(got.embedding, compressed(right(TEXTS[:1]))[0])
    told = client.instructable_embed(ask["instructable_embed"], MINILM)
    assert same(told.embedding, right(["Find cats: " + TEXTS[0]])[0])
    batch = aleph.BatchSemanticEmbeddingRequest(
        ask["batch_semantic_embed"].prompts[:100], aleph.SemanticRepresentation.Document
    )
    assert same(client.batch_semantic_embed(batch, MINILM).embeddings, right((TEXTS * 50)[:100]))
    for options in ({}, {"encoding_format": "float"}, {"dimensions": 128}):
        answer = client.embeddings(aleph.EmbeddingV2Request(TEXTS, **options), MINILM)
        expected = compressed(right(TEXTS)) if "dimensions" in options else right(TEXTS)
        assert same([item.embedding for item in answer.data], expected)
    tokens = client.tokenize(aleph.TokenizationRequest("Hello world", tokens=True, token_ids=True), MINILM)
    assert tokens.tokens == ["[CLS]", "hello", "world", "[SEP]"]
    assert tokens.token_ids == ids_of(client.tokenizer(MINILM), "Hello world")
    assert client.detokenize(aleph.DetokenizationRequest(tokens.token_ids), MINILM).result == "hello world"
    prompt = aleph.Prompt.from_tokens(tokens.token_ids)
    by_ids = aleph.SemanticEmbeddingRequest(prompt, aleph.SemanticRepresentation.Symmetric)
    assert same(client.semantic_embed(by_ids, MINILM).embedding, right(["Hello world"])[0])
    with pytest.raises(ValueError, match="MISSING_CAPABILITY"):
        client.embed(aleph.EmbeddingRequest(aleph.Prompt.from_text("x"), [-1], ["mean"]), MINILM)


async def test_aleph_alpha_async_client(site: Site, right: Right) -> None:
    """The same of its other half, which splits what is more than 100 prompts; an address without /v1."""
    async with aleph.AsyncClient(token=site.app, host=site.server.url) as client:
        await client.validate_version()
        assert len(await client.models()) == 4
        ask = requests()
        got = await client.semantic_embed(ask["semantic_embed"], MINILM)
        assert same(got.embedding, right([QUERY + TEXTS[0]])[0])
        got = await client.semantic_embed(ask["compressed"], MINILM)
        assert same(got.embedding, compressed(right(TEXTS[:1]))[0])
        told = await client.instructable_embed(ask["instructable_embed"], MINILM)
        assert same(told.embedding, right(["Find cats: " + TEXTS[0]])[0])
        batch = await client.batch_semantic_embed(
            ask["batch_semantic_embed"], MINILM, num_concurrent_requests=3
        )
        assert same(batch.embeddings, right(TEXTS * 50))
        tokens = await client.tokenize(
            aleph.TokenizationRequest("Hello", tokens=False, token_ids=True), MINILM
        )
        assert tokens.token_ids == ids_of(await client.tokenizer(MINILM), "Hello")
        text = await client.detokenize(aleph.DetokenizationRequest(tokens.token_ids), MINILM)
        assert text.result == "hello"
        with pytest.raises(ValueError, match="MISSING_CAPABILITY"):
            await client.embed(aleph.EmbeddingRequest(aleph.Prompt.from_text("x"), [-1], ["mean"]), MINILM)


@pytest.mark.parametrize(
    ("key", "model", "kind"),
    [
        ("app", MINILM, ValueError),
        ("nobody", MINILM, PermissionError),
        ("app", "slow", TimeoutError),
        ("app", "gone", BusyError),
    ],
)
async def test_aleph_alpha_clients_raise_typed_errors(
    site: Site, key: str, model: str, kind: type[Exception]
) -> None:
    """For 400, 401, 408 and 503, sync and async."""
    text = "a " * 999 if kind is ValueError else "a"
    request = aleph.SemanticEmbeddingRequest(
        aleph.Prompt.from_text(text), aleph.SemanticRepresentation.Symmetric
    )
    token = getattr(site, key, "wrong")
    with pytest.raises(kind):
        aleph.Client(token=token, host=site.base, total_retries=0).semantic_embed(request, model)
    async with aleph.AsyncClient(token=token, host=site.base, total_retries=0) as client:
        with pytest.raises(kind):
            await client.semantic_embed(request, model)


# --- keys ----------------------------------------------------------------------------------------


async def test_revoking_takes_effect_while_the_server_runs(site: Site) -> None:
    """And rotating under load loses no valid request. Within a second: by the clock of a quick test."""
    file = next(Path(site.server.log).parent.glob("keys.json"))

    def run(action: str, name: str, *more: str) -> str:
        command = [program("embedding-cluster"), "keys", action, "--keys", str(file), name, *more]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    secret = await asyncio.to_thread(run, "create", "brief")
    body, statuses = {"model": MINILM, "input": "x"}, []
    async with httpx.AsyncClient(base_url=site.base, timeout=30) as client:

        async def ask(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return (await client.post("/embeddings", json=body, headers=headers)).status_code

        async def wait_for(*wanted: tuple[str, int]) -> None:
            async with asyncio.timeout(60):
                while [await ask(key) for key, _ in wanted] != [status for _, status in wanted]:
                    pass

        await wait_for((secret, 200))
        stop = asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                statuses.append(await ask(secret))

        tasks = [asyncio.ensure_future(load()) for _ in range(4)]
        fresh = await asyncio.to_thread(run, "rotate", "brief")
        await wait_for((fresh, 200))
        stop.set()
        await asyncio.gather(*tasks)
        assert set(statuses) == {200}
        await asyncio.to_thread(run, "revoke", "brief")
        await wait_for((secret, 401), (fresh, 401))
