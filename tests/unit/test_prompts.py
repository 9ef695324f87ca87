"""A prompt that the model reads and doesn't pool is marked, token by token."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from deployments.api.openai import parse_fields
from deployments.config.worker import EmbeddingTask, Limits
from deployments.dispatch.prepare import Prepared, prepare
from deployments.engine import ModelCard
from deployments.engine.tokenizer import TextTokenizer
from tests.harness import checkpoints

CARD = ModelCard(
    tokenizer=(checkpoints.minilm() / "tokenizer.json").read_text(),
    dimension=4,
    max_model_len=16,
    vocab_size=30522,
    prompts={"query": "find this: "},
    pools_prompt=False,
)
TOKENIZER = TextTokenizer(CARD.tokenizer)
TEXTS = ["a text", "find this: another"]


def prepared(card: ModelCard = CARD, **fields: Any) -> Prepared:
    """Return what a request of OpenAI's dialect becomes."""
    request = parse_fields({"model": "m", "input": TEXTS, **fields})
    return asyncio.run(prepare(request, EmbeddingTask(supported=True), Limits(), card, TOKENIZER))


@pytest.mark.parametrize(("special", "marked"), [(True, 4), (False, 3)])
def test_the_tokens_of_a_prompt_are_marked(special: bool, marked: int) -> None:
    """With the special token before it; a text that begins alike is no prompt."""
    fields: dict[str, Any] = {"prompt_name": "query", "add_special_tokens": special}
    found = [ids.tolist() for ids in prepared(**fields).batch]
    plain = [ids.tolist() for ids in prepared(replace(CARD, pools_prompt=True), **fields).batch]
    assert [[~token if token < 0 else token for token in ids] for ids in found] == plain
    assert [[token < 0 for token in ids] for ids in found] == [
        [place < marked for place in range(len(ids))] for ids in plain
    ]


def test_what_is_too_long_is_cut_where_the_model_cuts_unless_the_request_says_where() -> None:
    """To a number of tokens, or to all that the model takes."""
    left = replace(CARD, truncates_start=True)
    ids = TOKENIZER.encode(["a b c d e f g h i j k l m n o p q"])[0]
    assert len(ids) == 19
    for wanted, body in ((-1, 14), (5, 3)):
        for side, drops_start in (
            ({}, True),
            ({"truncation_side": "right"}, False),
            ({"truncate": "END"}, False),
        ):
            (found,) = prepared(
                left, input=["a b c d e f g h i j k l m n o p q"], truncate_prompt_tokens=wanted, **side
            ).batch
            kept = ids[-1 - body : -1] if drops_start else ids[1 : 1 + body]
            assert found.tolist() == [ids[0], *kept, ids[-1]]


def test_without_a_prompt_nothing_is_marked() -> None:
    """Of a default prompt, it is."""
    assert prepared().batch.ids.min() >= 0
    with_default = replace(CARD, default_prompt="find this: ")
    assert (prepared(with_default).batch.ids < 0).sum() == 4 * len(TEXTS)


def test_a_text_that_is_cut_has_its_prompt_marked_still() -> None:
    """And no more than its own tokens, where the prompt is longer than what is left."""
    cut = prepared(prompt_name="query", truncate_prompt_tokens=3).batch
    assert [ids.tolist() for ids in cut] == [[~101, ~2424, ~102]] * len(TEXTS)
