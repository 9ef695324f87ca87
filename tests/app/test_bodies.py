"""Bodies of many requests at a time: who has no place is told at once; small ones have one of their own."""

from collections.abc import AsyncIterator

import httpx
import pytest

from deployments.http.app import make_app
from deployments.http.edge.bodies import LARGEST_BODIES, SMALL_BYTES, BytesInHand
from deployments.http.serving import Serving
from tests.app.conftest import LocalHandle, make_serving

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
        assert refused.headers["retry-after"] == "5"
        assert seen == []
        refused = await client.post("/embeddings", content=in_chunks(body(LARGEST), seen))
        assert (refused.status_code, refused.json()["error"]) == (503, REFUSED)
        assert seen[-1] == SMALL_BYTES
    for content in (large, in_chunks(large, seen)):
        assert (await client.post("/embeddings", content=content)).status_code == 200
    with serving.in_hand.hold() as take:
        take(LARGEST_BODIES * LARGEST)  # nothing of the others is held any more


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
