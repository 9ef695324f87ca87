"""One job from end to end: source → slices → client → ledger → output."""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute

from deployments.bulk.connection import Attempt, How
from deployments.errors import EmbeddingError, JobError
from deployments.jobs.ledger import Error, Ledger, differences
from deployments.jobs.progress import Progress
from deployments.jobs.rows import WITHOUT, Slice, Source
from deployments.jobs.sink import ROW, check_format, check_holds, publish, record_of, vectors_column

# A part is as much work as may be lost when the job is killed; its slices are written one by one, so that the
# replicas never wait for the end of a part.
PART_ROWS = 8192
SLICES_PER_PART = 8


class Client(Protocol):
    """What a job needs of `EmbeddingClient`."""

    model: str

    @property
    def version(self) -> str:
        """The model package's."""

    @property
    def engine_version(self) -> str:
        """What tells engines apart that give other vectors."""

    @property
    def dimension(self) -> int:
        """The length of a vector."""

    def attempts(self, batches: Iterator[list[Any]], ahead: int) -> Iterator[Attempt]:
        """Yield what became of each batch, in order."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to embed, how, and where to."""

    source: Path
    output: Path
    column: str
    how: How
    output_column: str = "embedding"
    part_rows: int = PART_ROWS
    resume: bool = False
    overwrite: bool = False

    @property
    def slice_rows(self) -> int:
        """Rows that are written at a time."""
        return max(1, self.part_rows // SLICES_PER_PART)


def run(job: Job, source: Source, client: Client, progress: Progress) -> dict[str, Any]:
    """Do the job, or the rest of it; return its record.

    Raises JobError where it can't be done as it was asked for, and the client's errors where no replica
    answers; what was done until then is kept.
    """
    check(job, source)
    identity = identity_of(job, source, client)
    if job.resume and (record := _record(job, identity)) is not None:
        return record
    ledger = Ledger(job.output, identity, job.resume, job.overwrite)
    try:
        progress.resumed(*_done(ledger))
        _embed(job, source, client, ledger, progress)
        if _done(ledger)[0] != source.rows:
            raise JobError(f"{job.source}: has changed since the job began; begin it anew with --overwrite")
        return publish(ledger, schema_of(job, source, client), job.output_column)
    finally:
        ledger.close()


def check(job: Job, source: Source) -> None:
    """Raise JobError where the output couldn't hold what there is to be in it."""
    check_format(job.output)
    for name in {ROW, job.output_column} & set(source.schema.names):
        raise JobError(f"{job.source}: has a column `{name}` already; {WITHOUT}")
    check_holds(job.output, job.source, source.schema)
    if job.source.is_dir() and job.source.resolve() in job.output.resolve().parents:
        raise JobError(f"{job.output}: would stand among the files of the input, {job.source}")


def identity_of(job: Job, source: Source, client: Client) -> dict[str, Any]:
    """Return all that decides what the output holds."""
    files = [(file.name, file.path.stat()) for file in source.files]
    how = {k: v for k, v in asdict(job.how).items() if k not in ("bulk", "timeout_s", "dry_run")}
    return {
        "input": str(job.source.resolve()),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
        "rows": source.rows,
        "columns": source.schema.names,
        "column": job.column,
        "output_column": job.output_column,
        "slice_rows": job.slice_rows,
        "model": client.model,
        "version": client.version,
        "engine_version": client.engine_version,
        "dimension": client.dimension,
        **how,
    }


def schema_of(job: Job, source: Source, client: Client) -> pa.Schema:
    """Return the output's columns: the row's number, those of the input, the vector."""
    vector = pa.list_(pa.float32(), client.dimension)
    return pa.schema([(ROW, pa.int64()), *source.schema, (job.output_column, vector)])


def _record(job: Job, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of an output that this very job has made."""
    ended = job.output.exists() and not job.output.with_name(f"{job.output.name}.parts").exists()
    if not ended or not record_of(job.output).exists():
        return None
    record: dict[str, Any] = json.loads(record_of(job.output).read_text())
    return None if differences(record, identity) else record


def _done(ledger: Ledger) -> tuple[int, int]:
    rows = tokens = 0
    for each in ledger.slices():
        rows += each.rows + len(each.errors)
        tokens += each.tokens
    return rows, tokens


def error_of(job: Job, source: Source, row: int, error: EmbeddingError) -> Error:
    """Return what is told of a row that can't be embedded."""
    file, place = source.place(row)
    known = error.param is not None and error.param in source.schema.names
    column = str(error.param) if known else job.column
    return Error(row, error.code, error.message, file.name, place, column)


def _embed(job: Job, source: Source, client: Client, ledger: Ledger, progress: Progress) -> None:
    schema = schema_of(job, source, client)
    under_way: deque[Slice] = deque()

    def texts() -> Iterator[list[Any]]:
        for each in source.slices(job.slice_rows, set(ledger.done)):
            under_way.append(each)
            yield each.texts

    for attempt in client.attempts(texts(), min(SLICES_PER_PART, job.part_rows)):
        taken = under_way.popleft()
        if attempt.versions - {client.engine_version}:
            raise JobError(
                f"`{client.model}` has become another model meanwhile; an output holds the vectors of one"
            )
        errors = [error_of(job, source, taken.first + row, error) for row, error in attempt.errors.items()]
        good = pa.array([row for row in range(len(taken.texts)) if row not in attempt.errors], pa.int64())
        vectors = attempt.vectors.reshape(-1, client.dimension)
        kept = taken.kept.take(good)
        rows = pa.compute.add(good, taken.first)
        columns = [rows, *kept.columns, vectors_column(vectors)]
        ledger.write(taken.number, pa.table(columns, schema=schema), errors, attempt.tokens)
        progress.done(len(taken.texts), attempt.tokens)
