"""Files of rows → slices of so many rows, in order, the same ones each time.

A slice's texts are whatever the column holds, since a row that can't be embedded is told with its reason; the
other columns travel along as a table.
"""

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from deployments.errors import InvalidRequestError, JobError, first_line
from deployments.jobs.inputs import InputFile, Inputs
from deployments.jobs.kinds import Faults

WITHOUT = "name the columns to keep without it"


@dataclass(frozen=True)
class Slice:
    """Some rows: the first one's number in the input, their texts, and the columns that are kept.

    Where a text is an error, the row can't be embedded or kept.
    """

    number: int
    first: int
    texts: list[Any]
    kept: pa.Table


@dataclass(frozen=True)
class Rows:
    """Rows of one file: their texts, or an error in place of one, and the file's columns that are kept."""

    file: InputFile
    texts: list[Any]
    kept: pa.Table


def rows_of(file: InputFile, texts: list[Any], kept: dict[str, pa.Array], faults: Faults) -> Rows:
    """Return rows out of their columns; what is wrong with one takes the place of its text."""
    for row, error in faults.items():
        if not isinstance(texts[row], InvalidRequestError):
            texts[row] = error
    # A table without a column has to be told how many rows it has.
    table = pa.table(kept) if kept else pa.table({"": pa.nulls(len(texts))}).select([])
    return Rows(file, texts, table)


class Source(ABC):
    """An input, or its first `limit` rows. `schema` is that of the columns that are kept."""

    schema: pa.Schema

    def __init__(self, inputs: Inputs, limit: int | None) -> None:
        """Count nothing yet; whoever inherits sets `schema` and the files' `counts`."""
        self.files = inputs.files
        self._partitions = inputs.partitions
        self._limit = limit
        self.counts: list[int] = []

    @property
    def rows(self) -> int:
        """How many rows there are."""
        rows = sum(self.counts)
        return rows if self._limit is None else min(rows, self._limit)

    def place(self, row: int) -> tuple[InputFile, int]:
        """Return the file of a row, and its number in that."""
        ends = list(itertools.accumulate(self.counts))
        number = bisect.bisect_right(ends, row)
        return self.files[number], row - (ends[number - 1] if number else 0)

    @abstractmethod
    def _rows(self) -> Iterator[Rows]:
        """Yield rows in order, as many at a time as is convenient."""

    def slices(self, rows: int, done: Container[int] = ()) -> Iterator[Slice]:
        """Yield slices of `rows` rows, the last may be shorter; those that are `done` are passed over.

        Raises JobError where a file can't be read further.
        """
        texts: list[Any] = []
        tables: list[pa.Table] = []
        number = 0
        for more, table in self._tables():
            texts += more
            tables.append(table)
            if len(texts) < rows:
                continue
            joined = pa.concat_tables(tables)
            begin = 0
            while len(texts) - begin >= rows:
                if number not in done:
                    end = begin + rows
                    yield Slice(number, number * rows, texts[begin:end], joined.slice(begin, rows))
                begin, number = begin + rows, number + 1
            texts, tables = texts[begin:], [joined.slice(begin)]
        if texts and number not in done:
            yield Slice(number, number * rows, texts, pa.concat_tables(tables))

    def _tables(self) -> Iterator[tuple[list[Any], pa.Table]]:
        """Yield texts and all kept columns, up to the limit."""
        left = self.rows
        for some in self._rows():
            table = some.kept if len(some.texts) <= left else some.kept.slice(0, left)
            for field in self.schema:
                if field.name not in table.column_names:  # it is a folder's name
                    value = pa.scalar(some.file.partition.get(field.name), field.type)
                    table = table.append_column(field, pa.repeat(value, table.num_rows))
            yield some.texts[:left], table.select(self.schema.names) if self.schema.names else table
            left -= table.num_rows
            if left <= 0:
                return


def unreadable(file: InputFile, error: BaseException) -> JobError:
    """Return the error of a file that can't be read."""
    return JobError(f"{file}: can't be read: {first_line(error)}")


def kept_names(
    names: Sequence[str], partitions: pa.Schema, column: str, keep: Sequence[str] | None, file: InputFile
) -> list[str]:
    """Return the columns that travel along, in the input's order; those of folders' names come last.

    Raises JobError for one that is missing.
    """
    known = list(dict.fromkeys([*names, *partitions.names]))
    for name in [column, *(keep or [])]:
        if name not in known:
            raise JobError(f"{file}: no column `{name}`; there are {', '.join(f'`{n}`' for n in known)}")
    if column not in names:
        raise JobError(f"{file}: column `{column}` is a folder's name, not text")
    return [name for name in known if keep is None or name in keep]


def check_once(names: Sequence[str], column: str, kept: Sequence[str], file: InputFile) -> None:
    """Raise JobError for a column that is needed and stands in a file twice."""
    for name in [column, *kept]:
        if names.count(name) > 1:
            advice = "" if name == column else f"; {WITHOUT}"
            raise JobError(f"{file}: has several columns `{name}`{advice}")
