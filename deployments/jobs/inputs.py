"""A path → the files of rows in it, as people and Spark, pandas and Hugging Face lay them out.

What begins with `.` or `_` is a program's own (checksums, marks, logs), and so are the files in which Hugging
Face describes a data set. Folders named `column=value` make a column.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs

from deployments.errors import JobError, first_line

PARQUET, ARROW, CSV, LINES = "Parquet", "Arrow", "CSV", "JSON lines"
FORMATS = {
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
    ".csv": CSV,
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": LINES,  # as Spark, pandas and Hugging Face name them
}
ENDINGS = ", ".join(FORMATS)
# Text is read through these; the other formats compress by themselves.
COMPRESSED = {".gz", ".bz2", ".zst", ".lz4"}
OF_PROGRAMS = (".", "_")
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# A folder that holds this is a Delta table: its log says which files count.
DELTA = "_delta_log"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class InputFile:
    """A file of rows: its path, its name as it is told, its format, and what its folders' names say."""

    path: Path
    name: str
    kind: str
    partition: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return its path."""
        return str(self.path)


@dataclass(frozen=True)
class Inputs:
    """A job's files, of one format, in the order of their names; `partitions` are columns of them all."""

    files: Sequence[InputFile]
    partitions: pa.Schema = field(default_factory=lambda: pa.schema([]))


def find_inputs(path: Path) -> Inputs:
    """Return the files behind a path: itself, or all in a folder. Raises JobError."""
    if not path.exists():
        raise JobError(f"{path}: no such file")
    if not path.is_dir():
        if (kind := _kind(path)) is None:
            raise JobError(f"{path}: the files' names must all end in one of {ENDINGS}")
        return Inputs([InputFile(path, path.name, kind)])
    if (path / DELTA).is_dir():
        raise JobError(f"{path}: is a Delta table, whose log says which files count; export it as Parquet")
    names = sorted(each.relative_to(path) for each in path.rglob("*") if _is_data(each, path))
    if not names:
        raise JobError(f"{path}: holds no file whose name ends in one of {ENDINGS}")
    kinds = {name: str(_kind(name)) for name in names}
    for name in names:
        if kinds[name] != kinds[names[0]]:
            raise JobError(
                f"{path}: {names[0]} is {kinds[names[0]]} and {name} is {kinds[name]}; a job reads one format"
            )
    partitions, values = _partitions(path, names)
    found = [
        InputFile(path / name, name.as_posix(), kinds[name], of_it)
        for name, of_it in zip(names, values, strict=True)
    ]
    return Inputs(found, partitions)


def _kind(path: Path) -> str | None:
    """Return a file's format by its name, None for another one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        kind = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in (CSV, LINES) else None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _is_data(file: Path, folder: Path) -> bool:
    names = file.relative_to(folder).parts
    return (
        not any(name.startswith(OF_PROGRAMS) for name in names)
        and file.name not in DESCRIPTIONS
        and _kind(file) is not None
        and file.is_file()
    )


def _partitions(folder: Path, names: Sequence[Path]) -> tuple[pa.Schema, list[dict[str, Any]]]:
    """Return the columns that folders named `column=value` make, and each file's values."""
    if not any("=" in part for name in names for part in name.parts[:-1]):
        return pa.schema([]), [{} for _ in names]
    root = folder.resolve()
    options = pa.dataset.FileSystemFactoryOptions(
        partition_base_dir=str(root), partitioning=pa.dataset.HivePartitioning.discover()
    )
    paths = [str(root / name) for name in names]
    # No file is opened, so that its format doesn't matter.
    factory = pa.dataset.FileSystemDatasetFactory(
        pa.fs.LocalFileSystem(), paths, pa.dataset.ParquetFileFormat(), options
    )
    try:
        schema = factory.inspect(fragments=0)
        found = {
            each.path: pa.dataset.get_partition_keys(each.partition_expression)
            for each in factory.finish(schema).get_fragments()
        }
    except pa.ArrowException as error:
        raise JobError(f"{folder}: its folders' names make no columns: {first_line(error)}") from None
    return schema, [found[path] for path in paths]


def text_stream(file: InputFile) -> pa.NativeFile:
    """Open a file of text as UTF-8 bytes, whatever it is compressed with; UTF-16 is read by its mark."""
    with pa.input_stream(str(file.path), compression="detect") as beginning:
        mark = beginning.read(2)
    content = pa.input_stream(str(file.path), compression="detect")
    return pa.transcoding_input_stream(content, "utf-16", "utf-8") if mark in UTF16 else content
