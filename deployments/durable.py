"""Files that are there whole or not at all, and on the disk before anything counts on them."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PRIVATE = 0o600


@contextlib.contextmanager
def replacing(file: Path, mode: int = PRIVATE) -> Iterator[IO[bytes]]:
    """Give a file to write into, which takes the place of `file` once the block has ended well."""
    draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}~")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as target:
            yield target
            settle(target)
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    settle_folder(file.parent)


def settle(target: IO[Any]) -> None:
    """Bring what was written to the disk."""
    target.flush()
    os.fsync(target.fileno())


def settle_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
