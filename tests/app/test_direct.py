"""What comes from HAProxy goes past Ray Serve, once that has told where the application is mounted."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from ray.serve.context import _get_serve_request_context
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deployments.front import direct
from deployments.front.direct import Direct, Mounted
from deployments.front.switches import FAST_DATA_PLANE


class Site:
    """An application that says what it sees, behind what stands for Ray Serve's own server."""

    def __init__(self) -> None:
        """Mount it under a prefix."""
        self.prefix = "/emb"
        self.serves: list[str] = []  # the paths that Ray Serve was asked for
        self.ends: list[str] = []
        self.most = self.now = 0
        see, slowly = Route("/see", self.see), Route("/slowly", self.slowly)
        self.app = Starlette(routes=[see, slowly, Route("/wait", self.wait, methods=["POST"])])
        self.app.add_middleware(Mounted)
        self.port = 0
        self.replica = SimpleNamespace()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as Ray Serve's replica does."""
        self.serves.append(scope["path"])
        if scope["path"].startswith(("/-/", "/other")):
            await PlainTextResponse("Serve's own")(scope, receive, send)
            return
        assert (b"x-request-disconnect-disabled", b"?1") in scope["headers"]
        await self.app({**scope, "root_path": self.prefix}, receive, send)

    async def see(self, request: Request) -> Response:
        """Say what a request looks like."""
        context = _get_serve_request_context()
        return JSONResponse([request.scope["root_path"], context.request_id, context.app_name])

    async def slowly(self, request: Request) -> Response:
        """Answer in pieces, and do something when that is done."""

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(3):
                await asyncio.sleep(direct.UNWATCHED_SECONDS)
                yield b"piece"

        async def after() -> None:
            await asyncio.sleep(direct.UNWATCHED_SECONDS)
            self.ends.append("after")

        return StreamingResponse(pieces(), background=BackgroundTask(after))

    async def wait(self, request: Request) -> Response:
        """Answer after the seconds that the body names."""
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(json.loads(await request.body())["seconds"])
            self.ends.append("answered")
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        finally:
            self.now -= 1
        return PlainTextResponse("waited")

    async def ended(self, count: int) -> None:
        """Wait until so many have."""
        async with asyncio.timeout(10):
            while len(self.ends) < count:  # noqa: ASYNC110 - simpler than an event for each
                await asyncio.sleep(0.01)


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    """It, on a port."""
    config = SimpleNamespace(max_ongoing_requests=3)
    monkeypatch.setattr(Direct, "mount", None)
    site = Site()
    site.replica = SimpleNamespace(app_name="default", _deployment_config=config)
    monkeypatch.setattr(direct, "serve", SimpleNamespace(get_replica_context=lambda: site.replica))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        site.port = listening.getsockname()[1]
        config_of: dict[str, Any] = {"lifespan": "off", "log_config": None}
        server = uvicorn.Server(uvicorn.Config(Direct(site.serve), **config_of))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0.01)
        yield site
        server.should_exit = True
        await serving


async def test_serve_is_asked_once_for_each_prefix(site: Site) -> None:
    """Its own paths stay its own; a request's id is the client's or a new one, as Serve would have it."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.port}") as client:

        async def see(path: str = "/emb/see", **headers: str) -> tuple[list[str], httpx.Response]:
            answer = await client.get(path, headers=headers)
            return answer.json(), answer

        await see()
        assert site.serves == ["/emb/see"]
        (root, identity, name), answer = await see(**{"x-request-id": "mine"})
        assert (root, identity, name) == ("/emb", "mine", "default")
        assert answer.headers["x-request-id"] == "mine"
        made = {(await see())[1].headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3
        assert site.serves == ["/emb/see"]
        for path in ("/-/healthz", "/other/see"):
            assert (await client.get(path)).text == "Serve's own"
        for prefix in ("", "/moved"):  # as a deployment may say, after which Ray Serve's context is another
            site.prefix, site.replica = prefix, SimpleNamespace(**vars(site.replica))
            for _ in range(2):
                assert (await see(f"{prefix}/see"))[0][0] == prefix
        assert site.serves == ["/emb/see", "/-/healthz", "/other/see", "/see", "/moved/see"]


@pytest.mark.parametrize("known", [False, True], ids=["by Serve", "past it"])
async def test_who_goes_is_no_longer_worked_for(site: Site, known: bool) -> None:
    """Nobody else is disturbed, and who stays is answered, whose body came in pieces too."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.port}", timeout=30) as client:
        if known:
            await client.get("/emb/see")

        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b'{"seco', b'nds": 0.5}'):
                yield piece
                await asyncio.sleep(0.2)

        staying = asyncio.create_task(client.post("/emb/wait", content=pieces()))
        with contextlib.suppress(httpx.ReadTimeout):
            await client.post("/emb/wait", json={"seconds": 60}, timeout=0.05)
        await site.ended(1)
        assert site.ends == ["cancelled"]
        assert (await staying).text == "waited"
        assert (await client.post("/emb/wait", json={"seconds": 0})).text == "waited"
    others = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}  # type: ignore[union-attr]
    assert not {name for name in others if "Mounted" in name}


async def test_what_comes_after_an_answer_is_done_and_its_connection_stays(site: Site) -> None:
    """An answer's end isn't taken for a client that goes."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.port}", timeout=30) as client:
        await client.get("/emb/see")
        ports = set()
        for number in (1, 2):
            answer = await client.get("/emb/slowly")
            assert answer.text == "piece" * 3
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
            await site.ended(number)
    assert site.ends == ["after", "after"]
    assert len(ports) == 1


async def test_more_than_a_replica_may_have_wait(site: Site) -> None:
    """As in Ray Serve's own queue."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.port}", timeout=30) as client:
        await client.get("/emb/see")
        answers = await asyncio.gather(*(client.post("/emb/wait", json={"seconds": 0.1}) for _ in range(9)))
    assert {answer.text for answer in answers} == {"waited"}
    assert site.most == 3


def test_ray_serve_finds_it() -> None:
    """Under the name that its switch has."""
    module, name = FAST_DATA_PLANE["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].split(":")
    assert module == direct.__name__
    (found,) = getattr(direct, name)()
    assert found.cls is Direct
