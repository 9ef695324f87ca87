"""Embeddings for Ray jobs: the replicas that serve HTTP, reached through their handles.

    client = EmbeddingClient("all-minilm-l6-v2")
    vectors = client.embed(texts)

It works in a task, an actor, a job, and in a driver outside of Ray Serve, which joins the cluster that
`RAY_ADDRESS` names or that runs on this machine. All clients of a process share one event loop on a thread of
its own and one queue for each model, so that threads and coroutines may use them as they like.
"""

import asyncio
import functools
import itertools
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from deployments.bulk.connection import Attempt, Connection, How, HowOptions
from deployments.bulk.connections import Connections, connections
from deployments.dispatch.catalog import Served
from deployments.engine import ModelCard

if TYPE_CHECKING:
    from ray.data import Dataset

# What `stream` and `embed_dataset` take at a time, unless told otherwise.
BATCH_TEXTS = 1024
# How many batches of a stream may be under way: enough for the replicas, few enough for the memory.
AHEAD = 8

COLUMN, OUTPUT = "text", "embedding"


@dataclass(frozen=True)
class _Link:
    """What a client has found."""

    connections: Connections
    connection: Connection
    served: Served
    card: ModelCard


class EmbeddingClient:
    """One model, by its public name.

    A full queue makes calls wait, and so does a model whose replicas are away, for `timeout_s` seconds. The
    work yields to people who wait for an answer, unless `bulk` is False.

    `dimensions`, `input_type`, `instruction` and `truncation` are what they are over HTTP. `column` and
    `output` name the columns that a batch of Ray Data has its texts in and gets its vectors in.
    """

    def __init__(
        self, model: str, *, column: str = COLUMN, output: str = OUTPUT, **how: Unpack[HowOptions]
    ) -> None:
        """Find the model and wait until a replica of it is there.

        Raises ModelNotFoundError that names those there are, InvalidRequestError for what the model can't do,
        ModelUnavailableError after `timeout_s`, ConnectionError where there is no cluster.
        """
        self.model = model
        self._columns = column, output
        self._how = How(**how)
        # Several clients of a process take turns, as callers over HTTP do.
        self._caller = uuid.uuid4().hex
        assert self._link  # what is wrong is told now

    @functools.cached_property
    def _link(self) -> "_Link":
        """The way to the model, from this process. One that travelled finds it at its first use."""
        found = connections()
        connection, served = found.submit(found.find(self.model, self._how.timeout_s)).result()
        card = found.submit(connection.describe(served, self._how)).result()
        return _Link(found, connection, served, card)

    @property
    def version(self) -> str:
        """The model package's version, as `/models` shows it."""
        return str(self._link.connection.dispatch.worker.queue.version)

    @property
    def engine_version(self) -> str:
        """What tells engines apart that give other vectors: the package, and how it is run."""
        return self._link.card.version

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return self._how.dimensions or self._link.card.dimension

    @property
    def max_model_len(self) -> int:
        """The most tokens of a text."""
        return self._link.card.max_model_len

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 vectors of shape (len(texts), dimension), in order.

        Raises the first error that a text of them met; ModelUnavailableError or DeadlineExceededError where
        no answer came for `timeout_s`.
        """
        return self._vectors(_wait(self._embed(texts)))

    async def aembed(self, texts: Sequence[str]) -> np.ndarray:
        """As `embed`, for coroutines; cancelling it drops the work."""
        if "_link" not in self.__dict__:
            await asyncio.to_thread(lambda: self._link)
        return self._vectors(await asyncio.wrap_future(self._embed(texts)))

    def attempt(self, texts: Sequence[Any]) -> Attempt:
        """As `embed`, but texts at fault don't spoil the others: the errors come beside the vectors."""
        return self._shaped(_wait(self._embed(texts)))

    def stream(self, texts: Iterable[str], batch_texts: int = BATCH_TEXTS) -> Iterator[np.ndarray]:
        """Yield the vectors of `batch_texts` texts after the other, in order.

        Texts are taken from the iterable as there is room for them: the memory that it needs doesn't grow.
        """
        return map(self._vectors, self.attempts(_batched(texts, batch_texts)))

    def attempts(self, batches: Iterable[Sequence[Any]], ahead: int = AHEAD) -> Iterator[Attempt]:
        """Yield an `attempt` for each batch, in order, at most `ahead` of them under way or not yet taken."""
        waiting: deque[Future[Attempt]] = deque()
        try:
            for batch in batches:
                if len(waiting) >= ahead:
                    yield self._shaped(waiting.popleft().result())
                waiting.append(self._embed(batch))
            while waiting:
                yield self._shaped(waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the vectors of a batch of Ray Data's: the column becomes a tensor of a fixed size."""
        column, output = self._columns
        return {**batch, output: self.embed(list(batch[column]))}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the way to the model behind: it is this process's own."""
        return {name: value for name, value in self.__dict__.items() if name != "_link"}

    def _embed(self, texts: Sequence[Any]) -> "Future[Attempt]":
        link = self._link
        return link.connections.submit(link.connection.embed(texts, link.served, self._how, self._caller))

    def _shaped(self, attempt: Attempt) -> Attempt:
        """Give vectors of no text their second dimension."""
        if len(attempt.vectors):
            return attempt
        return replace(attempt, vectors=np.empty((0, self.dimension), np.float32))

    def _vectors(self, attempt: Attempt) -> np.ndarray:
        """Return the vectors of texts that all have to be embedded."""
        for row, error in attempt.errors.items():
            raise type(error)(f"row {row}: {error.message}", error.param, error.retry_after)
        return self._shaped(attempt).vectors


def embed_dataset(  # noqa: PLR0913 - as above
    dataset: "Dataset",
    column: str,
    model: str,
    *,
    output: str = OUTPUT,
    batch_texts: int = BATCH_TEXTS,
    concurrency: int = 1,
    **how: Any,
) -> "Dataset":
    """Return a Ray dataset with the vectors of a column as a new one, a tensor column of a fixed size.

    `concurrency` is how many processes read ahead and tokenise; they take no CPU of Ray's, since the replicas
    have them. `how` is what `EmbeddingClient` takes.
    """
    from ray.data import ActorPoolStrategy

    return dataset.map_batches(
        EmbeddingClient,
        fn_constructor_args=(model,),
        fn_constructor_kwargs={**how, "column": column, "output": output},
        batch_size=batch_texts,
        compute=ActorPoolStrategy(size=concurrency),
        num_cpus=0,
    )


def _wait(future: "Future[Attempt]") -> Attempt:
    """Wait for a future; whoever is interrupted meanwhile drops the work."""
    try:
        return future.result()
    finally:
        future.cancel()


def _batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    waiting = iter(texts)
    while batch := list(itertools.islice(waiting, size)):
        yield batch
