"""Calls over a socket of one machine: on asyncio's loop, and on uvloop's, which Ray Serve runs."""

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from deployments.engine.batch import Embedded, TokenBatch
from deployments.errors import ContextLengthError, EmbeddingError, EngineDeadError
from deployments.transport import local as local_calls
from deployments.transport.local import LocalClient, LocalServer

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Return what runs a coroutine."""
    return asyncio.run if request.param == "asyncio" else uvloop.run


async def connected(answer: Callable[..., Awaitable[Any]]) -> tuple[LocalServer, LocalClient]:
    """Return a server and a client that reaches it."""
    server, client = LocalServer(answer), LocalClient()
    await server.start()
    assert not client.reaches(server.address)
    await asyncio.gather(*client._connecting.values())
    assert client.reaches(server.address)
    return server, client


def test_each_call_gets_its_own_result(run: Run) -> None:
    """However many are under way, in whichever order they end, small ones and large ones."""

    async def embed(batch: TokenBatch, seconds: float) -> Embedded:
        await asyncio.sleep(seconds)
        return Embedded(
            np.repeat(batch.ids[:, None], 384, axis=1).astype(np.float32), batch.tokens, seconds, 1.0
        )

    async def check() -> None:
        server, client = await connected(embed)
        sizes = [1, 5000, 3, 64, 1, 2000]
        batches = [TokenBatch.of([list(range(n, n + size))]) for n, size in enumerate(sizes)]
        calls = [client.call(server.address, batch, 0.01 * (6 - n)) for n, batch in enumerate(batches)]
        for batch, embedded in zip(batches, await asyncio.gather(*calls), strict=True):
            assert embedded.vectors.shape == (batch.tokens, 384)
            assert embedded.vectors.dtype == np.float32
            assert np.array_equal(embedded.vectors[:, 383], batch.ids)
            assert embedded.tokens == batch.tokens

    run(check())


class _UnpicklableError(Exception):
    """Holds what can't be pickled."""

    def __init__(self) -> None:
        super().__init__(lambda: None)


def test_errors_arrive_as_they_were_raised(run: Run) -> None:
    """With all that they say; one that can't travel becomes an internal error, not a silence."""
    errors = [ContextLengthError("too long", "input[3]", 2.0), ValueError("odd"), _UnpicklableError()]

    async def fail(number: int) -> None:
        raise errors[number]

    async def check() -> None:
        server, client = await connected(fail)
        async with asyncio.timeout(60):
            with pytest.raises(ContextLengthError, match="too long") as caught:
                await client.call(server.address, 0)
            with pytest.raises(ValueError, match="odd"):
                await client.call(server.address, 1)
            with pytest.raises(EmbeddingError, match="internal error"):
                await client.call(server.address, 2)
        assert (caught.value.param, caught.value.retry_after) == ("input[3]", 2.0)

    run(check())


def test_a_cancelled_call_is_taken_back(run: Run) -> None:
    """The other side stops; the calls beside it go on."""
    begun, cancelled = asyncio.Semaphore(0), asyncio.Event()

    async def wait(seconds: float) -> float:
        begun.release()
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return seconds

    async def check() -> None:
        server, client = await connected(wait)
        long, short = client.call(server.address, 1000.0), client.call(server.address, 0.05)
        async with asyncio.timeout(60):
            await begun.acquire()
            await begun.acquire()
            long.cancel()
            await cancelled.wait()
            assert await short == 0.05
            await server.drain()
        assert not server.is_busy

    run(check())


def test_a_call_fails_when_its_server_goes(run: Run) -> None:
    """As it does when the engine dies; nobody is reached there from then on."""

    async def check() -> None:
        begun = asyncio.Event()

        async def wait() -> None:
            begun.set()
            await asyncio.sleep(1000)

        server, client = await connected(wait)
        call = client.call(server.address)
        async with asyncio.timeout(60):
            await begun.wait()
            server._server.close()  # type: ignore[union-attr]
            client._connections[server.address]._transport.abort()  # type: ignore[union-attr]
            with pytest.raises(EngineDeadError):
                await call
            # The caller's end is the end of its calls, too.
            await server.drain()
        assert not client.reaches(server.address)
        await asyncio.gather(*client._connecting.values())
        assert not client.reaches(server.address)

    run(check())


def test_draining_waits_for_the_last_answer(run: Run) -> None:
    """The caller has it then."""
    begun = asyncio.Event()

    async def slowly(number: int) -> int:
        begun.set()
        await asyncio.sleep(0.1)
        return number

    async def check() -> None:
        server, client = await connected(slowly)
        call = client.call(server.address, 7)
        async with asyncio.timeout(60):
            await begun.wait()
            assert server.is_busy
            await server.drain()
            assert await call == 7

    run(check())


def test_the_socket_is_in_a_folder_of_its_users_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever shares the network alone doesn't find it; nothing is left of it, nor of a killed process's."""

    async def check(temporary: str) -> None:
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        killed = Path(temporary, f"{local_calls.PREFIX}killed")
        killed.mkdir()
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(killed / local_calls.SOCKET))
        making = Path(temporary, f"{local_calls.PREFIX}making")
        making.mkdir()
        server, client = await connected(asyncio.sleep)
        path = Path(server.address)
        assert path.is_socket()
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert {each.name for each in Path(temporary).iterdir()} == {path.parent.name, making.name}
        other = LocalServer(asyncio.sleep)
        await other.start()
        await client.call(server.address, 0)  # one that lives isn't taken for a killed one
        server.close()
        other.close()
        assert [each.name for each in Path(temporary).iterdir()] == [making.name]

    with tempfile.TemporaryDirectory(prefix="calls-", dir="/tmp") as temporary:
        run(check(temporary))


@pytest.mark.timeout(60)
def test_a_server_that_hangs_keeps_no_other_from_starting(run: Run) -> None:
    """It may have as many callers waiting as it takes; it isn't taken for one that was killed."""

    async def check(temporary: str) -> None:
        folder = Path(temporary, f"{local_calls.PREFIX}hanging")
        folder.mkdir()
        path = str(folder / local_calls.SOCKET)
        with contextlib.ExitStack() as sockets:
            hanging = sockets.enter_context(socket.socket(socket.AF_UNIX))
            hanging.bind(path)
            hanging.listen(0)
            with pytest.raises(BlockingIOError):  # it takes no more
                while True:
                    caller = sockets.enter_context(socket.socket(socket.AF_UNIX))
                    caller.setblocking(False)
                    caller.connect(path)
            server = LocalServer(asyncio.sleep, temporary)
            await server.start()
            assert server.address
            assert folder.exists()
            server.close()

    with tempfile.TemporaryDirectory(prefix="calls-", dir="/tmp") as temporary:
        run(check(temporary))


def test_another_user_is_turned_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of what they send is read: a pickle runs what it is told to."""

    async def check() -> None:
        server, client = LocalServer(asyncio.sleep), LocalClient()
        await server.start()
        monkeypatch.setattr("deployments.transport.frames._peer_uid", lambda _: 4242)
        assert not client.reaches(server.address)
        await asyncio.gather(*client._connecting.values())
        assert not client.reaches(server.address)

    run(check())
