"""One batch at work: plan → blocks, some at a time → lines, all of a block at once → output and error files.

A block's lines are stored before the progress names the block, and only then is it done: whoever takes over
goes on after what the progress names, and writes what isn't named there anew, in its place.
"""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deployments.api.batches import LineError, parse_line, refused_line, result_line, unasked_line
from deployments.api.batches.schema import EXPIRED, BatchError, FileObject, Status
from deployments.batches.records import (
    BATCH,
    FILE,
    Clock,
    Done,
    Order,
    Plan,
    Progress,
    sum_up,
)
from deployments.batches.store import Files, batch_folder, load, waiting_path
from deployments.batches.validation import BatchFailed, RawLine, make_plan, read_lines
from deployments.errors import EmbeddingError, FileMissingError, StorageUnavailableError
from deployments.keys.file import Key
from deployments.tracing import Attributes, traced

logger = logging.getLogger("ray.serve")

# One is embedded while another is read or stored.
BLOCKS_AT_ONCE = 2
# How often lines that have ended are counted, whatever a block takes.
TELL_SECONDS = 2.0
# A line's body without nulls, and the key that the work is for → the answer, and how many tokens were read.
Embed = Callable[[dict[str, Any], Key | None], Awaitable[tuple[bytes, int]]]
ID_LENGTH = 24
GONE = BatchError(code=FileMissingError.code, message="the input file is gone", param="input_file_id")


@dataclass(frozen=True)
class Place:
    """What a runner gives a batch for one run of it.

    `writer` is whose objects its lines go into: each time another one's, as a write may end late.
    `may_work` says whether a batch whose lines all name that model, or several of them, may go on.
    `check` raises where another runner has the storage by now.
    """

    writer: str
    may_work: Callable[[str | None], bool]
    check: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Outcome:
    """What a line became: a line of the output file, or one of the error file, or nothing yet."""

    output: bytes = b""
    error: bytes = b""
    tokens: int = 0

    @property
    def done(self) -> Done:
        """The line, counted."""
        return Done(completed=bool(self.output), failed=bool(self.error), tokens=self.tokens)


class BatchRun:
    """Runs a batch from where it is to its end, or no further than its plan where it may not work."""

    def __init__(  # noqa: PLR0913, PLR0917 - what a batch is, what it is run with
        self, owner: str, name: str, files: Files, embed: Embed, clock: Clock, place: Place
    ) -> None:
        """Do nothing yet. `key` has to be kept up to date."""
        self.owner = owner
        self.name = name
        self.key: Key | None = None
        self._files = files
        self._storage = files.storage
        self._folder = batch_folder(owner, name)
        self._embed = embed
        self._clock = clock
        self._place = place
        self._saving = asyncio.Lock()
        self._lines: set[asyncio.Task[Outcome]] = set()
        self._ending: Status | None = None
        self._errors: tuple[BatchError, ...] = ()
        self._order: Order | None = None
        self._progress = Progress()
        self._told = Done()

    @property
    def is_over(self) -> bool:
        """Whether its time has run out."""
        return self._order is not None and self._order.expires_at <= self._clock()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self._progress.is_final

    def end(self, status: Status, *errors: BatchError) -> None:
        """Let what is done be kept, and no more be done."""
        if self._ending is None:
            self._ending, self._errors = status, errors
            for line in self._lines:
                line.cancel()

    async def run(self) -> None:
        """Return when the batch has ended, or may not work. Cancelled, it can be run again, by anybody."""
        self._order = await load(self._storage, f"{self._folder}/order.json", Order)
        if self._order is None:
            return
        self._progress = await load(self._storage, f"{self._folder}/progress.json", Progress) or Progress()
        self._told = self._progress.shown
        if not self._progress.is_final:
            if self.is_over:
                self.end("expired")
            try:
                plan = await self._planned(self._order)
                if self._ending is None and not self._place.may_work(plan.model):
                    return
                await self._work(plan)
            except BatchFailed as error:
                self.end("failed", *error.errors)
            except (FileNotFoundError, FileMissingError):
                self.end("failed", GONE)
            await self._finish(self._order)
        await self._storage.remove(waiting_path(self.owner, self.name))

    async def _work(self, plan: Plan) -> None:
        """Embed what isn't done, up to the end that there is."""
        if self._progress.status == "validating":
            await self._save(
                status="in_progress", in_progress_at=self._now(), total=plan.total, model=plan.model
            )
        todo = iter([number for number in range(len(plan.blocks)) if number not in self._progress.done])
        workers = [asyncio.ensure_future(self._blocks(plan, todo)) for _ in range(BLOCKS_AT_ONCE)]
        telling = asyncio.ensure_future(self._tell())
        try:
            await asyncio.gather(*workers)
        finally:
            for task in (telling, *workers):
                task.cancel()
            await asyncio.gather(telling, *workers, return_exceptions=True)

    async def _tell(self) -> None:
        """Count what has ended of the blocks under way, every now and then, for whoever looks."""
        while True:
            await asyncio.sleep(TELL_SECONDS)
            if self._under_way() != self._progress.under_way:
                with contextlib.suppress(StorageUnavailableError):  # the blocks will meet it too
                    await self._save()

    def _under_way(self) -> Done:
        """Count lines that have ended and aren't stored, and no fewer than were told of before a restart."""
        now = sum_up(line.result().done for line in self._lines if line.done() and not line.cancelled())
        stored = sum_up(self._progress.done.values())
        return Done(
            completed=max(now.completed, self._told.completed - stored.completed),
            failed=max(now.failed, self._told.failed - stored.failed),
            tokens=max(now.tokens, self._told.tokens - stored.tokens),
        )

    async def _planned(self, order: Order) -> Plan:
        path = f"{self._folder}/plan.json"
        if (plan := await load(self._storage, path, Plan)) is None:
            record = await self._files.find(self.owner, order.input_file_id)
            plan = await make_plan(self._files.content(record), record.pieces)
            await self._storage.write(path, plan.text())
        return plan

    # --- blocks --------------------------------------------------------------------------------------

    async def _blocks(self, plan: Plan, todo: Iterator[int]) -> None:
        """Do one block after the other. When time has run out, the rest of them only say so."""
        repeated = frozenset(plan.repeated)
        for number in todo:
            if self._ending not in (None, "expired"):
                return
            block = plan.blocks[number]
            content = _once(self._storage.read_range(plan.pieces[0], block.start, block.end))
            lines = [line async for line in read_lines(content, block.start, block.first)]
            tasks = [asyncio.ensure_future(self._line(line, line.number in repeated)) for line in lines]
            self._lines.update(tasks)
            try:
                await asyncio.wait(tasks)
                outcomes = [
                    self._cut(line) if task.cancelled() else task.result()
                    for line, task in zip(lines, tasks, strict=True)
                ]
                done = await self._store(number, outcomes)
            finally:
                self._lines.difference_update(tasks)
                for task in tasks:
                    task.cancel()
            await self._save(done={**self._progress.done, number: done})

    async def _line(self, line: RawLine, repeated: bool) -> Outcome:
        """Embed a line, or say why not."""
        request_id = self._request_id(line)
        try:
            parsed = parse_line(line.raw)
            if repeated:
                what = "`custom_id` stands on an earlier line"
                raise LineError("duplicate_custom_id", what, "custom_id", parsed.custom_id)
        except LineError as error:
            return Outcome(error=unasked_line(request_id, line.number, error))
        if self._ending is not None:
            return self._cut(line)
        try:
            with traced("batch line", self._attributes(request_id)):
                answer, tokens = await self._embed(parsed.fields, self.key)
        except EmbeddingError as error:
            return Outcome(error=refused_line(request_id, parsed.custom_id, error))
        except Exception as error:
            # Its text may hold what the client sent.
            logger.error("internal error in a batch: %s", type(error).__name__)
            return Outcome(error=refused_line(request_id, parsed.custom_id, EmbeddingError("internal error")))
        return Outcome(result_line(request_id, parsed.custom_id, answer), tokens=tokens)

    def _attributes(self, request_id: str) -> Attributes:
        """Return what the trace of a line says of it."""
        attributes: Attributes = {"embedding.batch.id": self.name, "embedding.request.id": request_id}
        return attributes | ({"embedding.key": self.key.name} if self.key is not None else {})

    def _cut(self, line: RawLine) -> Outcome:
        """Return what becomes of a line that there was no time for."""
        if self._ending != "expired":
            return Outcome()
        try:
            custom_id = parse_line(line.raw).custom_id
            what = "the completion window ended before this request's turn"
            reason = LineError(EXPIRED, what, None, custom_id)
        except LineError as error:
            reason = error
        return Outcome(error=unasked_line(self._request_id(line), line.number, reason))

    def _request_id(self, line: RawLine) -> str:
        """Return the same id for the same line, however often it is run."""
        return hashlib.sha256(f"{self.name}:{line.number}".encode()).hexdigest()[:ID_LENGTH]

    async def _store(self, number: int, outcomes: list[Outcome]) -> Done:
        """Store a block's lines; return what then is done."""
        output = b"".join(each.output for each in outcomes)
        errors = b"".join(each.error for each in outcomes)
        own = {"output_bytes": len(output), "error_bytes": len(errors), "writer": self._place.writer}
        done = sum_up(each.done for each in outcomes).model_copy(update=own)
        for name, content in (("output", output), ("errors", errors)):
            if content:
                await self._storage.write(self._piece(name, number, done), content)
        return done

    def _piece(self, name: str, number: int, done: Done) -> str:
        """Return where a block's lines lie."""
        return f"{self._folder}/{name}/{number:06d}{'-' if done.writer else ''}{done.writer}"

    # --- the end --------------------------------------------------------------------------------------

    async def _finish(self, order: Order) -> None:
        """Let the files appear, then the end."""
        await self._place.check()
        status = self._ending or "completed"
        if status in ("completed", "expired"):
            await self._save(status="finalizing", finalizing_at=self._now())
        done = sorted(self._progress.done.items())
        outputs = {self._piece("output", n, each): each.output_bytes for n, each in done if each.output_bytes}
        errors = {self._piece("errors", n, each): each.error_bytes for n, each in done if each.error_bytes}
        await self._save(
            status=status,
            errors=self._errors,
            output_file_id=await self._add_file(order, "output", outputs),
            error_file_id=await self._add_file(order, "error", errors),
            **{f"{status}_at": self._now()},
        )

    async def _add_file(self, order: Order, what: str, pieces: dict[str, int]) -> str | None:
        """Make one file of what the blocks have stored; none of nothing."""
        if not pieces:
            return None
        # The same id however often it is made.
        made, digest = self.name.removeprefix(BATCH)[:12], hashlib.sha256(f"{self.name}:{what}".encode())
        now = self._now()
        file = FileObject(
            id=f"{FILE}{made}{digest.hexdigest()[:12]}",
            bytes=sum(pieces.values()),
            created_at=now,
            filename=f"{self.name}_{what}.jsonl",
            purpose="batch_output",
            expires_at=now + order.output_seconds if order.output_seconds else None,
        )
        return (await self._files.add(self.owner, file, tuple(pieces))).id

    async def _save(self, **changes: Any) -> None:
        # Changed at once, and written by one at a time: the last one to write knows of all.
        self._progress = self._progress.model_copy(update=changes)
        under_way = Done() if self._progress.is_final else self._under_way()
        self._progress = self._progress.model_copy(update={"under_way": under_way})
        async with self._saving:
            await self._place.check()
            await self._storage.write(f"{self._folder}/progress.json", self._progress.text())

    def _now(self) -> int:
        return int(self._clock())


async def _once(content: Awaitable[bytes]) -> AsyncIterator[bytes]:
    yield await content
