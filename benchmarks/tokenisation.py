"""Whether the quick tokenizer gives the ids of Hugging Face's, and how quick it is: `make prove-tokenizer`.

The lines are of what it is trusted with: words of news articles, and the characters of its pattern beside all
kinds of others. The vocabulary is the bundled model's, and the same with a token for each character of the
pattern and many of their pairs, so that no script is unknown to it; each as it is and cased.
"""

import argparse
import functools
import json
import random
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.subjects import bundled
from benchmarks.workloads import articles, pool
from deployments.engine.tokenizer.wordpiece import ALIKE, WordPiece

LINES = 1_000_000
AT_ONCE = 500
THREADS = 2
PAIRS = 20_000
ODD = ["[MASK]", "[CLS]", "[SEP]", "[UNK]", "[mask]", "##ing", "  ", "\n", "'s", "...", "https://a.b/c?d=e&f"]

Encode = Callable[[list[str]], list[list[int]]]


@functools.cache
def characters() -> list[str]:
    """Return those that the quick tokenizer is trusted with."""
    return [chr(code) for code in range(sys.maxunicode + 1) if ALIKE.fullmatch(chr(code))]


def lines(rng: random.Random) -> Iterator[str]:
    """Yield lines without end, of each kind in turn."""
    every = characters()
    low = [each for each in every if each < "\u0530"]
    ascii_ = [each for each in every if each.isascii()]
    marks = [each for each in every if unicodedata.category(each).startswith("M")]
    words = " ".join(articles()).split()

    def some(of: list[str], most: int) -> str:
        return "".join(rng.choices(of, k=rng.randrange(1, most)))

    while True:
        yield some(every, 30)
        yield some(low, 60)
        yield some(ascii_, 80)
        yield "".join(rng.choice(low) + some(marks, 4) for _ in range(rng.randrange(1, 15)))
        yield " ".join(rng.choice(words) + rng.choice(["", "", *ODD]) for _ in range(rng.randrange(1, 30)))
        yield "".join(rng.choice(rng.choice([words, ODD, every, low])) for _ in range(rng.randrange(1, 30)))
        yield some([rng.choice(every), "a", "B", "é"], 210)  # longer than a word may be


def vocabularies(rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield tokenizers as their files have them, by name."""
    bare = json.loads(Path(bundled().folder, "tokenizer.json").read_text())
    rich = json.loads(json.dumps(bare))
    known = rich["model"]["vocab"]
    pieces = {
        piece
        for each in characters()
        for form in (each, each.lower(), unicodedata.normalize("NFD", each))
        for piece in form
        if not piece.isspace()
    }
    found = sorted(pieces)
    pairs = [rng.choice(["", "##"]) + rng.choice(found) + rng.choice(found) for _ in range(PAIRS)]
    for piece in [*found, *[f"##{each}" for each in found], *pairs]:
        known.setdefault(piece, len(known))
    for name, declared in (("the bundled model's", bare), ("with all characters", rich)):
        for lowercase in (True, False):
            normalizer = {**declared["normalizer"], "lowercase": lowercase}
            yield f"{name}, {'uncased' if lowercase else 'cased'}", {**declared, "normalizer": normalizer}


def both(declared: dict[str, Any]) -> tuple[Encode, Encode]:
    """Return the quick way and Hugging Face's to encode by a tokenizer."""
    tokenizer = Tokenizer.from_str(json.dumps(declared))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    quick = WordPiece.of(tokenizer)
    assert quick is not None

    def theirs(texts: list[str]) -> list[list[int]]:
        return [each.ids for each in tokenizer.encode_batch_fast(texts)]

    def refused(texts: object, _: bool) -> list[list[int]]:
        raise AssertionError(f"not alike: {texts!r}")

    return lambda texts: quick.encode(texts, True, refused), theirs


def differing(count: int, rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Yield by vocabulary which of so many lines have other ids, asked for on several threads at once."""
    found = list(vocabularies(rng))
    with ThreadPoolExecutor(THREADS) as threads:
        for name, declared in found:
            ours, theirs = both(declared)
            source = lines(rng)
            parts = [[next(source) for _ in range(AT_ONCE)] for _ in range(count // len(found) // AT_ONCE)]
            odd = []
            for part, quick in zip(parts, threads.map(ours, parts), strict=True):
                pairs = zip(part, quick, theirs(part), strict=True)
                odd += [line for line, one, other in pairs if one != other]
            yield name, odd


def speeds(encode: Encode) -> Iterator[float]:
    """Yield the microseconds of a short text and of a long one, asked for alone."""
    for texts in (pool("short")[:1000], pool("long")[:1000]):
        encode(texts)
        begun = time.perf_counter()
        for text in texts:
            encode([text])
        yield 1e6 * (time.perf_counter() - begun) / len(texts)


def main() -> None:
    """Compare, and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    wrong = 0
    for name, odd in differing(given.lines, rng):
        print(f"{name}: {len(odd)} differ", *map(ascii, sorted(odd, key=len)[:3]), flush=True)
        wrong += len(odd)
    ours, theirs = both(next(vocabularies(rng))[1])
    for name, encode in (("Hugging Face's", theirs), ("quick", ours)):
        short, long = speeds(encode)
        print(f"{name}: {short:.1f} µs for a text of 12 words, {long:.0f} µs for one of 250 tokens")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
