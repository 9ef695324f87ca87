"""Files whose rows come as columns: Parquet, Arrow, CSV."""

import contextlib
import re
import sys
from abc import abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from deployments.errors import InvalidRequestError, JobError
from deployments.jobs.inputs import InputFile, Inputs, text_stream
from deployments.jobs.kinds import UNFIT, Faults, cast, check_castable, is_text, texts_of, united
from deployments.jobs.rows import WITHOUT, Rows, Source, check_once, kept_names, rows_of, unreadable

READ_ROWS, READ_BYTES = 8192, 2**16
# pyarrow reads a CSV in blocks, each of which has to hold a whole row.
MAX_CSV_ROW_BYTES = 16 * 2**20
CANT_READ = (*UNFIT, OSError)
# What Arrow's own file format begins with; else it is a stream, as Hugging Face keeps data sets.
ARROW_FILE = b"ARROW1"
# What is wrong with a value of an Arrow file is its row's error.
OF_VALUES = ("UTF8", "whole number", "fit in precision", "acceptable range")
# A quote as Spark writes it by default: where it is an end of the cell every other reader takes the next ones
# for something else.
ESCAPED_QUOTE = re.compile(rb'\\"[^",\r\n]')
# Spark's old timestamps, which it writes in microseconds: as nanoseconds a year beyond 2262 comes out wrong.
INT96_UNIT = "us"
# What pyarrow says where it can't tell us of a bad row.
UNTOLD = re.compile(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+)")


class Columns(Source):
    """The schema holds the rows of all files; a column that a file lacks is null there."""

    def __init__(self, inputs: Inputs, column: str, keep: Sequence[str] | None, limit: int | None) -> None:
        """Read the files' schemas and count their rows. Raises JobError."""
        super().__init__(inputs, limit)
        self._column = column
        self._schemas: dict[str, pa.Schema] = {}
        for file in self.files:
            try:
                schema, rows = self._look(file)
                if schema is not None and schema.names is not None:  # they may not be UTF-8
                    self._schemas[file.name] = schema
            except CANT_READ as error:
                raise unreadable(file, error) from None
            self.counts.append(rows)
        self.schema = pa.schema(self._fields(keep))

    def _fields(self, keep: Sequence[str] | None) -> Iterator[pa.Field]:
        """Yield the columns that are kept. Raises JobError."""
        files = [file for file in self.files if file.name in self._schemas]
        if not files:
            return
        names = list(dict.fromkeys(name for schema in self._schemas.values() for name in schema.names))
        kept = kept_names(names, self._partitions, self._column, keep, files[0])
        for file in files:
            schema = self._schemas[file.name]
            check_once(schema.names, self._column, kept, file)
            kept_names(schema.names, self._partitions, self._column, [], file)
            kind = schema.field(self._column).type
            if not is_text(kind):
                raise JobError(f"{file}: column `{self._column}` holds {kind}, not text")
        for name in kept:
            kind = self._united(name, files) if name in names else self._partitions.field(name).type
            yield pa.field(name, kind)

    def _united(self, name: str, files: Sequence[InputFile]) -> pa.DataType:
        """Return the type of a column in all files."""
        found = pa.null()
        having = [file for file in files if name in self._schemas[file.name].names]
        kinds = [(file, self._schemas[file.name].field(name).type) for file in having]
        for file, kind in kinds:
            try:
                found = united([found, kind])
            except UNFIT:
                what = f"column `{name}` holds {kind}, and {found} in a file before"
                raise JobError(f"{file}: {what}, which no column can; {WITHOUT}") from None
        for file, kind in kinds:
            try:
                check_castable(kind, found)
            except UNFIT:
                what = f"column `{name}` holds {kind}, which no {found} can be made of"
                raise JobError(f"{file}: {what}; {WITHOUT}") from None
        return found

    @abstractmethod
    def _look(self, file: InputFile) -> tuple[pa.Schema | None, int]:
        """Return a file's schema, None where there isn't even that, and how many rows it has."""

    @abstractmethod
    def _batches(self, file: InputFile, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, Faults]]:
        """Yield a file's rows, and what is wrong with some of them."""

    def _rows(self) -> Iterator[Rows]:
        for file in self.files:
            if file.name not in self._schemas:
                continue
            theirs = self._schemas[file.name].names
            columns = [name for name in self.schema.names if name in theirs and name != self._column]
            try:
                for batch, faults in self._batches(file, [self._column, *columns]):
                    yield self._made(file, batch, faults)
            except CANT_READ as error:
                raise unreadable(file, error) from None

    def _made(self, file: InputFile, batch: pa.RecordBatch, faults: Faults) -> Rows:
        table = pa.Table.from_batches([batch])
        texts = texts_of(table.column(self._column))
        kept = {}
        for field in self.schema:
            if field.name in table.column_names:
                kept[field.name], wrong = cast(table.column(field.name), field)
                faults = wrong | faults
            elif field.name not in self._partitions.names:
                kept[field.name] = pa.nulls(table.num_rows, field.type)
        return rows_of(file, texts, kept, faults)


class Parquet(Columns):
    """Parquet, also Spark's."""

    def _open(self, file: InputFile) -> "pa.parquet.ParquetFile":
        return pa.parquet.ParquetFile(file.path, coerce_int96_timestamp_unit=INT96_UNIT)

    def _look(self, file: InputFile) -> tuple[pa.Schema | None, int]:
        with self._open(file) as opened:
            return opened.schema_arrow, opened.metadata.num_rows

    def _batches(self, file: InputFile, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, Faults]]:
        with self._open(file) as opened:
            for group in range(opened.num_row_groups):  # each has dictionaries of its own
                for batch in opened.iter_batches(READ_ROWS, row_groups=[group], columns=columns):
                    yield batch, {}


class Arrow(Columns):
    """Arrow's own file format, which Feather's second version is, or its stream format."""

    @contextlib.contextmanager
    def _open(self, file: InputFile) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
        with pa.memory_map(str(file.path)) as content:
            is_file = content.read(len(ARROW_FILE)) == ARROW_FILE
            content.seek(0)
            if not is_file:
                with pa.ipc.open_stream(content) as stream:
                    yield stream.schema, iter(stream)
                return
            with pa.ipc.open_file(content) as reader:
                yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))

    def _look(self, file: InputFile) -> tuple[pa.Schema | None, int]:
        with self._open(file) as (schema, batches):
            return schema, sum(batch.num_rows for batch in batches)

    def _batches(self, file: InputFile, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, Faults]]:
        with self._open(file) as (_, batches):
            for whole in batches:
                batch = whole.select(columns)
                _check_sound(batch)
                for begin in range(0, batch.num_rows, READ_ROWS):
                    yield batch.slice(begin, READ_ROWS), {}


def _check_sound(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid where a damaged file points beyond itself: whoever follows that ends, untold."""
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if not any(what in str(error) for what in OF_VALUES):
                raise


class Csv(Columns):
    """CSV has no types: all its columns are text. A row with too many or too few columns is an error."""

    @contextlib.contextmanager
    def _open(
        self, file: InputFile, bad: Faults, columns: list[str] | None = None
    ) -> Iterator["pa.csv.CSVStreamingReader"]:
        def note(row: "pa.csv.InvalidRow") -> str:
            # The header is row 1.
            what = f"the row has {row.actual_columns} columns, not {row.expected_columns}"
            bad[row.number - 2] = InvalidRequestError(what)
            return "skip"

        # Rows have numbers only where one thread reads them all.
        reading = pa.csv.ReadOptions(use_threads=False, block_size=MAX_CSV_ROW_BYTES)
        converting = pa.csv.ConvertOptions(
            default_column_type=pa.string(), include_columns=columns, check_utf8=False
        )
        parsing = pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note)
        if file.name in self._schemas:
            # In a CSV of one column an empty line is a row, unless it stands before the header.
            parsing.ignore_empty_lines = len(self._schemas[file.name]) > 1
        begin = 0 if parsing.ignore_empty_lines else _empty_bytes(file)
        with text_stream(file) as content:
            content.read(begin)
            with pa.csv.open_csv(content, reading, parsing, converting) as reader:
                yield reader

    def _look(self, file: InputFile) -> tuple[pa.Schema | None, int]:
        rows = bad = 0
        _check_quotes(file)
        try:
            with _silence():
                with self._open(file, {}) as reader:
                    self._schemas[file.name] = reader.schema
                for batch, faults in self._batches(file, None):
                    rows, bad = rows + batch.num_rows, bad + len(faults)
        except pa.ArrowInvalid as error:
            if "Empty CSV file" in str(error):  # as Spark leaves them for partitions without rows
                return None, 0
            if (found := UNTOLD.match(str(error))) is None:
                raise
            what = f"isn't UTF-8 and has {found[3]} columns, not {found[2]}"
            raise JobError(f"{file}: row {int(found[1]) - 2} {what}") from None
        if rows and rows == bad:
            raise JobError(f"{file}: no row has as many columns as the header")
        return self._schemas[file.name], rows

    def _batches(self, file: InputFile, columns: list[str] | None) -> Iterator[tuple[pa.RecordBatch, Faults]]:
        bad: Faults = {}
        row = 0
        try:
            with self._open(file, bad, columns) as reader:
                for batch in reader:
                    whole, faults = _with_gaps(batch, bad, row)
                    yield whole, faults
                    row += whole.num_rows
                schema = reader.schema
        except pa.ArrowInvalid as error:
            if "straddl" not in str(error):
                raise
            what = f"a row after the first {row} is longer than {MAX_CSV_ROW_BYTES} bytes"
            raise JobError(f"{file}: {what}") from None
        if bad:
            nothing = [pa.nulls(len(bad), field.type) for field in schema]
            yield pa.record_batch(nothing, schema=schema), {n - row: error for n, error in bad.items()}


def _check_quotes(file: InputFile) -> None:
    """Raise JobError where quotes stand behind a backslash: rows would be swallowed, and texts be others."""
    lines, rest = 1, b""
    with text_stream(file) as content:
        while part := content.read(MAX_CSV_ROW_BYTES):
            part = rest + part
            if found := ESCAPED_QUOTE.search(part):
                line = lines + part.count(b"\n", 0, found.start())
                how = "write it with quotes doubled, as Spark does with `escape` set to a quote"
                raise JobError(f"{file}: line {line} has a quote behind a backslash; {how}")
            rest = part[-2:]
            lines += part.count(b"\n", 0, len(part) - len(rest))


def _empty_bytes(file: InputFile) -> int:
    """Return how many bytes a file begins with that are a mark or empty lines."""
    with text_stream(file) as content:
        beginning = content.read(READ_BYTES)
    return len(beginning) - len(beginning.removeprefix(BOM_UTF8).lstrip(b"\r\n"))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Print no traceback of pyarrow's own: it can't tell of a bad row that isn't UTF-8, and ends there."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def _with_gaps(batch: pa.RecordBatch, bad: Faults, first: int) -> tuple[pa.RecordBatch, Faults]:
    """Return good rows, and between them nulls for the bad ones, which are taken out of `bad`."""
    if not bad:
        return batch, {}
    faults: Faults = {}
    taken: list[int | None] = []
    good = 0
    while good < batch.num_rows or first + len(taken) in bad:
        if (error := bad.pop(first + len(taken), None)) is not None:
            faults[len(taken)] = error
            taken.append(None)
        else:
            taken.append(good)
            good += 1
    return batch.take(pa.array(taken, pa.int64())), faults
