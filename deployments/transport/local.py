"""Calls between two processes of one machine, over a socket of their own.

arguments → frame → Unix socket → the answering coroutine → frame → result or error

Ray Serve's handle brings a call to any replica on any node, and takes a millisecond each way for it on busy
cores, through gRPC's threads or Ray's. A call that stays on the machine needs none of them.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from deployments.errors import EmbeddingError, EngineCrashError
from deployments.transport.frames import Frames

logger = logging.getLogger("ray.serve")

# Each server makes a folder of its own, and the socket in it.
PREFIX, SOCKET = "embedding-calls-", "socket"


# --- the side that answers ------------------------------------------------------------------------------


class LocalServer:
    """Answers calls with a coroutine function, on a socket in a folder that is this user's alone.

    A file, not a name in the abstract namespace: that is the network's, which other containers may share.
    """

    def __init__(self, answer: Callable[..., Awaitable[Any]], place: str | None = None) -> None:
        """Listen on nothing yet; the socket's folder will be in `place`, or where temporary files are."""
        self._answer = answer
        self._place = place or tempfile.gettempdir()
        self._server: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._folder = ""
        self.address = ""

    async def start(self) -> None:
        """Listen at `address`, a path, which stays empty where there can be no socket."""
        _remove_stale(self._place)
        self._folder = tempfile.mkdtemp(prefix=PREFIX, dir=self._place)
        address = str(Path(self._folder, SOCKET))
        make = functools.partial(_Answers, self._answer, self._running)
        try:
            self._server = await asyncio.get_running_loop().create_unix_server(make, address)
        except (OSError, ValueError) as error:
            logger.warning("calls on this node go the way of all others: %s", error)
            self.close()
            return
        self.address = address

    def close(self) -> None:
        """Let nobody come any more, and remove the socket."""
        if self._server is not None:
            self._server.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        return bool(self._running)

    async def drain(self) -> None:
        """Wait until every call has been answered; those that come meanwhile too."""
        while self._running:
            await asyncio.wait(self._running.copy())


class _Answers(Frames):
    """One caller's connection, as the answering side sees it."""

    def __init__(self, answer: Callable[..., Awaitable[Any]], running: set[asyncio.Task[None]]) -> None:
        super().__init__()
        self._answer = answer
        self._running = running
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def received(self, number: int, body: memoryview) -> None:
        """Begin a call, or take one back."""
        if not body:
            if (begun := self._tasks.get(number)) is not None:
                begun.cancel()
            return
        task = asyncio.get_running_loop().create_task(self._call(number, body))
        self._tasks[number] = task
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for these calls any more."""
        for task in self._tasks.values():
            task.cancel()

    async def _call(self, number: int, body: memoryview) -> None:
        try:
            result: Any = await self._answer(*pickle.loads(body))  # noqa: S301 - of this user's own process
        except Exception as error:
            result = error
        try:
            body_back = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
        except Exception:  # whatever it is, somebody waits for an answer
            body_back = pickle.dumps(EmbeddingError("internal error"), pickle.HIGHEST_PROTOCOL)
            logger.exception("an answer can't be pickled")
        self.send(number, body_back)


# --- the side that asks ---------------------------------------------------------------------------------


class LocalClient:
    """Calls to the servers of one machine, by address. Lives on one event loop."""

    def __init__(self) -> None:
        """Connect to nothing yet."""
        self._connections: dict[str, _Calls] = {}
        self._connecting: dict[str, asyncio.Task[None]] = {}

    def reaches(self, address: str) -> bool:
        """Whether a call can be made now. Where not, a connection is begun for later ones."""
        if address in self._connections:
            return True
        if address not in self._connecting:
            task = asyncio.get_running_loop().create_task(self._connect(address))
            self._connecting[address] = task
            task.add_done_callback(lambda _: self._connecting.pop(address, None))
        return False

    def call(self, address: str, *arguments: Any) -> "asyncio.Future[Any]":
        """Call a server that is reached. Cancelling the future takes the call back.

        The future raises what the other side raised, and EngineCrashError where it went away.
        """
        return self._connections[address].call(arguments)

    async def _connect(self, address: str) -> None:
        try:
            _, calls = await asyncio.get_running_loop().create_unix_connection(_Calls, address)
        except OSError:
            return  # the replica has gone; whoever names its address will notice
        if not calls.is_lost:
            self._connections[address] = calls
            calls.when_lost = lambda: self._connections.pop(address, None)


class _Calls(Frames):
    """One connection, as the asking side sees it."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.is_lost = False
        self.when_lost: Callable[[], object] = lambda: None

    def call(self, arguments: tuple[Any, ...]) -> "asyncio.Future[Any]":
        """Send a call."""
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._end(number))
        self.send(number, pickle.dumps(arguments, pickle.HIGHEST_PROTOCOL))
        return future

    def received(self, number: int, body: memoryview) -> None:
        """Hand a result to whoever waits for it."""
        future = self._waiting.pop(number, None)
        if future is None or future.done():
            return
        try:
            result = pickle.loads(body)  # noqa: S301 - of this user's own process
        except Exception as error:
            result = error
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is under way."""
        self.is_lost = True
        self.when_lost()
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(EngineCrashError("the replica is gone"))

    def _end(self, number: int) -> None:
        """A future is done; if it still waited for an answer, it was cancelled."""
        if self._waiting.pop(number, None) is not None:
            self.send(number, b"")


def _remove_stale(place: str) -> None:
    """Remove this user's folders whose process was killed: nobody listens there any more."""
    for folder in Path(place).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            if folder.stat().st_uid != os.getuid():
                continue
            probe.setblocking(False)  # one that hangs may have as many waiting as it takes
            try:
                probe.connect(str(folder / SOCKET))
            except ConnectionRefusedError:  # one that is being made has no socket yet
                shutil.rmtree(folder, ignore_errors=True)
