"""What the public tests of vLLM's server ask of an embedding model, asked of ours.

Text and ids, alone and in a batch; cutting, sizes, long texts; base64 and bytes in each type and order;
Cohere's second version beside OpenAI's; what is refused, by its whole text.
"""

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from tests.harness.server import Server
from tests.model.conftest import MINILM, cosines
from tests.model.test_two_models import token_ids

pytestmark = pytest.mark.model
TEXT = "The best thing about vLLM is that it supports many different models"
LONG = " ".join(["word"] * 2000)
Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(two_models: Server) -> Ask:
    """Ask a route of the model."""

    def ask(path: str, **fields: Any) -> httpx.Response:
        return httpx.post(f"{two_models.url}{path}", json={"model": MINILM, **fields}, timeout=60)

    return ask


@pytest.fixture
def length(ask: Ask) -> int:
    """How many tokens the model takes, as it says itself."""
    return int(ask("/tokenize", prompt=TEXT).json()["max_model_len"])


def floats(answer: httpx.Response) -> np.ndarray:
    """Return the vectors of an answer that must be one, as numbers."""
    assert answer.status_code == 200, answer.text
    return np.array([each["embedding"] for each in answer.json()["data"]], np.float32)


@pytest.mark.parametrize("count", [1, 10])
def test_texts_and_their_ids_are_the_same_to_it(ask: Ask, count: int) -> None:
    """One or a batch: as many vectors, and all their tokens counted."""
    ids = ask("/tokenize", prompt=TEXT).json()["tokens"]
    assert ids == token_ids(TEXT)
    for one in (TEXT, ids):
        answer = ask("/v1/embeddings", input=one if count == 1 else [one] * count, encoding_format="float")
        assert floats(answer).shape == (count, 384)
        assert answer.json()["id"].startswith("embd-")
        tokens = count * len(ids)
        assert answer.json()["usage"] == {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
        }
        alone = floats(ask("/v1/embeddings", input=TEXT, encoding_format="float"))
        assert cosines(floats(answer), np.repeat(alone, count, 0)).min() > 0.9999


def test_a_prompt_is_cut_to_the_tokens_asked_for(ask: Ask, length: int) -> None:
    """A text and ids; to no more than the model takes."""
    for one in (LONG, token_ids(LONG)):
        answer = ask("/v1/embeddings", input=one, truncate_prompt_tokens=10)
        assert floats(answer).shape == (1, 384)
        assert answer.json()["usage"]["prompt_tokens"] == answer.json()["usage"]["total_tokens"] == 10
    assert refusal(ask("/v1/embeddings", input=TEXT, truncate_prompt_tokens=8193)) == (
        "truncate_prompt_tokens",
        f"`truncate_prompt_tokens` can't be 8193; the model takes {length}",
    )


def test_sizes_that_the_model_wasnt_made_for_are_refused(ask: Ask) -> None:
    """Its own is none of them."""
    assert floats(ask("/v1/embeddings", input=[TEXT] * 3, dimensions=None)).shape == (3, 384)
    for size, told in (
        (-1, "`dimensions` must be a positive integer"),
        (16, "`dimensions` can't be 16; this model gives 384"),
    ):
        assert refusal(ask("/v1/embeddings", input=TEXT, dimensions=size)) == ("dimensions", told)


def test_a_long_text_is_refused_and_not_averaged(ask: Ask, length: int) -> None:
    """Alone and among others, which one it was; vectors of its parts are nobody's."""
    told = f"`input[{{}}]` has {len(token_ids(LONG))} tokens, and the model takes {length}"
    assert refusal(ask("/v1/embeddings", input=LONG)) == ("input", told.format(0))
    assert refusal(ask("/v1/embeddings", input=[TEXT, LONG])) == ("input", told.format(1))


DTYPES = {"float32": "f4", "float16": "f2", "bfloat16": "u2"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("endianness", ["native", "little", "big"])
def test_base64_and_bytes_hold_the_vectors_in_each_type_and_order(
    ask: Ask, dtype: str, endianness: str
) -> None:
    """As the numbers of the plain answer, to the precision of the type."""
    texts = [TEXT, "another", TEXT]
    right = floats(ask("/v1/embeddings", input=texts, encoding_format="float"))
    kind = {"embed_dtype": dtype, "endianness": endianness}
    order = (">" if endianness == "big" else "<") + DTYPES[dtype]

    def numbers(content: bytes) -> np.ndarray:
        found = np.frombuffer(content, order)
        if dtype == "bfloat16":
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32)

    encoded = ask("/v1/embeddings", input=texts, encoding_format="base64", **kind).json()["data"]
    found = np.stack([numbers(base64.b64decode(each["embedding"])) for each in encoded])
    assert np.allclose(found, right, atol=1e-2)
    raw = ask("/v1/embeddings", input=texts, encoding_format="bytes", **kind)
    items = json.loads(raw.headers["metadata"])["data"]
    found = np.stack([numbers(raw.content[each["start"] : each["end"]]) for each in items])
    assert np.allclose(found, right, atol=1e-2)
    bare = ask("/v1/embeddings", input=texts, encoding_format="bytes_only", **kind)
    assert "metadata" not in bare.headers
    assert np.allclose(numbers(bare.content).reshape(right.shape), right, atol=1e-2)


def test_what_it_cant_do_is_refused_by_name(ask: Ask) -> None:
    """Values that nobody knows, vectors of another length, other tasks, chat without a template."""
    kinds = "`float32`, `float16`, `bfloat16`, `fp8_e4m3`, `fp8_e5m2`, `int8`, `uint8`, `binary`, `ubinary`"
    for field, value, told in (
        (
            "encoding_format",
            "bad",
            "`encoding_format` must be one of `float`, `base64`, `bytes`, `bytes_only`",
        ),
        ("embed_dtype", "bad", f"`embed_dtype` must be one of {kinds}"),
        ("endianness", "bad", "`endianness` must be one of `native`, `big`, `little`"),
        ("use_activation", False, "the model's vectors have unit length"),
    ):
        assert refusal(ask("/v1/embeddings", input=TEXT, **{field: value})) == (field, told)
    for task in ("token_embed", "classify", "token_classify", "plugin"):
        assert refusal(ask("/pooling", input=TEXT, task=task)) == (
            "task",
            "no model here has another task than `embed`",
        )
    chat = [{"role": "user", "content": TEXT}]
    assert refusal(ask("/v1/embeddings", messages=chat)) == (
        "messages",
        "the model has no chat template; send text as `input`",
    )


def test_tokens_vectors_make_their_inputs(ask: Ask) -> None:
    """The mean of them is what `/embed` gives, with the model's own length."""
    texts = [TEXT, "another"]
    tokens = ask("/embed_all", inputs=texts).json()
    assert [len(each) for each in tokens] == [len(token_ids(text)) for text in texts]
    means = np.stack([np.mean(each, axis=0) for each in tokens]).astype(np.float32)
    right = np.array(ask("/embed", inputs=texts).json(), np.float32)
    assert cosines(means, right).min() > 0.9999


def refusal(answer: httpx.Response) -> tuple[str, str]:
    """Return the field and the message of an answer that must be a 400."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


def test_other_routes_give_the_same_vector(ask: Ask) -> None:
    """SageMaker's, `/pooling`, and with the activation that the model has by itself."""
    right = ask("/v1/embeddings", input=TEXT, encoding_format="float")
    invoked = ask("/invocations", input=TEXT, encoding_format="float")
    assert invoked.json().keys() == right.json().keys()
    assert invoked.json()["data"][0].keys() == right.json()["data"][0].keys()
    activated = ask("/v1/embeddings", input=TEXT, use_activation=True)
    (pooled,) = ask("/pooling", input=TEXT, task="embed").json()["data"]
    for found in (floats(invoked), floats(activated), np.array([pooled["data"]], np.float32)):
        assert cosines(found, floats(right)).min() > 0.9999


def test_coheres_second_version_gives_what_openais_route_does(ask: Ask) -> None:
    """Vectors, their order, how many tokens they were; what its answer holds beside them."""
    texts = ["machine learning", "deep learning", "chocolate cake recipe"]
    right = ask("/v1/embeddings", input=texts, encoding_format="float")
    answer = ask("/v2/embed", texts=texts, embedding_types=["float", "binary", "ubinary", "base64"]).json()
    found = np.array(answer["embeddings"]["float"], np.float32)
    assert cosines(found, floats(right)).min() > 0.9999
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=0.01)
    assert found[0] @ found[1] > found[0] @ found[2]
    decoded = [np.frombuffer(base64.b64decode(each), "<f4") for each in answer["embeddings"]["base64"]]
    assert np.array_equal(np.stack(decoded), found)
    assert {len(each) for kind in ("binary", "ubinary") for each in answer["embeddings"][kind]} == {384 // 8}
    assert answer["texts"] == texts
    assert answer["meta"]["api_version"] == {"version": "2"}
    tokens = right.json()["usage"]["prompt_tokens"]
    assert (
        answer["meta"]["billed_units"]["input_tokens"] == answer["meta"]["tokens"]["input_tokens"] == tokens
    )


def test_cohere_says_which_end_is_cut(ask: Ask, length: int) -> None:
    """The end, the start, or neither; a use that the model hasn't, and no text at all, are refused."""
    text = " ".join([f"alpha{n}" for n in range(300)] + [f"omega{n}" for n in range(300)])
    cut = {
        side: np.array(ask("/v2/embed", texts=[text], truncate=side).json()["embeddings"]["float"])
        for side in ("END", "START")
    }
    assert cosines(cut["END"], cut["START"])[0] < 0.99
    told = f"`texts[0]` has {len(token_ids(text))} tokens, and the model takes {length}"
    assert refusal(ask("/v2/embed", texts=[text], truncate="NONE")) == ("texts", told)
    assert refusal(ask("/v2/embed", texts=["x"], input_type="nonexistent_type")) == (
        "input_type",
        "the model has no prompt of that name; it has none",
    )
    assert refusal(ask("/v2/embed")) == ("texts", "one of `texts` and `inputs` must be given")
