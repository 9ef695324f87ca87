"""Number formats of vectors, against torch's and the definitions."""

import numpy as np
import pytest

from deployments.api.encoding import check_dtype, convert
from deployments.errors import InvalidRequestError

VECTORS = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)


def test_bfloat16_rounds_as_torch_does() -> None:
    """To the nearest, ties to even, which is what vLLM sends."""
    import torch

    vectors = np.concatenate([VECTORS, np.array([[1.00390625, 1.01171875] * 32, [0, -0.0] * 32], "f4")])
    right = torch.from_numpy(vectors).to(torch.bfloat16).view(torch.int16).numpy().view("u2")
    assert np.array_equal(convert(vectors, "bfloat16"), right)


def test_small_integers_keep_cosines() -> None:
    """Each row uses the whole range; zeros stay zeros."""
    small = convert(VECTORS, "int8").astype(np.float32)
    assert np.abs(small).max(axis=1).tolist() == [127] * 5
    cosines = (small * VECTORS).sum(1) / np.linalg.norm(small, axis=1) / np.linalg.norm(VECTORS, axis=1)
    assert cosines.min() > 0.9999
    assert np.array_equal(convert(VECTORS, "uint8"), convert(VECTORS, "int8").astype(np.int16) + 128)
    assert not convert(np.zeros((1, 8), np.float32), "int8").any()


def test_bits_say_which_numbers_are_positive() -> None:
    """The first number in the highest bit; `binary` is the same less 128."""
    row = np.array([[1, -1, 0, 2, -3, -4, 5, 6, -1, -1, -1, -1, -1, -1, -1, 1]], np.float32)
    assert convert(row, "ubinary").tolist() == [[0b10010011, 1]]
    assert convert(row, "binary").tolist() == [[0b10010011 - 128, 1 - 128]]
    with pytest.raises(InvalidRequestError):
        check_dtype("ubinary", 12, "embed_dtype")
