"""Validation: a file of requests, read once, becomes the plan of its batch.

The whole batch fails only where nothing in it could be run or where it is over a limit; else each bad line is
an error of its own when its turn comes.
"""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from deployments.api.batches import LineError, parse_line
from deployments.api.batches.schema import BatchError
from deployments.batches.records import Block, Plan

# OpenAI's own limits.
MAX_LINES = 50_000
MAX_INPUTS = 50_000
# As large as a request's body may be by default.
MAX_LINE_BYTES = 32 * 2**20
# A block is what is in memory at a time, and what a restart may have to repeat: its lines, and all vectors
# of these as text, some KiB each.
BLOCK_LINES = 500
BLOCK_INPUTS = 2048
BLOCK_BYTES = 4 * 2**20
# How many reasons a batch that failed shows.
MAX_SHOWN = 10
DIGEST_BYTES = 16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class BatchFailed(Exception):  # noqa: N818 - what becomes of it, not a mistake of ours
    """The batch can't be run."""

    def __init__(self, *errors: BatchError) -> None:
        """Keep the reasons."""
        super().__init__(*errors)
        self.errors = errors


@dataclass(frozen=True)
class RawLine:
    """A line that isn't blank: its number from 1, where it begins and ends in the file, its bytes."""

    number: int
    start: int
    end: int
    raw: bytes


async def read_lines(chunks: AsyncIterator[bytes], start: int = 0, first: int = 1) -> AsyncIterator[RawLine]:
    """Yield the lines of a file, or of a part of it that begins with line `first` at byte `start`.

    Raises BatchFailed at a line that is too long.
    """
    rest = bytearray()
    number = first
    async for chunk in chunks:
        rest += chunk
        begin = 0
        while (end := rest.find(b"\n", begin)) >= 0:
            if line := _strip(rest[begin:end], start):
                yield RawLine(number, start, start + end + 1 - begin, line)
            start += end + 1 - begin
            number += 1
            begin = end + 1
        del rest[:begin]
        if len(rest) > MAX_LINE_BYTES:
            what = f"the line is over the limit of {MAX_LINE_BYTES} bytes"
            raise BatchFailed(BatchError(code="line_too_long", message=what, line=number))
    if line := _strip(rest, start):
        yield RawLine(number, start, start + len(rest), line)


def _strip(line: bytearray, start: int) -> bytes:
    return bytes(line if start else line.removeprefix(BYTE_ORDER_MARK)).strip()


async def make_plan(chunks: AsyncIterator[bytes], pieces: tuple[str, ...]) -> Plan:
    """Return the plan of a file whose content lies in `pieces`. Raises BatchFailed."""
    planner = _Planner()
    async for line in read_lines(chunks):
        if line.start == 0 and line.raw.startswith(UTF16_MARKS):
            what = "the file is in UTF-16; it must be in UTF-8"
            raise BatchFailed(BatchError(code="invalid_encoding", message=what))
        planner.add(line)
    return planner.plan(pieces)


class _Planner:
    """Counts lines, cuts them into blocks, and finds those that repeat a `custom_id`."""

    def __init__(self) -> None:
        self._total = self._valid = self._inputs = 0
        self._blocks: list[Block] = []
        self._block_lines = self._block_inputs = 0
        self._seen: set[bytes] = set()
        self._repeated: list[int] = []
        self._models: set[str | None] = set()
        self._faults: list[BatchError] = []

    def add(self, line: RawLine) -> None:
        inputs = 1
        try:
            parsed = parse_line(line.raw)
        except LineError as error:
            if len(self._faults) < MAX_SHOWN:
                fault = BatchError(
                    code=error.code, message=error.message, param=error.param, line=line.number
                )
                self._faults.append(fault)
            custom_id = error.custom_id
        else:
            custom_id = parsed.custom_id
            inputs = parsed.inputs
            self._valid += 1
            if len(self._models) < 2:
                self._models.add(parsed.model)
        self._note(custom_id, line.number)
        self._total += 1
        self._inputs += inputs
        if self._total > MAX_LINES:
            raise _over("too_many_requests", f"{MAX_LINES} requests")
        if self._inputs > MAX_INPUTS:
            raise _over("too_many_inputs", f"{MAX_INPUTS} inputs")
        self._put(line, inputs)

    def _note(self, custom_id: str | None, number: int) -> None:
        if custom_id is None:
            return
        digest = hashlib.blake2b(custom_id.encode("utf-8", "replace"), digest_size=DIGEST_BYTES).digest()
        if digest in self._seen:
            self._repeated.append(number)
        self._seen.add(digest)

    def _put(self, line: RawLine, inputs: int) -> None:
        """Append a line to the last block, or begin another one."""
        last = self._blocks[-1] if self._blocks else None
        if (
            last is not None
            and self._block_lines < BLOCK_LINES
            and self._block_inputs + inputs <= BLOCK_INPUTS
            and line.end - last.start <= BLOCK_BYTES
        ):
            self._blocks[-1] = last.model_copy(update={"end": line.end})
            self._block_lines += 1
            self._block_inputs += inputs
            return
        self._blocks.append(Block(start=line.start, end=line.end, first=line.number))
        self._block_lines, self._block_inputs = 1, inputs

    def plan(self, pieces: tuple[str, ...]) -> Plan:
        if not self._total:
            raise BatchFailed(BatchError(code="empty_file", message="the file holds no request"))
        if not self._valid:
            raise BatchFailed(*self._faults)
        return Plan(
            total=self._total,
            blocks=tuple(self._blocks),
            repeated=tuple(self._repeated),
            model=self._models.pop() if len(self._models) == 1 else None,
            pieces=pieces,
        )


def _over(code: str, what: str) -> BatchFailed:
    return BatchFailed(BatchError(code=code, message=f"a batch may hold {what}"))
