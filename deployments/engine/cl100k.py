"""cl100k's vocabulary, for clients that send OpenAI's token ids to a model with another tokenizer."""

import threading

from deployments.errors import EngineStartError

ENCODING = "cl100k_base"
# Special tokens stand behind these, and none of them is text.
TOKENS = 100_256
# tiktoken asks OpenAI's host where it finds no copy, and waits for it without end.
FETCH_SECONDS = 30.0


def read_cl100k() -> tuple[bytes, ...]:
    """Return the bytes of each token by its id, special tokens left out. Raises EngineStartError.

    tiktoken finds the vocabulary in the folder that `TIKTOKEN_CACHE_DIR` names, or fetches it.
    """
    found: list[tuple[bytes, ...]] = []
    reason = [f"no answer within {FETCH_SECONDS:g} s"]

    def read() -> None:
        try:
            import tiktoken

            encoding = tiktoken.get_encoding(ENCODING)
        except Exception as error:  # whatever kept it from being read, the worker can't start
            reason[0] = type(error).__name__
            return
        found.append(tuple(encoding.decode_tokens_bytes(range(TOKENS))))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    if not found:
        raise EngineStartError(
            f"token_input `cl100k` needs tiktoken's vocabulary {ENCODING}, which can't be read ({reason[0]});"
            " put it into the folder that TIKTOKEN_CACHE_DIR names"
        )
    return found[0]
