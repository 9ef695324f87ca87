"""JSON lines: an object on each line, as this or that program writes them.

A byte order mark is skipped, blank lines are no rows, and `NaN` and infinities are numbers.
"""

import io
import json
from bisect import bisect
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute

from deployments.errors import InvalidRequestError, JobError
from deployments.jobs.columns import CANT_READ
from deployments.jobs.inputs import InputFile, Inputs, text_stream
from deployments.jobs.kinds import UNFIT, Faults, built, inferred, reason, united
from deployments.jobs.rows import WITHOUT, Rows, Source, kept_names, rows_of, unreadable

# How many lines become columns at a time, to find out their types.
TYPED_ROWS = 10_000
# As a batch's lines.
MAX_LINE_BYTES = 32 * 2**20
BUFFER_BYTES = 2**20
# A row, or what is wrong with its line.
Row = dict[str, Any] | InvalidRequestError


class JsonLines(Source):
    """A first pass finds the columns and their types."""

    def __init__(self, inputs: Inputs, column: str, keep: Sequence[str] | None, limit: int | None) -> None:
        """Read all there is, or as far as the limit. Raises JobError."""
        super().__init__(inputs, limit)
        self._column, self._keep = column, keep
        self.counts = [0] * len(self.files)
        self._kinds: dict[str, pa.DataType] = {}
        self._signed: set[str] = set()
        found: dict[str, None] = {}
        for number, rows in self._read():
            found |= dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
            self._learn(self.files[number], self.counts[number], rows)
            self.counts[number] += len(rows)
        self.schema = pa.schema([])
        if not self.rows:
            return
        if not found:
            raise JobError(f"{self.files[0]}: no line is a JSON object")
        names = kept_names(list(found), self._partitions, column, keep, self.files[0])
        self.schema = pa.schema([(name, self._kind(name)) for name in names])

    def _kind(self, name: str) -> pa.DataType:
        if name == self._column:
            return pa.string()
        return self._kinds[name] if name in self._kinds else self._partitions.field(name).type

    def _learn(self, file: InputFile, first: int, rows: list[Row]) -> None:
        """Widen the columns' types by some rows. Raises JobError at the first that makes it impossible."""
        names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
        for name in names:
            if name == self._column or (self._keep is not None and name not in self._keep):
                continue
            values = _values(rows, name)
            try:
                self._kinds[name] = self._widened(name, values)
            except UNFIT as error:
                row = bisect(range(len(values)), False, key=lambda n: not self._goes(name, values[: n + 1]))
                raise JobError(
                    f"{file}: column `{name}` holds values of several kinds, which no column can, in row"
                    f" {first + row}: {reason(error)}; {WITHOUT}"
                ) from None

    def _goes(self, name: str, values: list[Any]) -> bool:
        try:
            self._widened(name, values)
        except UNFIT:
            return False
        return True

    def _widened(self, name: str, values: list[Any]) -> pa.DataType:
        """Return the type of a column that holds these values, too. Raises one of `UNFIT`."""
        try:
            array = inferred(values)
        except UnicodeError:  # those rows are errors, and no reason for any type
            array = inferred([value for value in values if _is_unicode(value)])
        known, kind = self._kinds.get(name, pa.null()), array.type
        if kind == pa.int64() and (least := pa.compute.min(array).as_py()) is not None and least < 0:
            self._signed.add(name)
        if {known, kind} == {pa.int64(), pa.uint64()} and name not in self._signed:
            return pa.uint64()
        return united([known, kind])

    def _read(self) -> Iterator[tuple[int, list[Row]]]:
        """Yield a file's number and some of its rows, up to the limit."""
        left = self._limit
        for number, file in enumerate(self.files):
            if left == 0:
                return
            rows: list[Row] = []
            try:
                for row in _objects(file):
                    if left == 0:
                        break
                    left = None if left is None else left - 1
                    rows.append(row)
                    if len(rows) == TYPED_ROWS:
                        yield number, rows
                        rows = []
            except CANT_READ as error:
                raise unreadable(file, error) from None
            yield number, rows

    def _rows(self) -> Iterator[Rows]:
        for number, rows in self._read():
            texts = [row.get(self._column) if isinstance(row, dict) else row for row in rows]
            kept = {}
            faults: Faults = {}
            for field in self.schema:
                if field.name == self._column:
                    values = [text if isinstance(text, str) and _is_unicode(text) else None for text in texts]
                    kept[field.name] = pa.array(values, field.type)
                elif field.name in self._kinds:
                    kept[field.name], wrong = built(_values(rows, field.name), field)
                    faults = wrong | faults
            yield rows_of(self.files[number], texts, kept, faults)


def _values(rows: list[Row], name: str) -> list[Any]:
    return [row.get(name) if isinstance(row, dict) else None for row in rows]


def _objects(file: InputFile) -> Iterator[Row]:
    """Yield a file's rows: objects, or an error in place of a line that is none."""
    with text_stream(file) as stream, io.BufferedReader(stream, BUFFER_BYTES) as lines:
        if lines.peek(len(BOM_UTF8)).startswith(BOM_UTF8):
            lines.read(len(BOM_UTF8))
        while line := lines.readline(MAX_LINE_BYTES):
            is_cut = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
            while is_cut and (rest := lines.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            if is_cut:
                yield InvalidRequestError(f"the line has {MAX_LINE_BYTES} bytes or more")
            elif not line.isspace():
                yield _object(line)


def _object(line: bytes) -> Row:
    try:
        # Unlike orjson, it takes NaN, and numbers of any size as they are.
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return InvalidRequestError("the line isn't UTF-8")
    except (ValueError, RecursionError):
        return InvalidRequestError("the line isn't JSON")
    if not isinstance(row, dict):
        return InvalidRequestError("the line isn't a JSON object")
    if not all(map(_is_unicode, row)):
        return InvalidRequestError("the name of a column isn't valid Unicode")
    return row


def _is_unicode(value: Any) -> bool:
    """Whether all text in a value can be written as UTF-8."""
    if isinstance(value, str) and value.isascii():
        return True
    try:
        pa.array([value])
    except UnicodeError:
        return False
    except UNFIT:
        return True
    return True
