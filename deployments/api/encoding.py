"""Vectors → bytes of a JSON answer, once, at the end.

Bodies are put together by hand around one array: a float list costs what orjson takes to print it,
base64 a fraction of that, and no pydantic model ever sees a float.
"""

import base64
from typing import Literal

import numpy as np
import orjson

EncodingFormat = Literal["float", "base64"]


def truncate(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Return the first `dimensions` columns, rows at unit length again (Matryoshka embeddings)."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(cut, norms, out=np.zeros_like(cut), where=norms > 0)
    return unit


def embedding_texts(vectors: np.ndarray, encoding_format: EncodingFormat) -> list[bytes]:
    """Return each row of float32 (n, dim) as JSON: a list of numbers, or base64 of little-endian floats."""
    vectors = np.ascontiguousarray(vectors, dtype="<f4")
    if encoding_format == "base64":
        return [b'"%b"' % base64.b64encode(row) for row in vectors]
    return [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) for row in vectors]
