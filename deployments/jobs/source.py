"""Files of rows → slices of so many rows, in order, the same ones each time: Parquet, Arrow, CSV, JSON lines.

A slice's texts are whatever the column holds, since a row that can't be embedded is told with its reason; the
other columns travel along as a table.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from deployments.errors import InvalidRequestError, JobError

# How many rows of JSON lines become columns at a time, to find out their types.
TYPED_ROWS = 10_000
READ_ROWS = 8192


@dataclass(frozen=True)
class Slice:
    """Some rows: the first one's number in the input, their texts, and the columns that are kept."""

    number: int
    first: int
    texts: list[Any]
    kept: pa.Table


class Source(ABC):
    """An input. `rows` is how many there are, `schema` that of the columns that are kept."""

    rows: int
    schema: pa.Schema

    @abstractmethod
    def _tables(self) -> Iterator[tuple[list[Any], pa.Table]]:
        """Yield texts and kept columns of rows, in order, as many at a time as is convenient."""

    def slices(self, rows: int, done: Container[int] = ()) -> Iterator[Slice]:
        """Yield slices of `rows` rows, the last may be shorter; those that are `done` are passed over."""
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


class _Columns(Source):
    """Files whose rows come as columns."""

    def __init__(self, files: Sequence[Path], column: str, keep: Sequence[str] | None) -> None:
        schema = self._schema(files[0])
        names = _kept_names(schema.names, column, keep, files[0])
        self._files, self._column, self._names = files, column, names
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise JobError(f"{files[0]}: column `{column}` holds {kind}, not text")
        self.schema = pa.schema([schema.field(name).remove_metadata() for name in names])
        self.rows = sum(map(self._count, files))

    @abstractmethod
    def _schema(self, file: Path) -> pa.Schema: ...

    @abstractmethod
    def _count(self, file: Path) -> int: ...

    @abstractmethod
    def _batches(self, file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]: ...

    def _tables(self) -> Iterator[tuple[list[Any], pa.Table]]:
        columns = list(dict.fromkeys([*self._names, self._column]))
        for file in self._files:
            for batch in self._batches(file, columns):
                table = pa.Table.from_batches([batch])
                try:
                    kept = table.select(self._names).cast(self.schema)
                except (pa.ArrowInvalid, KeyError, ValueError) as error:
                    raise JobError(f"{file}: other columns than those of {self._files[0]}: {error}") from None
                yield table.column(self._column).to_pylist(), kept


class _Parquet(_Columns):
    def _schema(self, file: Path) -> pa.Schema:
        return pa.parquet.read_schema(file)

    def _count(self, file: Path) -> int:
        return int(pa.parquet.read_metadata(file).num_rows)

    def _batches(self, file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with pa.parquet.ParquetFile(file) as opened:
            yield from opened.iter_batches(READ_ROWS, columns=columns)


class _Arrow(_Columns):
    """Arrow's own file format, which Feather's second version is."""

    def _schema(self, file: Path) -> pa.Schema:
        with pa.memory_map(str(file)) as content, pa.ipc.open_file(content) as reader:
            return reader.schema

    def _count(self, file: Path) -> int:
        with pa.memory_map(str(file)) as content, pa.ipc.open_file(content) as reader:
            return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))

    def _batches(self, file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(file)) as content, pa.ipc.open_file(content) as reader:
            for i in range(reader.num_record_batches):
                batch = reader.get_batch(i).select(columns)
                for begin in range(0, batch.num_rows, READ_ROWS):
                    yield batch.slice(begin, READ_ROWS)


class _Csv(_Columns):
    """CSV has no types: all its columns are text."""

    def _open(self, file: Path, columns: list[str] | None = None) -> "pa.csv.CSVStreamingReader":
        return pa.csv.open_csv(
            file,
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(default_column_type=pa.string(), include_columns=columns),
        )

    def _schema(self, file: Path) -> pa.Schema:
        with self._open(file) as reader:
            return reader.schema

    def _count(self, file: Path) -> int:
        return sum(batch.num_rows for batch in self._batches(file, [self._column]))

    def _batches(self, file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
        try:
            with self._open(file, columns) as reader:
                yield from reader
        except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
            raise JobError(f"{file}: {error}") from None


class _JsonLines(Source):
    """An object on each line. A first pass finds the columns and their types."""

    def __init__(self, files: Sequence[Path], column: str, keep: Sequence[str] | None) -> None:
        self._files, self._column = files, column
        self._keep = keep
        self.rows = 0
        self.schema = pa.schema([])
        found: dict[str, None] = {}
        for objects in self._objects():
            self.rows += len(objects)
            rows = [self._others(each) for each in objects if isinstance(each, dict)]
            found |= dict.fromkeys(name for each in objects if isinstance(each, dict) for name in each)
            self.schema = self._joined(self.schema, rows)
        if self.rows:
            names = _kept_names(list(found), column, keep, files[0])
            text = [pa.field(column, pa.string())] if column in names else []
            others = [self.schema.field(name) for name in names if name != column]
            self.schema = pa.schema([*text, *others])

    def _others(self, row: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k != self._column and (self._keep is None or k in self._keep)}

    def _joined(self, schema: pa.Schema, rows: list[dict[str, Any]]) -> pa.Schema:
        names = list(dict.fromkeys(name for row in rows for name in row))
        for name in names:
            try:
                kind = pa.array([row.get(name) for row in rows]).type
                schema = pa.unify_schemas([schema, pa.schema([(name, kind)])], promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise JobError(
                    f"column `{name}` holds values of several kinds, which no column can; name the columns to"
                    f" keep without it: {error}"
                ) from None
        return schema

    def _objects(self) -> Iterator[list[Any]]:
        """Yield rows: objects, or the error that a line's text is in place of one."""
        for file in self._files:
            with file.open("rb") as lines:
                objects: list[Any] = []
                for line in lines:
                    objects.append(_object(line))
                    if len(objects) == TYPED_ROWS:
                        yield objects
                        objects = []
                yield objects

    def _tables(self) -> Iterator[tuple[list[Any], pa.Table]]:
        for objects in self._objects():
            texts = [each.get(self._column) if isinstance(each, dict) else each for each in objects]
            rows = [self._others(each) if isinstance(each, dict) else {} for each in objects]
            if self._column in self.schema.names:
                for row, text in zip(rows, texts, strict=True):
                    row[self._column] = text if isinstance(text, str) and _is_unicode(text) else None
            columns = [pa.array([row.get(f.name) for row in rows], f.type) for f in self.schema]
            if columns:
                yield texts, pa.Table.from_arrays(columns, schema=self.schema)
            else:
                yield texts, pa.table({"": pa.nulls(len(texts))}).select([])


def _object(line: bytes) -> Any:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return InvalidRequestError("the line isn't JSON")
    return row if isinstance(row, dict) else InvalidRequestError("the line isn't a JSON object")


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= each <= "\udfff" for each in text)


def _kept_names(names: list[str], column: str, keep: Sequence[str] | None, file: Path) -> list[str]:
    """Return the columns that travel along, in the input's order. Raises JobError for a missing one."""
    for name in [column, *(keep or [])]:
        if name not in names:
            raise JobError(f"{file}: no column `{name}`; there are {', '.join(f'`{n}`' for n in names)}")
    return [name for name in names if keep is None or name in keep]


FORMATS: dict[str, type[_Columns] | type[_JsonLines]] = {
    ".parquet": _Parquet,
    ".arrow": _Arrow,
    ".feather": _Arrow,
    ".csv": _Csv,
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
}


def input_files(path: Path) -> list[Path]:
    """Return the input's files: itself, or a folder's in the order of their names. Raises JobError."""
    if not path.exists():
        raise JobError(f"{path}: no such file")
    found = [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in FORMATS)
        if not found:
            raise JobError(f"{path}: holds no file named {', '.join(f'*{each}' for each in FORMATS)}")
    kinds = {file.suffix for file in found}
    if len(kinds) > 1 or not kinds <= set(FORMATS):
        known = ", ".join(FORMATS)
        raise JobError(f"{path}: the files' names must all end in one of {known}")
    return found


def open_source(path: Path, column: str, keep: Sequence[str] | None = None) -> Source:
    """Return the input's rows; `keep` names the columns that travel along, else all do. Raises JobError."""
    files = input_files(path)
    try:
        return FORMATS[files[0].suffix](files, column, keep)
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{path}: can't be read: {str(error).splitlines()[0]}") from None
