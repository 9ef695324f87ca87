"""Bodies of many requests at a time: who has no place is told at once; small ones have one of their own.

And answers that are read slowly.
"""

import codecs
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import numpy as np
import pytest
import uvicorn

from deployments.api.fields import count_values, read_object
from deployments.errors import InvalidRequestError
from deployments.http.app import make_app
from deployments.http.edge import bodies
from deployments.http.edge.bodies import LARGEST_BODIES, SMALL_BYTES, Buffer, BytesInHand
from deployments.http.serving import Serving
from tests.app.conftest import LocalHandle, expected, make_serving
from tests.harness.server import free_port, wait_for

LARGEST = 2 * SMALL_BYTES
TEXT = b'{"model": "a", "input": "x"'
REFUSED = {
    "message": "too many bytes of other requests are in hand",
    "type": "unavailable_error",
    "param": "body",
    "code": "queue_full",
}


@pytest.fixture
def serving(handles: dict[str, LocalHandle]) -> Serving:
    """What serves the models, with little room."""
    serving = make_serving(handles)
    serving.in_hand = BytesInHand(LARGEST)
    return serving


@pytest.fixture
async def client(serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it."""
    transport = httpx.ASGITransport(make_app(serving, list), raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://cluster/v1") as client:
        yield client


def body(size: int) -> bytes:
    """Return a request of so many bytes."""
    return TEXT.ljust(size - 1) + b"}"


async def in_chunks(content: bytes, seen: list[int]) -> AsyncIterator[bytes]:
    """Yield a body that doesn't say its length; note how much of it was asked for."""
    for begin in range(0, len(content), 4096):
        seen.append(begin)
        yield content[begin : begin + 4096]


async def test_who_has_no_place_is_told_before_anything_is_read(
    serving: Serving, client: httpx.AsyncClient
) -> None:
    """By the length that the body says, or as soon as it is large; then there is a place again."""
    seen: list[int] = []
    with serving.in_hand.hold() as take:
        take(LARGEST_BODIES * LARGEST - SMALL_BYTES)
        large = body(SMALL_BYTES + 1)
        refused = await client.post(
            "/embeddings", content=in_chunks(large, seen), headers={"content-length": str(len(large))}
        )
        assert (refused.status_code, refused.json()["error"]) == (503, REFUSED)
        assert refused.headers["retry-after"] == "30"
        assert seen == []
        refused = await client.post("/embeddings", content=in_chunks(body(LARGEST), seen))
        assert (refused.status_code, refused.json()["error"]) == (503, REFUSED)
        assert seen[-1] == SMALL_BYTES
    for content in (large, in_chunks(large, seen)):
        assert (await client.post("/embeddings", content=content)).status_code == 200
    with serving.in_hand.hold() as take:
        take(LARGEST_BODIES * LARGEST)  # nothing of the others is held any more


@pytest.mark.parametrize("sizes", [[7], [1, 6, 0], [3, 2, 2], [0, 7]])
def test_a_body_is_read_however_it_comes(sizes: list[int]) -> None:
    """At once or in parts: it is the same, as are the errors of what isn't JSON, and a mark before it."""
    parts = [size * SMALL_BYTES for size in sizes]
    for content in (body(sum(parts)), codecs.BOM_UTF8 + body(sum(parts) - 3), body(sum(parts) - 1) + b"!"):
        buffer, rest = Buffer(sum(parts)), content
        for part in parts:
            buffer.append(rest[:part])
            rest = rest[part:]
        read = buffer.content()
        assert (buffer.size, bytes(read)) == (len(content), content)
        assert count_values(read) == count_values(content)
        if content.endswith(b"!"):
            with pytest.raises(InvalidRequestError) as told:
                read_object(read)
            with pytest.raises(InvalidRequestError, match=re.escape(told.value.message)):
                read_object(content)
        else:
            assert read_object(read) == {"model": "a", "input": "x"}


async def test_a_small_body_has_a_place_beside_all_the_large_ones(
    serving: Serving, client: httpx.AsyncClient
) -> None:
    """On every route that reads one; until those, too, are too many."""
    with serving.in_hand.hold() as take:
        take(LARGEST_BODIES * LARGEST)
        for path, field in (("/embeddings", "input"), ("/tokenize", "prompt"), ("/embed", "inputs")):
            answer = await client.post(path, json={"model": "a", field: "x"})
            assert answer.status_code == 200, answer.text
        assert (await client.post("/embeddings", content=body(SMALL_BYTES))).status_code == 200
        with serving.in_hand.hold() as take_small:
            take_small(SMALL_BYTES)
            with serving.in_hand.hold() as take_another:
                take_another(SMALL_BYTES)
                refused = await client.post("/embeddings", content=body(100))
                assert (refused.status_code, refused.json()["error"]) == (503, REFUSED)


# --- answers --------------------------------------------------------------------------------------------

TEXTS = [f"text {number}" for number in range(2000)]
DIMENSION = 256


@pytest.fixture
def address(handles: dict[str, LocalHandle]) -> Iterator[tuple[str, int]]:
    """The application with room for one large answer, served as an ingress is."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config("", port=port, log_config=None, access_log=False))

    def run() -> None:
        serving = make_serving({"wide": handles["wide"]})
        serving.in_hand = BytesInHand(2**19)
        server.config.app = make_app(serving, list)  # type: ignore[arg-type]
        server.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield "127.0.0.1", port
    server.should_exit = True
    server.force_exit = True
    thread.join(10)


@contextlib.contextmanager
def slow_reader(address: tuple[str, int]) -> Iterator[socket.socket]:
    """Ask for an answer of some five megabytes, and read its first bytes."""
    body = json.dumps({"model": "wide", "input": TEXTS}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        connection.settimeout(60)
        connection.connect(address)
        connection.sendall(head.encode() + body)
        assert connection.recv(15, socket.MSG_PEEK) == b"HTTP/1.1 200 OK"
        yield connection


def ask(address: tuple[str, int], texts: str | list[str]) -> httpx.Response:
    """Ask for the texts' vectors, and read them."""
    url = "http://{}:{}/v1/embeddings".format(*address)
    return httpx.post(url, json={"model": "wide", "input": texts}, timeout=60)


def test_an_answer_that_isnt_read_is_in_hand(address: tuple[str, int]) -> None:
    """The next large one is refused, small ones are not; it is whole, however late it is read."""
    with slow_reader(address) as connection:
        refused = ask(address, TEXTS)
        assert (refused.status_code, refused.json()["error"]) == (503, REFUSED)
        assert ask(address, "x").status_code == 200
        answer = b"".join(iter(lambda: connection.recv(2**20), b""))
    got = [each["embedding"] for each in json.loads(answer.partition(b"\r\n\r\n")[2])["data"]]
    assert np.array_equal(np.array(got, np.float32), expected(TEXTS, DIMENSION))
    wait_for(lambda: ask(address, TEXTS).status_code == 200, 10, "room again")


@pytest.mark.parametrize("goes", [True, False])
def test_who_doesnt_read_or_goes_gives_its_place_back(
    address: tuple[str, int], goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or after half a minute."""
    if not goes:
        monkeypatch.setattr(bodies, "PIECE_SECONDS", 2.0)
    with slow_reader(address) as connection:
        assert ask(address, TEXTS).status_code == 503
        if goes:
            connection.close()
        wait_for(lambda: ask(address, TEXTS).status_code == 200, 10, "room again")
        assert ask(address, "x").status_code == 200
