"""Files and batches by their owner: nobody finds another one's.

OWNER is the key's name, or `_` where there are no keys:

    files/OWNER/ID/record.json  content
    batches/OWNER/ID/order.json  cancellation.json  plan.json  progress.json  output/N  errors/N
    waiting/OWNER+ID            there while the batch isn't final: what the runner looks at
    runner.json                 who the runner is
"""

import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from deployments.api.batches import NewBatch, Page
from deployments.api.batches.schema import WINDOW_SECONDS, Batch, BatchList, FileList, FileObject
from deployments.batches.records import (
    BATCH,
    FILE,
    Cancellation,
    Clock,
    FileRecord,
    Order,
    Progress,
    Record,
    batch_object,
    is_id,
    new_id,
)
from deployments.batches.storage import Storage
from deployments.errors import BatchMissingError, FileMissingError, InvalidRequestError, QuotaError
from deployments.keys.file import Key

R = TypeVar("R", bound=Record)
# The owner of what is made without a key; no key has that name.
NOBODY = "_"
# How many objects are asked for at once.
READ_AT_ONCE = 100


def owner_of(key: Key | None) -> str:
    """Return whose the things are that come with a key."""
    return key.name if key is not None else NOBODY


def file_folder(owner: str, name: str) -> str:
    """Return where a file lies."""
    return f"files/{owner}/{name}"


def batch_folder(owner: str, name: str) -> str:
    """Return where a batch lies."""
    return f"batches/{owner}/{name}"


def waiting_path(owner: str, name: str) -> str:
    """Return the object that tells the runner of a batch."""
    return f"waiting/{owner}+{name}"


async def load(storage: Storage, path: str, kind: type[R]) -> R | None:
    """Return a record, None where there is none."""
    text = await storage.read(path)
    return None if text is None else kind.model_validate_json(text)


@dataclass(frozen=True)
class Quota:
    """What one owner may have: files, bytes of them and of what batches give, batches that aren't done."""

    files: int = 10_000
    bytes: int = 100 * 2**30
    batches: int = 100


class Files:
    """The files of all owners. Without another expiry a file is kept for `keep_seconds`."""

    def __init__(
        self, storage: Storage, keep_seconds: int, clock: Clock = time.time, quota: Quota | None = None
    ) -> None:
        """Keep them in a storage."""
        self.storage = storage
        self.quota = quota or Quota()
        self._keep_seconds = keep_seconds
        self._clock = clock

    def upload(self, owner: str) -> tuple[str, str]:
        """Return the id of a file that is to be made, and where its content goes."""
        name = new_id(FILE, self._clock())
        return name, f"{file_folder(owner, name)}/content"

    async def add(self, owner: str, file: FileObject, pieces: tuple[str, ...]) -> FileObject:
        """Let a file appear, whose content is stored already; set its expiry where it has none."""
        if file.expires_at is None:
            file = file.model_copy(update={"expires_at": file.created_at + self._keep_seconds})
        record = FileRecord(shown=file, pieces=pieces)
        await self.storage.write(f"{file_folder(owner, file.id)}/record.json", record.text())
        return file

    async def check_room(self, owner: str, files: int = 0, size: int = 0) -> None:
        """Raise QuotaError where an owner has no room for so many more files and bytes."""
        folder = f"files/{owner}"
        if len(await self.storage.names(folder)) + files > self.quota.files:
            raise QuotaError(f"there may be {self.quota.files} files of yours; delete some")
        used = await self.storage.size(folder) + await self.storage.size(f"batches/{owner}")
        if used + size > self.quota.bytes:
            raise QuotaError(f"your files may have {self.quota.bytes} bytes in all; delete some")

    def now(self) -> int:
        """Return the time in seconds."""
        return int(self._clock())

    async def find(self, owner: str, name: str, param: str | None = None) -> FileRecord:
        """Return a file. Raises FileMissingError."""
        record = None
        if is_id(name, FILE):
            record = await load(self.storage, f"{file_folder(owner, name)}/record.json", FileRecord)
        if record is None or record.is_over(self._clock()):
            raise FileMissingError("there is no file of that id", param)
        return record

    async def content(self, record: FileRecord) -> AsyncIterator[bytes]:
        """Yield a file's content."""
        for piece in record.pieces:
            async for chunk in self.storage.stream(piece):
                yield chunk

    async def list(self, owner: str, page: Page, purpose: str | None = None) -> FileList:
        """Return a part of an owner's files."""
        now = self._clock()

        def shown(texts: list[bytes | None]) -> FileObject | None:
            record = FileRecord.model_validate_json(texts[0]) if texts[0] is not None else None
            if record is None or record.is_over(now) or purpose not in (None, record.shown.purpose):
                return None
            return record.shown

        folder = f"files/{owner}"
        return FileList(**await _page(self.storage, page, _Folder(folder, FILE, ("record.json",), shown)))

    async def remove(self, owner: str, name: str) -> None:
        """Remove a file and its content. Raises FileMissingError."""
        record = await self.find(owner, name)
        # The record first: what is half removed isn't found any more.
        await self.storage.remove(f"{file_folder(owner, name)}/record.json")
        await self.forget(owner, name, record)

    async def forget(self, owner: str, name: str, record: FileRecord | None) -> None:
        """Remove what there is of a file."""
        for piece in record.pieces if record is not None else ():
            await self.storage.remove(piece)
        await self.storage.remove(file_folder(owner, name))


class Batches:
    """The batches of all owners, as the ingress sees them: it makes and cancels them, a runner works."""

    def __init__(self, files: Files, clock: Clock = time.time) -> None:
        """Keep them in the files' storage."""
        self.files = files
        self._storage = files.storage
        self._clock = clock

    async def create(self, owner: str, wanted: NewBatch) -> Batch:
        """Make a batch of a file. Raises FileMissingError, QuotaError."""
        record = await self.files.find(owner, wanted.input_file_id, "input_file_id")
        if record.shown.purpose != "batch":
            raise InvalidRequestError("the file's purpose must be `batch`", "input_file_id")
        await self.files.check_room(owner)
        waiting = [name.rpartition("+")[0] for name in await self._storage.names("waiting")]
        if waiting.count(owner) >= self.files.quota.batches:
            what = f"there may be {self.files.quota.batches} batches of yours that aren't done"
            raise QuotaError(f"{what}; wait for one, or cancel one")
        now = self._clock()
        order = Order(
            id=new_id(BATCH, now),
            input_file_id=wanted.input_file_id,
            metadata=wanted.metadata,
            output_seconds=wanted.output_seconds,
            created_at=int(now),
            expires_at=int(now) + WINDOW_SECONDS,
        )
        # First what the runner looks at: without an order it means nothing, and no order waits unseen.
        await self._storage.write(waiting_path(owner, order.id), b"")
        await self._storage.write(f"{batch_folder(owner, order.id)}/order.json", order.text())
        return batch_object(order, Progress(), None)

    async def find(self, owner: str, name: str) -> Batch:
        """Return a batch. Raises BatchMissingError."""
        if is_id(name, BATCH):
            folder = batch_folder(owner, name)
            texts = await self._storage.read_all(f"{folder}/{part}" for part in PARTS)
            if (batch := _batch([texts.get(f"{folder}/{part}") for part in PARTS])) is not None:
                return batch
        raise BatchMissingError("there is no batch of that id")

    async def list(self, owner: str, page: Page) -> BatchList:
        """Return a part of an owner's batches."""
        folder = _Folder(f"batches/{owner}", BATCH, PARTS, _batch)
        return BatchList(**await _page(self._storage, page, folder))

    async def cancel(self, owner: str, name: str) -> Batch:
        """Let a batch end. Raises BatchMissingError, InvalidRequestError where it has ended otherwise."""
        batch = await self.find(owner, name)
        if batch.status in ("completed", "failed", "expired"):
            raise InvalidRequestError(f"the batch is {batch.status}; it can't be cancelled any more")
        if batch.cancelling_at is None:
            cancellation = Cancellation(cancelling_at=int(self._clock()))
            path = f"{batch_folder(owner, name)}/cancellation.json"
            await self._storage.write(path, cancellation.text())
        return await self.find(owner, name)


@dataclass(frozen=True)
class BatchPlace:
    """Where files and batches are, by its URL, how long they are kept, and how much an owner may have."""

    url: str
    keep_seconds: int
    quota: Quota = Quota()

    def open(self) -> Batches:
        """Open it. Raises ConfigError."""
        return Batches(Files(Storage(self.url), self.keep_seconds, quota=self.quota))


PARTS = ("order.json", "progress.json", "cancellation.json")


def _batch(texts: list[bytes | None]) -> Batch | None:
    """Return a batch out of its parts, None where it has been removed."""
    order, progress, cancellation = texts
    if order is None:
        return None
    return batch_object(
        Order.model_validate_json(order),
        Progress.model_validate_json(progress) if progress is not None else Progress(),
        Cancellation.model_validate_json(cancellation) if cancellation is not None else None,
    )


S = TypeVar("S", FileObject, Batch)


@dataclass(frozen=True)
class _Folder(Generic[S]):
    """What lies in a folder: ids of a kind, in each these parts; what is shown of one, if anything."""

    path: str
    kind: str
    parts: tuple[str, ...]
    shown: Callable[[list[bytes | None]], S | None]


async def _page(storage: Storage, page: Page, folder: _Folder[S]) -> dict[str, Any]:
    """Return the fields of a listing: what a page shows of a folder; ids sort by time."""
    names = [name for name in await storage.names(folder.path) if is_id(name, folder.kind)]
    if not page.oldest_first:
        names.reverse()
    if (after := page.after) is not None:
        if not is_id(after, folder.kind):
            raise InvalidRequestError("`after` must be the id of the last one seen", "after")
        # It may be gone by now.
        names = [name for name in names if (name > after if page.oldest_first else name < after)]
    found: list[S] = []
    while names and len(found) <= page.limit:
        some, names = names[:READ_AT_ONCE], names[READ_AT_ONCE:]
        paths = [[f"{folder.path}/{name}/{part}" for part in folder.parts] for name in some]
        texts = await storage.read_all(itertools.chain.from_iterable(paths))
        each = (folder.shown([texts.get(path) for path in parts]) for parts in paths)
        found += [one for one in each if one is not None]
    shown = found[: page.limit]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return {"data": shown, "has_more": len(found) > page.limit, "first_id": first, "last_id": last}
