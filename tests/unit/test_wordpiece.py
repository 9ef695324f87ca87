"""The quick tokenizer: Hugging Face's ids for whatever is sent; `make prove-tokenizer` tries a million."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokie
from tokenizers import Tokenizer

from benchmarks.tokenisation import differing
from deployments.engine.tokenizer import TextTokenizer
from deployments.engine.tokenizer.wordpiece import ALIKE, WordPiece
from tests.harness.checkpoints import minilm

LINES = 4_000
# What the two read differently, or was never held against each other.
ODD = ["\x7f", "a\0b", "\x0c", "\u0378", "x\u0600", "\U00011d31", "\ue000", "\u200b", "\u2028"]


@pytest.fixture
def declared() -> dict[str, Any]:
    """The bundled model's tokenizer, as its file has it."""
    found = json.loads(Path(minilm(), "tokenizer.json").read_text())
    return {**found, "truncation": None, "padding": None}


def test_all_lines_have_the_same_ids() -> None:
    """In each script, with any marks and special tokens in them, uncased and cased."""
    assert dict(differing(LINES, random.Random(7))) == {
        f"{vocabulary}, {case}": []
        for vocabulary in ("the bundled model's", "with all characters")
        for case in ("uncased", "cased")
    }


@pytest.mark.parametrize("special", [True, False])
def test_odd_texts_among_others_are_read_by_hugging_faces(declared: dict[str, Any], special: bool) -> None:
    """Each answer is its own text's, with few and with many."""
    theirs = Tokenizer.from_str(json.dumps(declared))
    ours = TextTokenizer(json.dumps(declared))
    texts = [text for odd in ODD for text in (f"some {odd} word", odd, "naïve Ünïcode", "")]
    assert not any(ALIKE.fullmatch(odd) for odd in ODD)
    for some in (texts[:5], texts):
        right = [theirs.encode(text, add_special_tokens=special).ids for text in some]
        assert ours.encode(some, special) == right


@pytest.mark.parametrize(
    "text",
    [
        "x" + "über\xa0straße\xa0naïve\xa0" * 4000,
        "ab" + "東京大学、研究。" * 3000,
        "a" * 2**16,
        *("x" + letter * (2**14 - 2) for letter in "東😀é"),
    ],
    ids=str.__len__,
)
def test_texts_without_spaces_are_whole_however_long(declared: dict[str, Any], text: str) -> None:
    """The quick way cuts long ones, and ends the process where it does so in a character."""
    theirs = Tokenizer.from_str(json.dumps(declared))
    assert TextTokenizer(json.dumps(declared)).encode([text]) == [theirs.encode(text).ids]


def test_what_tokie_cant_read_is_left_to_hugging_faces(
    declared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model starts all the same."""

    def refuse(file: str) -> None:
        raise tokie.TokieError(file)

    monkeypatch.setattr("tokie.Tokenizer", SimpleNamespace(from_json=refuse))
    assert len(TextTokenizer(json.dumps(declared)).encode(["a text"])[0]) == 4


def _set(*path: str, to: object) -> Callable[[dict[str, Any]], None]:
    def change(declared: dict[str, Any]) -> None:
        place = declared
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("normalizer", "strip_accents", to=False),
        _set("normalizer", "clean_text", to=False),
        _set("normalizer", to=None),
        # The probe tells these.
        _set("post_processor", to={"type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]}),
        lambda declared: declared["post_processor"]["single"].pop(0),
        _set("normalizer", to={"type": "Lowercase"}),
        _set("pre_tokenizer", to={"type": "Whitespace"}),
        lambda declared: declared["model"]["vocab"].update(hellox=40_000),
        _set("model", "max_input_chars_per_word", to=20),
        lambda declared: declared["added_tokens"][0].update(lstrip=True),
        lambda declared: declared["added_tokens"][0].update(content="[JUST]"),
    ],
)
def test_others_are_left_to_hugging_faces(
    declared: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    """What was never compared isn't trusted."""
    change(declared)
    assert WordPiece.of(Tokenizer.from_str(json.dumps(declared))) is None
