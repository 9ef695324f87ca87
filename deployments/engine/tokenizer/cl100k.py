"""OpenAI's vocabulary, for clients that send its token ids to a model with another tokenizer."""

import threading

from deployments.errors import EngineStartError

ENCODING = "cl100k_base"
# Special tokens stand behind these, not each id among them.
TOKENS = 100_256
# tiktoken asks OpenAI's host where it finds no copy, and waits for it without end.
FETCH_SECONDS = 30.0


def read_cl100k() -> tuple[bytes, ...]:
    """Return the bytes of each token by its id, and none where there is no token. Raises EngineStartError.

    A special token is read as the text that stands for it, which is what a client had in its text.

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
        special = {encoding.encode_single_token(text): text.encode() for text in encoding.special_tokens_set}
        behind = [special.get(token, b"") for token in range(TOKENS, encoding.n_vocab)]
        found.append((*encoding.decode_tokens_bytes(range(TOKENS)), *behind))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    if not found:
        raise EngineStartError(
            f"token_input `cl100k` needs tiktoken's vocabulary {ENCODING}, which can't be read ({reason[0]});"
            " put it into the folder that TIKTOKEN_CACHE_DIR names"
        )
    return found[0]
