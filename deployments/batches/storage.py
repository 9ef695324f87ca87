"""The seam to where files and batches lie: a local folder, or whatever fsspec opens by its URL.

Small objects are written in one step: a reader sees the old one, the new one, or none, and so does whoever
starts after a crash. Every call goes to a thread, since all of this may wait for disks and networks.
"""

import asyncio
import contextlib
import functools
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from deployments.durable import replacing, settle
from deployments.errors import ConfigError, StorageUnavailableError

T = TypeVar("T")
CHUNK_BYTES = 2**20
# Of its own: a disk or network that hangs takes them all, and shall take nobody else's.
_threads = ThreadPoolExecutor(16, thread_name_prefix="storage")
PRIVATE_FOLDER = 0o700


class Storage:
    """A tree of objects under one URL. Paths are relative, with `/` between their parts.

    Raises StorageUnavailableError wherever the storage fails.
    """

    def __init__(self, url: str) -> None:
        """Open a path or URL. Raises ConfigError where nothing installed can."""
        try:
            self._fs, root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(f"batches: {url}: {error}") from None
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def check(self) -> None:
        """Write something and remove it again. Raises ConfigError where that can't be done."""
        probe = f"{self._root}/.probe-{secrets.token_hex(8)}"
        try:
            self._write(probe, b"")
            self._fs.rm_file(probe)
        except Exception as error:  # each kind of storage has errors of its own
            raise ConfigError(f"batches: {self._root}: can't be written: {_reason(error)}") from None

    async def read(self, path: str) -> bytes | None:
        """Return an object, None where there is none."""
        return (await self.read_all([path])).get(path)

    async def read_all(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Return those of the objects that there are."""
        wanted = {f"{self._root}/{path}": path for path in paths}
        if not wanted:
            return {}
        found = await self._do(self._fs.cat, list(wanted), on_error="return")
        if not isinstance(found, dict):  # some return a single object as such
            found = {next(iter(wanted)): found}
        objects = {}
        for full, content in found.items():
            if isinstance(content, bytes):
                objects[wanted[full]] = content
            elif not isinstance(content, FileNotFoundError):
                raise StorageUnavailableError(f"the storage fails: {type(content).__name__}")
        return objects

    async def read_range(self, path: str, start: int, end: int) -> bytes:
        """Return a part of an object. Raises FileNotFoundError."""
        part: bytes = await self._do(self._fs.cat_file, f"{self._root}/{path}", start=start, end=end)
        return part

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        """Yield an object in chunks. Raises FileNotFoundError."""
        file = await self._do(self._fs.open, f"{self._root}/{path}", "rb")
        try:
            while chunk := await self._do(file.read, CHUNK_BYTES):
                yield chunk
        finally:
            await self._do(file.close)

    async def write(self, path: str, content: bytes) -> None:
        """Put an object in place, in one step."""
        await self._do(self._write, f"{self._root}/{path}", content)

    async def write_stream(self, path: str, chunks: AsyncIterator[bytes]) -> int:
        """Write an object as it comes; return its size. What isn't whole in the end is removed.

        Its folder, too, where nothing else is in it: whoever counts what lies there would count it.
        """
        full = f"{self._root}/{path}"
        await self._do(self._make_folder, full)
        file = await self._do(self._fs.open, full, "wb")
        size = 0
        try:
            async for chunk in chunks:
                await self._do(file.write, chunk)
                size += len(chunk)
            if self._is_local:
                await self._do(settle, file)
            await self._do(file.close)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                loop = asyncio.get_running_loop()
                await asyncio.shield(loop.run_in_executor(_threads, self._discard, file, full))
            raise
        return size

    async def names(self, folder: str) -> list[str]:
        """Return what lies right in a folder, sorted; nothing where there is no such folder."""
        try:
            found = await self._do(self._fs.ls, f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    async def size(self, folder: str) -> int:
        """Return how many bytes lie in a folder; nothing where there is no such folder."""
        try:
            return int(await self._do(self._fs.du, f"{self._root}/{folder}", total=True))
        except FileNotFoundError:  # also of what goes while it is counted
            return 0

    async def remove(self, path: str) -> None:
        """Remove an object, or a folder with all that is in it; be content where there is none."""
        with contextlib.suppress(FileNotFoundError):
            await self._do(self._fs.rm, f"{self._root}/{path}", recursive=True)

    async def _do(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        try:
            call = functools.partial(function, *arguments, **options)
            return await asyncio.get_running_loop().run_in_executor(_threads, call)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageUnavailableError(f"the storage fails: {_reason(error)}") from None

    def _make_folder(self, full: str) -> None:
        if self._is_local:
            Path(full).parent.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)

    def _write(self, full: str, content: bytes) -> None:
        if not self._is_local:
            self._fs.pipe_file(full, content)  # object stores show an object once it is whole
            return
        self._make_folder(full)
        with replacing(Path(full)) as file:
            file.write(content)

    def _discard(self, file: Any, full: str) -> None:
        if not self._is_local and hasattr(file, "discard"):
            file.discard()  # an upload in parts that was never finished
        else:
            file.close()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(full)
        if self._is_local:
            with contextlib.suppress(OSError):  # it isn't empty
                Path(full).parent.rmdir()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
