"""Vectors → bytes of a JSON answer, once, at the end.

Bodies are put together by hand around one array: a float list costs what orjson takes to print it,
base64 a fraction of that, and no pydantic model ever sees a float.
"""

import base64
from typing import Literal

import numpy as np
import orjson
from pydantic import BaseModel

from deployments.errors import EmbeddingError, InvalidRequestError

EncodingFormat = Literal["float", "base64", "bytes", "bytes_only"]
Endianness = Literal["native", "big", "little"]
# vLLM's names for the first five, Cohere's for the others.
EmbedDtype = Literal[
    "float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8", "uint8", "binary", "ubinary"
]

INT8_MAX = 127
# What rounding leaves of a length of 1 in float32.
UNIT_TOLERANCE = 1e-6
BITS = 8
# To turn this bit adds 128 or takes it off.
SIGN = 0x80


def truncate(vectors: np.ndarray, dimensions: int | None, unit: bool = True) -> np.ndarray:
    """Return the first `dimensions` columns (Matryoshka embeddings), `unit` rows at that length again."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    return normalize(vectors[:, :dimensions]) if unit else vectors[:, :dimensions]


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Return float32 (n, dim) with rows at unit length; zeros stay, and so does what has it."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if np.all(np.abs(norms - 1) < UNIT_TOLERANCE):
        return vectors
    unit: np.ndarray = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return unit


def convert(vectors: np.ndarray, dtype: EmbedDtype) -> np.ndarray:
    """Return float32 (n, dim) in another type, little-endian.

    `int8` scales each row by its largest number, so that cosines keep the most of their digits; `uint8` is
    the same plus 128. `ubinary` packs the signs of eight numbers into a byte, the first in its highest bit, a
    bit set where the number is positive: uint8 of shape (n, dim / 8); `binary` is the same less 128, as int8.
    `bfloat16`, which numpy hasn't, comes as the uint16 of its bits, and the `fp8` as the uint8 of theirs.
    """
    match dtype:
        case "float32":
            return np.ascontiguousarray(vectors, "<f4")
        case "float16":
            return vectors.astype("<f2")
        case "bfloat16":
            bits = np.ascontiguousarray(vectors, "<f4").view("<u4")
            nearest_even = 0x7FFF + ((bits >> 16) & 1)
            rounded: np.ndarray = (bits + nearest_even) >> 16
            return rounded.astype("<u2")
        case "fp8_e4m3" | "fp8_e5m2":
            return _eight_bits(vectors, dtype)
        case "int8" | "uint8":
            largest = np.abs(vectors).max(axis=1, keepdims=True)
            scaled = np.divide(vectors * INT8_MAX, largest, out=np.zeros_like(vectors), where=largest > 0)
            small: np.ndarray = np.rint(scaled).astype(np.int8)
            return small if dtype == "int8" else small.view(np.uint8) ^ SIGN
        case "binary" | "ubinary":
            packed = np.packbits(vectors > 0, axis=1)
            return packed if dtype == "ubinary" else (packed ^ SIGN).view(np.int8)


def _eight_bits(vectors: np.ndarray, dtype: Literal["fp8_e4m3", "fp8_e5m2"]) -> np.ndarray:
    """Return the bits of the nearest numbers of eight bits, of which those without a sign are in order."""
    mantissa, bias = (3, 7) if dtype == "fp8_e4m3" else (2, 15)
    exponents, fractions = np.divmod(np.arange(128.0), 2**mantissa)
    normal = exponents > 0
    values = (normal + fractions / 2**mantissa) * 2.0 ** (np.where(normal, exponents, 1) - bias)
    # The first number that is none: beyond it there is infinity, or what isn't a number.
    values = values[: 127 + 1 if mantissa == 3 else 124 + 1]
    middles = (values[1:] + values[:-1]) / 2
    sizes = np.abs(vectors.astype(np.float64))
    codes = np.searchsorted(middles, sizes)
    halfway = codes < len(middles)
    halfway &= sizes == middles[np.minimum(codes, len(middles) - 1)]
    codes += halfway & (codes % 2 == 1)  # to the even one
    signs = np.signbit(vectors).astype(np.uint8) << 7
    bits: np.ndarray = codes.astype(np.uint8) | signs
    return bits


def check_dtype(dtype: EmbedDtype, dimension: int, param: str) -> None:
    """Raise InvalidRequestError for bits that don't fill bytes."""
    if dtype in ("binary", "ubinary") and dimension % BITS:
        raise InvalidRequestError(f"{dimension} dimensions can't be packed into bytes", param)


def json_rows(array: np.ndarray) -> list[bytes]:
    """Return each row of (n, dim) as a JSON list of numbers."""
    return [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) for row in np.ascontiguousarray(array)]


def base64_rows(array: np.ndarray) -> list[bytes]:
    """Return each row's bytes as a JSON string in base64."""
    return [b'"%b"' % base64.b64encode(row) for row in np.ascontiguousarray(array)]


def numbers(vectors: np.ndarray, dtype: EmbedDtype, endianness: Endianness = "native") -> np.ndarray:
    """Return float32 (n, dim) in another type and order of bytes; the native order is the little one here."""
    array = convert(vectors, dtype)
    return array.byteswap() if endianness == "big" else np.ascontiguousarray(array)


def embedding_texts(
    vectors: np.ndarray,
    encoding_format: EncodingFormat,
    dtype: EmbedDtype = "float32",
    endianness: Endianness = "native",
) -> list[bytes]:
    """Return each row of float32 (n, dim) as JSON: numbers, or base64 of them as `dtype`."""
    if encoding_format == "base64":
        return base64_rows(numbers(vectors, dtype, endianness))
    return json_rows(convert(vectors, "float32"))


# --- errors: a superset of what OpenAI's and Pharia's clients read ---------------------------------


def error_body(error: EmbeddingError) -> bytes:
    """Return the error as JSON."""
    return orjson.dumps({"error": error_detail(error), "code": error.code})


def error_detail(error: EmbeddingError) -> dict[str, str | None]:
    """Return what `ErrorDetail` describes."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """The body of every error. `code` stands twice since Pharia's clients read the outer one."""

    error: ErrorDetail
    code: str
