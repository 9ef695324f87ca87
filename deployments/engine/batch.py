"""What travels to a replica and back: token ids, flat; who calls; vectors."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Embedded:
    """A replica's answer: float32 vectors of shape (inputs, dimension), tokens, seconds in the engine.

    `tokens_per_second` is what the replica's engine does at its best, 0 where that isn't known yet.
    `not_finite` holds the indices of vectors with NaN or infinity in them, which are nobody's answer.
    """

    vectors: np.ndarray
    tokens: int
    engine_seconds: float
    tokens_per_second: float
    not_finite: tuple[int, ...] = ()


@dataclass(frozen=True)
class CallContext:
    """What goes along with a call: who makes it, for which model, and what else its sender has waiting.

    `version` is that of the model whose tokenizer made the ids; empty where any will do. A `bulk` call lets
    others go first, a `suspect` one may have ended an engine. `sender` is one process's dispatch;
    `outstanding_tokens` and `outstanding_requests` it has let in and not answered.
    """

    sender: str = ""
    number: int = 0
    version: str = ""
    bulk: bool = False
    suspect: bool = False
    outstanding_tokens: int = 0
    outstanding_requests: int = 0


NOBODY = CallContext()


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of `len(lengths)` inputs, one after the other.

    `ids` has shape (sum of lengths,) and `lengths` shape (inputs,), both int32. Two arrays pickle in
    microseconds, where lists of Python integers take a millisecond for a few thousand tokens.
    A token that the model reads and its pooling leaves out is there as `~id`, which is negative.
    """

    ids: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, inputs: Sequence[Sequence[int]]) -> "TokenBatch":
        """Join token id sequences."""
        lengths = np.fromiter(map(len, inputs), np.int32, len(inputs))
        total = int(lengths.sum())
        ids = np.fromiter(itertools.chain.from_iterable(inputs), np.int32, total)
        return cls(ids, lengths)

    @classmethod
    def join(cls, inputs: Sequence[np.ndarray]) -> "TokenBatch":
        """Join arrays of ids, each int32 of shape (length,)."""
        lengths = np.fromiter(map(len, inputs), np.int32, len(inputs))
        return cls(np.concatenate(inputs), lengths)

    def __len__(self) -> int:
        """Return the number of inputs."""
        return len(self.lengths)

    def __getitem__(self, inputs: slice) -> "TokenBatch":
        """Return some of the inputs, as views of the same arrays."""
        ends = np.cumsum(self.lengths)
        start, stop, _ = inputs.indices(len(self))
        first = int(ends[start] - self.lengths[start]) if start < stop else 0
        last = int(ends[stop - 1]) if start < stop else 0
        return TokenBatch(self.ids[first:last], self.lengths[start:stop])

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield each input's ids, a view of shape (length,)."""
        ends = np.cumsum(self.lengths)
        for start, end in zip(ends - self.lengths, ends, strict=True):
            yield self.ids[start:end]

    def unpooled(self, count: int) -> "TokenBatch":
        """Return the same inputs, with the first `count` tokens of each left out of the pooling."""
        starts = np.cumsum(self.lengths) - self.lengths
        places = np.arange(self.tokens) - np.repeat(starts, self.lengths)
        return TokenBatch(np.where(places < count, ~self.ids, self.ids), self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens of all inputs."""
        return len(self.ids)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of two arrays of shape (rows, dimension); NaN where a row is zero."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = (one * other).sum(axis=1) / norms
    return found
