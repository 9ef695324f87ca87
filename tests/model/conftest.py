"""Servers and references that the model tests share. On 2 cores one server runs at a time."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.harness import checkpoints, workers
from tests.harness.collector import Collector, collector
from tests.harness.server import Server, serve

MINILM = "all-minilm-l6-v2"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `two_models` last: from the first of them on it holds all cores."""
    items.sort(key=lambda item: "two_models" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def lee_documents() -> list[str]:
    """The 50 news documents of gensim's lee.cor, whose similarity people have judged."""
    file = checkpoints.package_folder("gensim", "test/test_data") / "lee.cor"
    return [line for line in file.read_text(encoding="latin-1").splitlines() if line.strip()]


@pytest.fixture(scope="session")
def human_judgements() -> np.ndarray:
    """The 50 x 50 mean similarities that people gave the documents."""
    return np.loadtxt(checkpoints.package_folder("gensim", "test/test_data") / "similarities0-1.txt")


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """200 short sentences out of gensim's background corpus."""
    file = checkpoints.package_folder("gensim", "test/test_data") / "lee_background.cor"
    found = [s.strip() for s in file.read_text(encoding="latin-1").replace("\n", " ").split(". ")]
    return [sentence for sentence in found if 20 < len(sentence) < 200][:200]


@pytest.fixture(scope="session")
def reference(lee_documents: list[str], sentences: list[str]) -> dict[str, np.ndarray]:
    """What sentence-transformers gives in float32, by text."""
    texts = lee_documents + sentences
    return dict(zip(texts, encode(checkpoints.minilm(), texts), strict=True))


def encode(model: Path, texts: list[str]) -> np.ndarray:
    """Embed with sentence-transformers in float32."""
    from sentence_transformers import SentenceTransformer

    transformer = SentenceTransformer(str(model), device="cpu")
    return transformer.encode(texts, normalize_embeddings=True, convert_to_numpy=True)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows."""
    dots: np.ndarray = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return dots


@pytest.fixture(scope="session")
def collected() -> Iterator[Collector]:
    """The traces of `two_models`: those of requests that ask for it."""
    with collector() as found:
        yield found


@pytest.fixture(scope="session")
def two_models(collected: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """all-MiniLM and sre-embedding-model, the same shape with other weights, in the default dtype."""
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collected.grpc_url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }
    folder = tmp_path_factory.mktemp("two")
    config = folder / "workers"
    config.mkdir()
    (config / "minilm.toml").write_text(workers.vllm(MINILM, checkpoints.minilm()))
    (config / "sre.toml").write_text(workers.vllm("sre", checkpoints.sre()))
    with serve(config, folder, variables) as server:
        yield server


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3 in the layout of Qwen3-Embedding."""
    return checkpoints.make_qwen3_embedding(tmp_path_factory.mktemp("qwen3") / "Qwen3-Embedding")
