"""A path → the files of rows in it, as people and Spark, pandas and Hugging Face lay them out.

What begins with `.` or `_` is a program's own (checksums, marks, logs), and so are the files in which Hugging
Face describes a data set, and those that it keeps of what was made of one. Folders named `column=value` make
a column. Whatever else looks like rows and can't be read is told: it is never passed over.
"""

import codecs
import os
from collections.abc import Iterator, Sequence
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
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
UNREAD = {".xz", ".snappy", ".deflate", ".lzo", ".br", ".zip", ".zstd", ".lzma", *CODECS}
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Whose log says which of a folder's files count: others may hold the same rows.
LOGS = {
    "_delta_log": "a Delta table",
    ".hoodie": "a Hudi table",
    "_spark_metadata": "an output of Spark's streaming",
}
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
    for folder in path.resolve().parents:
        _check_no_table(folder, path)
    names = sorted(_data(path))
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
    if suffixes and suffixes[-1] in CODECS:
        kind = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in (CSV, LINES) else None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _data(folder: Path) -> Iterator[Path]:
    """Yield the names of the files of rows below a folder, links followed. Raises JobError."""

    def fail(error: OSError) -> None:
        raise JobError(f"{error.filename}: can't be read: {error.strerror}")

    seen = set()
    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        place = Path(here)
        if (real := place.resolve()) in seen:  # a link to what it stands in
            folders.clear()
            continue
        seen.add(real)
        _check_no_table(place, place)
        folders[:] = [name for name in folders if not _is_programs(name)]
        is_described = not DESCRIPTIONS.isdisjoint(files)
        for name in files:
            is_cache = is_described and name.startswith("cache-") and name.endswith(".arrow")
            if _is_programs(name) or name in DESCRIPTIONS or is_cache:
                continue
            file = place / name
            if _kind(file) is None:
                if file.suffix.lower() in UNREAD and (kind := _kind(file.with_suffix(""))) is not None:
                    raise JobError(f"{file}: {kind} isn't read from {file.suffix}")
                continue
            if not file.is_file():
                raise JobError(f"{file}: isn't a file, or a link that leads nowhere")
            yield file.relative_to(folder)


def _is_programs(name: str) -> bool:
    """Whether a name is that of a program's own file or folder, as Spark tells them."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _check_no_table(folder: Path, asked: Path) -> None:
    """Raise JobError where a log says which files of a folder count."""
    for log, what in LOGS.items():
        if (folder / log).is_dir():
            raise JobError(f"{asked}: is {what}, whose log says which files count; export it as Parquet")


def _partitions(folder: Path, names: Sequence[Path]) -> tuple[pa.Schema, list[dict[str, Any]]]:
    """Return the columns that folders named `column=value` make, and each file's values."""
    if not any("=" in part for name in names for part in name.parts[:-1]):
        return pa.schema([]), [{} for _ in names]
    root = folder.resolve()
    options = pa.dataset.FileSystemFactoryOptions(
        partition_base_dir=str(root), partitioning=pa.dataset.HivePartitioning.discover()
    )
    paths = [str(root / name) for name in names]
    try:
        # No file is opened, so that its format doesn't matter.
        factory = pa.dataset.FileSystemDatasetFactory(
            pa.fs.LocalFileSystem(), paths, pa.dataset.ParquetFileFormat(), options
        )
        schema = factory.inspect(fragments=0)
        found = {
            each.path: pa.dataset.get_partition_keys(each.partition_expression)
            for each in factory.finish(schema).get_fragments()
        }
    except (pa.ArrowException, UnicodeError) as error:
        raise JobError(f"{folder}: its folders' names make no columns: {first_line(error)}") from None
    return schema, [found[path] for path in paths]


def text_stream(file: InputFile) -> pa.NativeFile:
    """Open a file of text as UTF-8 bytes, whatever it is compressed with; UTF-16 is read by its mark."""
    codec = CODECS.get(file.path.suffix.lower())
    with pa.input_stream(str(file.path), compression=codec) as beginning:
        mark = beginning.read(2)
    content = pa.input_stream(str(file.path), compression=codec)
    return pa.TransformInputStream(content, _Utf8()) if mark in UTF16 else content


class _Utf8:
    """UTF-16 → UTF-8; half of a pair stays what it is, since it is its row's error."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")

    def __call__(self, part: bytes) -> bytes:
        """Return what a part holds; it is empty at the end."""
        return self._decoder.decode(part, not part).encode("utf-8", "surrogatepass")
