"""What a job has done so far: a folder beside its output, with a file for each slice of rows.

A slice is written under another name, brought to the disk and renamed: a file that is there is whole. It
holds the rows, and beside them the errors of the rows that have none, and the tokens that they cost. So a
row is in one place, whatever is killed when.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from deployments.durable import replacing
from deployments.errors import JobError

ERRORS, TOKENS, ROWS = b"errors", b"tokens", b"rows"
# What stands in the way of another run, and what it says of itself.
RESUME, OVERWRITE = "--resume", "--overwrite"
# As any program makes its files; the umask takes its share.
READABLE = 0o666


@dataclass(frozen=True)
class Error:
    """A row that couldn't be embedded, and why: its number in the input, its file and its number in that."""

    row: int
    code: str
    reason: str
    file: str = ""
    row_in_file: int = 0
    column: str = ""


@dataclass(frozen=True)
class Written:
    """A slice as it was written; `rows` are those with vectors."""

    file: Path
    rows: int
    errors: list[Error]
    tokens: int

    def table(self) -> pa.Table:
        """Read the rows."""
        with pa.OSFile(str(self.file)) as content, pa.ipc.open_file(content) as reader:
            return reader.read_all().replace_schema_metadata()


class Ledger:
    """The folder `OUTPUT.parts` of a job that isn't done. One process at a time has it."""

    def __init__(self, output: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Begin, or go on where the last run of the same job was ended.

        `identity` is all that decides what the output will hold. Raises JobError where an output or another
        job's work is in the way, and where another process has the folder.
        """
        self.output = output
        self.identity = identity
        self.folder = output.with_name(f"{output.name}.parts")
        shutil.rmtree(self._gone, ignore_errors=True)
        if overwrite and not resume:
            self._discard()
        known = self._manifest()
        if known is not None and not resume:
            raise JobError(
                f"{self.folder} holds an unfinished job: {RESUME} goes on, {OVERWRITE} starts anew"
            )
        if known is None:
            check_free(output, overwrite)
        if known is not None:
            changed = differences(known["identity"], identity)
            if changed:
                raise JobError(f"{self.folder} is another job's: {changed}; {OVERWRITE} starts anew")
            overwrite = overwrite or known["overwrite"]
        self.overwrite = overwrite
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take()
        if known is None:
            write_whole(self._manifest_file, {"identity": identity, "overwrite": overwrite})
        self.done = {number for number, _ in self._files()}

    @property
    def _manifest_file(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def _gone(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts.done")

    def _manifest(self) -> dict[str, Any] | None:
        try:
            known: dict[str, Any] = json.loads(self._manifest_file.read_text())
        except FileNotFoundError:
            return None
        return known

    def _take(self) -> IO[str]:
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise JobError(f"{self.folder}: another process is at work on it") from None
        return lock

    def _discard(self) -> None:
        if self.folder.exists():
            self._take().close()
            shutil.rmtree(self.folder)

    def _files(self) -> Iterator[tuple[int, Path]]:
        for file in sorted(self.folder.glob("slice-*.arrow")):
            yield int(file.stem.partition("-")[2]), file

    def write(self, number: int, table: pa.Table, errors: list[Error], tokens: int) -> None:
        """Keep a slice for good."""
        content = json.dumps([astuple(each) for each in errors])
        counts = {TOKENS: str(tokens), ROWS: str(table.num_rows)}
        table = table.replace_schema_metadata({ERRORS: content, **counts})
        file = self.folder / f"slice-{number:09d}.arrow"
        with replacing(file, READABLE) as target, pa.ipc.new_file(target, table.schema) as writer:
            writer.write_table(table)
        self.done.add(number)

    def slices(self) -> Iterator[Written]:
        """Yield what was written, in the order of the input."""
        for _, file in self._files():
            with pa.OSFile(str(file)) as content, pa.ipc.open_file(content) as reader:
                metadata = reader.schema.metadata
            errors = [Error(*each) for each in json.loads(metadata[ERRORS])]
            yield Written(file, int(metadata[ROWS]), errors, int(metadata[TOKENS]))

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def remove(self) -> None:
        """Forget the work, now that the output is there. Renamed first: half of a folder is nobody's job."""
        self.folder.replace(self._gone)
        self.close()
        shutil.rmtree(self._gone, ignore_errors=True)


def check_free(output: Path, overwrite: bool) -> None:
    """Raise JobError where an output is there that may not be replaced."""
    if output.exists() and not overwrite:
        raise JobError(f"{output} is there already; {OVERWRITE} replaces it")


def differences(known: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return what of a job's identity is another one than it was; empty where nothing is."""
    wanted = json.loads(json.dumps(wanted))
    changed = [name for name in wanted if known.get(name) != wanted[name]]
    return ", ".join(
        f"{name} was {known.get(name)}, not {wanted[name]}" if name != "files" else "its input has changed"
        for name in changed
    )


def write_whole(file: Path, content: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    with replacing(file, READABLE) as target:
        target.write(json.dumps(content, indent=1).encode())
