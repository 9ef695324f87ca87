"""What the fake engine's vectors must be."""

from collections.abc import Sequence

import numpy as np

from deployments.engine.batch import TokenBatch
from deployments.engine.fake import fake_vectors
from deployments.engine.tokenizer import TextTokenizer, byte_tokenizer

TOKENIZER = TextTokenizer(byte_tokenizer())


def expected(texts: Sequence[str], dimension: int = 64, *, seed: int = 0) -> np.ndarray:
    """Return the right vectors of texts, whose tokens are their bytes: float32 (len(texts), dimension)."""
    return fake_vectors(TokenBatch.of(TOKENIZER.encode(texts)), dimension, seed)
