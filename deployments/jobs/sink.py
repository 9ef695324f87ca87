"""What a job has done → its output, which appears whole: Parquet, `.npy`, Lance; its errors and record."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from deployments.durable import settle, settle_folder
from deployments.errors import JobError
from deployments.jobs.ledger import Ledger, write_whole
from deployments.jobs.rows import WITHOUT

# The number of a row in the input, counted from 0; rows with errors are left out.
ROW = "input_row"
# How much of a column's type is shown: one may hold others a thousand times over.
LONGEST_TYPE = 99


def vectors_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Return float32 (n, dim) as a column of lists of a fixed size, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def publish(ledger: Ledger, schema: pa.Schema, output_column: str) -> dict[str, Any]:
    """Put the output together and in its place; return its record. Raises JobError where something is there.

    May be killed at any moment and called again.
    """
    record_file = record_of(ledger.output)
    ready, whole = ledger.folder / "ready", ledger.folder / "output"
    if not ready.exists():
        remove(whole)
        FORMATS[ledger.output.suffix](ledger, whole, schema, output_column)
        write_whole(ready, True)
    record = {**ledger.identity, **_write_errors(ledger)}
    if whole.exists():
        _move(whole, ledger)
    # Last: it says that the output is that of this job.
    write_whole(record_file, record)
    ledger.remove()
    return record


def record_of(output: Path) -> Path:
    """Return the file that tells what an output was made of."""
    return output.with_name(f"{output.name}.manifest.json")


def errors_of(output: Path) -> Path:
    """Return the file that tells which rows are missing in an output, and why."""
    return output.with_name(f"{output.name}.errors.jsonl")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_format(output: Path) -> None:
    """Raise JobError for an output that can't be written."""
    if output.suffix not in FORMATS:
        raise JobError(f"{output}: an output's name ends in {', '.join(FORMATS)}")
    if output.suffix == ".lance" and importlib.util.find_spec("lance") is None:
        raise JobError(f"{output}: Lance needs `pip install 'embedding-cluster[lance]'`")


def check_holds(output: Path, source: Path, schema: pa.Schema) -> None:
    """Raise JobError for a column that the output's format, or the ledger's, has no place for."""
    for field in schema:
        try:
            _try(output.suffix, pa.schema([field]))
        except (pa.ArrowException, OSError, ValueError):  # their texts name a library's types and files
            kind = str(field.type)
            kind = kind if len(kind) <= LONGEST_TYPE else f"{kind[:LONGEST_TYPE]}…"
            what = f"column `{field.name}` holds {kind}, which a {output.suffix} can't"
            raise JobError(f"{source}: {what}; {WITHOUT}") from None


def _try(suffix: str, schema: pa.Schema) -> None:
    """Write a row of nulls and read it: some values are refused only then, and some names."""
    row = pa.table([pa.nulls(1, field.type) for field in schema], schema=schema)
    with pa.ipc.new_file(pa.BufferOutputStream(), schema) as writer:  # as the ledger does
        writer.write_table(row)
    if suffix == ".parquet":
        pa.parquet.write_table(row, written := pa.BufferOutputStream())
        pa.parquet.read_table(pa.BufferReader(written.getvalue()))
    if suffix != ".lance":
        return
    import lance

    with tempfile.TemporaryDirectory() as folder:
        lance.write_dataset(row, str(Path(folder, "row.lance"))).to_table()


def _move(whole: Path, ledger: Ledger) -> None:
    """Put what is whole in the output's place; what is there already goes only if it was said so."""
    output = ledger.output
    if ledger.overwrite:
        if output.is_dir():  # a folder can't take another one's place in one step
            shutil.rmtree(output)
        whole.replace(output)
    elif whole.is_dir():
        if output.exists():
            raise _in_the_way(output)
        whole.rename(output)
    else:
        try:
            os.link(whole, output)  # unlike a rename, it fails where something is
        except FileExistsError:
            if not output.samefile(whole):
                raise _in_the_way(output) from None
        whole.unlink()
    settle_folder(output.parent)


def _in_the_way(output: Path) -> JobError:
    return JobError(f"{output} has appeared meanwhile; move it away, then --resume")


def _write_errors(ledger: Ledger) -> dict[str, int]:
    """Write the errors' file, if there are any; return what can be counted."""
    counts = {"embedded": 0, "errors": 0, "tokens": 0}
    draft = ledger.folder / "errors"
    with draft.open("w") as target:
        for each in ledger.slices():
            counts["embedded"] += each.rows
            counts["errors"] += len(each.errors)
            counts["tokens"] += each.tokens
            for error in each.errors:
                target.write(json.dumps(asdict(error)) + "\n")
        settle(target)
    if counts["errors"]:
        draft.replace(errors_of(ledger.output))
    else:
        errors_of(ledger.output).unlink(missing_ok=True)
    return counts


def _write_parquet(ledger: Ledger, file: Path, schema: pa.Schema, _: str) -> None:
    with file.open("wb") as target:
        # Vectors hardly compress, and no value of theirs comes twice.
        with pa.parquet.ParquetWriter(target, schema, compression="zstd", use_dictionary=False) as writer:
            for each in ledger.slices():
                writer.write_table(each.table())
        settle(target)


def _write_npy(ledger: Ledger, file: Path, schema: pa.Schema, output_column: str) -> None:
    """The vectors alone, as many as the input has rows; those of rows with errors are NaN."""
    dimension = schema.field(output_column).type.list_size
    shape = (ledger.identity["rows"], dimension)
    with file.open("wb") as target:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(target, header)  # type: ignore[no-untyped-call]
        for each in ledger.slices():
            table = each.table()
            rows = table.column(ROW).to_numpy()
            errors = [error.row for error in each.errors]
            first = min([*rows[:1].tolist(), *errors])
            block = np.full((len(rows) + len(errors), dimension), np.nan, "<f4")
            values = table.column(output_column).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            block[rows - first] = values.reshape(-1, dimension)
            target.write(block.tobytes())
        settle(target)


def _write_lance(ledger: Ledger, folder: Path, schema: pa.Schema, _: str) -> None:
    import lance

    def batches() -> Iterator[pa.RecordBatch]:
        for each in ledger.slices():
            yield from each.table().to_batches()

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(folder))


FORMATS: dict[str, Callable[[Ledger, Path, pa.Schema, str], None]] = {
    ".parquet": _write_parquet,
    ".npy": _write_npy,
    ".lance": _write_lance,
}
