"""What the storage holds of files and batches.

Each object has one writer. An ingress writes a file's record, and a batch's order and its cancellation, once
each; the runner writes the plan once, and the progress over and over.
"""

import re
import secrets
from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict

from deployments.api.batches.schema import (
    ENDPOINT,
    FINAL,
    WINDOW,
    Batch,
    BatchError,
    BatchErrors,
    BatchUsage,
    FileObject,
    Metadata,
    RequestCounts,
    Status,
)

FILE, BATCH = "file-", "batch_"
ID = re.compile(rf"(?:{FILE}|{BATCH})[0-9a-f]{{24}}")
MILLISECONDS = 1000
# Seconds since 1970.
Clock = Callable[[], float]


def new_id(kind: str, now: float) -> str:
    """Return an id that nobody guesses; ids sort by time."""
    return f"{kind}{int(now * MILLISECONDS):012x}{secrets.token_hex(6)}"


def is_id(text: str, kind: str) -> bool:
    """Whether a text from outside may be an id of that kind; nothing else becomes part of a path."""
    return text.startswith(kind) and ID.fullmatch(text) is not None


def made_at(name: str) -> float:
    """Return when an id was made."""
    return int(re.split("[-_]", name)[1][:12], 16) / MILLISECONDS


class Record(BaseModel):
    """Something that is stored as JSON."""

    model_config = ConfigDict(frozen=True)

    def text(self) -> bytes:
        """Return what is stored."""
        return self.model_dump_json().encode()


class FileRecord(Record):
    """A file: what is shown of it, and where its content lies, piece after piece."""

    shown: FileObject
    pieces: tuple[str, ...]

    def is_over(self, now: float) -> bool:
        """Whether its time is over."""
        return self.shown.expires_at is not None and self.shown.expires_at <= now


class Order(Record):
    """A batch as it was asked for."""

    id: str
    input_file_id: str
    metadata: Metadata | None = None
    output_seconds: int | None = None
    created_at: int
    expires_at: int


class Cancellation(Record):
    """That a batch is to end."""

    cancelling_at: int


class Block(Record):
    """A part of the input file: bytes `start` to `end`, in which line `first` (from 1) is the first one."""

    start: int
    end: int
    first: int


class Plan(Record):
    """What validation found: how many requests there are, cut into blocks, and what repeats a `custom_id`."""

    total: int
    blocks: tuple[Block, ...]
    repeated: tuple[int, ...] = ()  # line numbers
    model: str | None = None
    pieces: tuple[str, ...] = ()  # of the input file


class Done(Record):
    """What came out of a block; its lines are stored by then, in objects that end in `writer`.

    Each runner writes objects of its own, so that what one counts is never what another one wrote.
    """

    completed: int = 0
    failed: int = 0
    tokens: int = 0
    output_bytes: int = 0
    error_bytes: int = 0
    writer: str = ""


def sum_up(done: Iterable[Done]) -> Done:
    """Return what came out of several blocks."""
    done = tuple(done)
    return Done(
        completed=sum(each.completed for each in done),
        failed=sum(each.failed for each in done),
        tokens=sum(each.tokens for each in done),
    )


class Progress(Record):
    """How far a batch is. `done` holds the blocks that are, by their number.

    `under_way` counts lines of other blocks that have ended: they are shown, and run again where their block
    never comes to be stored.
    """

    status: Status = "validating"
    total: int = 0
    model: str | None = None
    done: dict[int, Done] = {}
    under_way: Done = Done()
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelled_at: int | None = None

    @property
    def shown(self) -> Done:
        """What of the batch is done, as it is told."""
        return sum_up([*self.done.values(), self.under_way])

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in FINAL


def batch_object(order: Order, progress: Progress, cancellation: Cancellation | None) -> Batch:
    """Return a batch as it is shown."""
    done = progress.shown
    cancelling = cancellation is not None and not progress.is_final
    cancelled = cancellation is not None and (cancelling or progress.status == "cancelled")
    return Batch(
        **progress.model_dump(exclude={"status", "total", "done", "under_way", "errors"}),
        id=order.id,
        endpoint=ENDPOINT,
        completion_window=WINDOW,
        input_file_id=order.input_file_id,
        metadata=order.metadata,
        created_at=order.created_at,
        expires_at=order.expires_at,
        status="cancelling" if cancelling else progress.status,
        cancelling_at=cancellation.cancelling_at if cancellation and cancelled else None,
        errors=BatchErrors(data=list(progress.errors)) if progress.errors else None,
        request_counts=RequestCounts(total=progress.total, completed=done.completed, failed=done.failed),
        usage=BatchUsage(input_tokens=done.tokens, total_tokens=done.tokens),
    )
