"""A path → the rows behind it: Parquet, Arrow, CSV, JSON lines; a file, or a folder of them."""

from collections.abc import Sequence
from pathlib import Path

from deployments.jobs.columns import Arrow, Columns, Csv, Parquet
from deployments.jobs.inputs import ARROW, CSV, LINES, PARQUET, find_inputs
from deployments.jobs.lines import JsonLines
from deployments.jobs.rows import Source

READERS: dict[str, type[Columns] | type[JsonLines]] = {
    PARQUET: Parquet,
    ARROW: Arrow,
    CSV: Csv,
    LINES: JsonLines,
}


def open_source(
    path: Path, column: str, keep: Sequence[str] | None = None, limit: int | None = None
) -> Source:
    """Return the input's rows, or its first `limit`; `keep` names the columns that travel along, else all do.

    Raises JobError for what no job could be done with.
    """
    inputs = find_inputs(path)
    return READERS[inputs.files[0].kind](inputs, column, keep, limit)
