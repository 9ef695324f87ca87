"""Every parser under hypothesis for a moment; `make fuzz` gives each ten minutes."""

from collections.abc import Iterator

import pytest
from hypothesis import strategies as st

from benchmarks import fuzz as fuzzing
from benchmarks.fuzz import Target, fuzz, targets

SECONDS = 1.0


@pytest.fixture(scope="module")
def found() -> Iterator[list[Target]]:
    """All parsers."""
    with targets() as all_of_them:
        yield all_of_them


def test_files_forms_and_every_dialect_are_among_them(found: list[Target]) -> None:
    """A route that takes a body is a target by itself."""
    names = {target.name for target in found}
    assert {
        "lines of jobs",
        "csv",
        "lines of batches",
        "multipart",
        "POST /embeddings",
        "POST /files",
    } <= names
    assert {"POST /v2/embed", "POST /embed", "POST /semantic_embed", "POST /tokenize"} <= names


@pytest.mark.slow
def test_whatever_comes_in_is_answered(found: list[Target]) -> None:
    """No 5xx, no traceback, no second of computing."""
    for target in found:
        tried, _ = fuzz(target, SECONDS)
        assert tried > 20, target.name


def test_the_fuzzer_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that fails for some bytes, or takes too long, is found."""

    def wrong(content: bytes) -> None:
        assert len(content) < 2

    with pytest.raises(AssertionError):
        fuzz(Target("wrong", st.binary(max_size=4), wrong), SECONDS)
    monkeypatch.setattr(fuzzing, "HANGS_SECONDS", 0.0)
    with pytest.raises(AssertionError):
        fuzz(Target("slow", st.binary(max_size=1), len), SECONDS)
