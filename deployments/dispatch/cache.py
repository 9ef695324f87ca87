"""An exact cache of vectors, bounded by the memory that it takes; the least recently used go first."""

import numpy as np
from cachetools import LRUCache

# What Python itself needs for an entry: two objects, an array's header, places in two dictionaries.
ENTRY_BYTES = 400

_Entry = tuple[np.ndarray, int]


class VectorCache:
    """Vectors by all that makes them: the model's version and the token ids, both whole in the key."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty; `max_bytes` counts keys, vectors and what Python adds."""
        self._entries: LRUCache[bytes, _Entry] = LRUCache(max_bytes, lambda entry: entry[1])

    @property
    def max_bytes(self) -> int:
        """The bound, in bytes."""
        return int(self._entries.maxsize)

    @property
    def size(self) -> int:
        """How much of it is taken."""
        return int(self._entries.currsize)

    def get(self, key: bytes) -> np.ndarray | None:
        """Return the float32 vector of shape (dimension,), if it is there."""
        entry = self._entries.get(key)
        return entry[0] if entry is not None else None

    def put(self, key: bytes, vector: np.ndarray) -> None:
        """Keep a copy of the vector; others make room for it."""
        size = len(key) + vector.nbytes + ENTRY_BYTES
        if size <= self._entries.maxsize:
            self._entries[key] = vector.copy(), size  # a view would keep its whole batch alive
