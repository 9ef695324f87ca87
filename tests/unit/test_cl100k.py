"""cl100k's vocabulary: read without a download, or one clear line."""

from pathlib import Path

import pytest

from deployments.engine.tokenizer.cl100k import read_cl100k
from deployments.errors import EngineStartError


def test_the_table_holds_every_tokens_bytes() -> None:
    """Special ones as the text that stands for them; an id without a token holds nothing."""
    table = read_cl100k()
    assert len(table) == 100_277
    special = {token: table[token] for token in range(100_256, 100_277) if table[token]}
    assert special == {
        100_257: b"<|endoftext|>",
        100_258: b"<|fim_prefix|>",
        100_259: b"<|fim_middle|>",
        100_260: b"<|fim_suffix|>",
        100_276: b"<|endofprompt|>",
    }
    assert b"".join(table[token] for token in (9906, 1917)) == b"Hello world"


def test_without_the_vocabulary_the_start_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which says what to do."""
    import tiktoken.load
    import tiktoken.registry

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", _unreachable)
    with pytest.raises(EngineStartError, match="TIKTOKEN_CACHE_DIR") as caught:
        read_cl100k()
    assert "ConnectionError" in caught.value.message
    assert "\n" not in caught.value.message


def _unreachable(_: str) -> bytes:
    raise ConnectionError("no route")
