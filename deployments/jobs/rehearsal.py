"""A job without its vectors: everything is read, and what would be refused is told."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from deployments.bulk.connection import Attempt, mistake
from deployments.jobs.ledger import Error, check_free
from deployments.jobs.progress import Progress
from deployments.jobs.rows import Slice, Source
from deployments.jobs.run import Client, Job, check, error_of


class NoClient:
    """Knows only what is wrong with a text whatever the model."""

    model = version = engine_version = ""
    dimension = 0

    def attempts(self, batches: Iterator[list[Any]], ahead: int) -> Iterator[Attempt]:
        """Yield what is wrong with each batch's texts."""
        for batch in batches:
            wrong = {row: error for row, text in enumerate(batch) if (error := mistake(text)) is not None}
            yield Attempt(np.empty((len(batch) - len(wrong), 0), np.float32), dict(wrong))


def rehearse(job: Job, source: Source, client: Client, progress: Progress) -> Iterator[Error]:
    """Yield each row that would be refused, in order. Raises JobError for what ends the whole job."""
    check(job, source)
    check_free(job.output, job.overwrite or job.resume)
    read: deque[Slice] = deque()

    def texts() -> Iterator[list[Any]]:
        for each in source.slices(job.slice_rows):
            read.append(each)
            yield each.texts

    for attempt in client.attempts(texts(), 2):
        taken = read.popleft()
        for row, error in attempt.errors.items():
            yield error_of(job, source, taken.first + row, error)
        progress.done(len(taken.texts), attempt.tokens)
