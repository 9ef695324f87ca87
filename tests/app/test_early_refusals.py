"""A refusal while the body still comes: the client reads the status; and what else HTTP/1 allows on a wire.

Straight to an ingress, and through HAProxy, as on the tuned start.
"""

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from deployments.config.load import load_workers
from deployments.http.app import make_app
from deployments.http.auth import Access
from deployments.keys.file import Key, Keys, hash_of
from deployments.keys.rates import LocalRates
from deployments.keys.ring import KeyRing
from deployments.plan.placement import Machine
from deployments.plan.plan import make_plans
from tests.app.conftest import LocalHandle, make_serving
from tests.harness import workers
from tests.harness.haproxy import haproxy
from tests.harness.server import free_port

SECRET = "secret-of-the-test"
SIZE = 30 * 2**20
# Ends with the status that each of three requests got.
FETCH = """
const [url, key, size] = process.argv.slice(1);
const body = Buffer.alloc(Number(size), 32);
for (let turn = 0; turn < 3; turn++) {
  const headers = {authorization: `Bearer ${key}`};
  const response = await fetch(url, {method: "POST", headers, body});
  await response.text();
  console.log(response.status);
}
"""


@pytest.fixture(scope="module")
def ingress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an application with a key and a limit of a megabyte, served as an ingress is."""
    file = tmp_path_factory.mktemp("early") / "m.toml"
    file.write_text(workers.fake("m"))
    (plan,) = make_plans(load_workers(file, environ={}), Machine(2, 0, 2))
    key = Key(name="test", sha256=hash_of(SECRET.encode()), created=datetime.now(UTC))
    access = Access(KeyRing(Keys(keys=(key,))), LocalRates())
    port = free_port()
    server = uvicorn.Server(uvicorn.Config("", port=port, log_config=None, access_log=False))

    def run() -> None:
        serving = make_serving({plan.name: LocalHandle(plan)}, access.rates)
        server.config.app = make_app(serving, list, access=access)  # type: ignore[arg-type]
        server.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield port
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module", params=["ingress", "HAProxy"])
def port(
    request: pytest.FixtureRequest, ingress: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """Where a client connects to."""
    if request.param == "ingress":
        yield ingress
        return
    with haproxy(tmp_path_factory.mktemp("front"), ingress) as front:
        yield front


REFUSALS = [("wrong", 401), (SECRET, 413)]


@pytest.mark.parametrize(("key", "status"), REFUSALS)
def test_a_client_reads_why_while_it_sends(port: int, key: str, status: int) -> None:
    """With a length or in chunks, again and again on one connection."""

    def chunks() -> Iterator[bytes]:
        for _ in range(SIZE // 2**20):
            yield b" " * 2**20

    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"x-api-key": key}, timeout=60) as client:
        for content in (b" " * SIZE, chunks(), b" " * SIZE):
            assert client.post("/v1/embeddings", content=content).status_code == status
        assert client.get("/v1/models").status_code == (401 if status == 401 else 200)


@pytest.mark.parametrize(("key", "status"), REFUSALS)
def test_openais_sdk_raises_the_error_that_it_is(port: int, key: str, status: int) -> None:
    """And no connection error, which it would try again."""
    with (
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.embeddings.create(model="m", input="x" * SIZE)
    assert caught.value.status_code == status


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
@pytest.mark.parametrize(("key", "status"), REFUSALS)
def test_nodes_fetch_reads_the_status(port: int, key: str, status: int, tmp_path: Path) -> None:
    """Three times in a row, by one pool of connections."""
    command = ["node", "--input-type=module", "-e", FETCH, f"http://127.0.0.1:{port}/v1/embeddings", key]
    result = subprocess.run(
        [*command, str(SIZE)], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    assert result.stdout.split() == [str(status)] * 3, result.stderr


BODY = b'{"model":"m","input":"x"}'
HEAD = f"POST /v1/embeddings HTTP/{{}}\r\nHost: x\r\nx-api-key: {SECRET}\r\n{{}}\r\n"


def talk(port: int, *parts: bytes, until: bytes) -> bytes:
    """Send the parts, each once something of an answer to the last has come; read until the text has come."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for number, part in enumerate(parts):
            connection.sendall(part)
            if number + 1 < len(parts):
                answer += connection.recv(65536)
        while until not in answer and (more := connection.recv(65536)):
            answer += more
    return answer


def check_the_ways_of_http_1(port: int, body: bytes = BODY) -> None:
    """Expect, chunks, several requests at once, and HTTP/1.0."""
    length = f"Content-Length: {len(body)}\r\n"
    asked = HEAD.format("1.1", f"Expect: 100-continue\r\n{length}").encode()
    answer = talk(port, asked, body, until=b'"created"')
    assert answer.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 200 OK" in answer
    chunked = HEAD.format("1.1", "Transfer-Encoding: chunked\r\n").encode()
    pieces = b"".join(b"%x\r\n%b\r\n" % (1, bytes([byte])) for byte in body) + b"0\r\n\r\n"
    assert b"HTTP/1.1 200 OK" in talk(port, chunked + pieces, until=b'"created"')
    one = HEAD.format("1.1", length).encode() + body
    last = HEAD.format("1.1", f"{length}Connection: close\r\n").encode() + body
    assert talk(port, one + one + last, until=b"\0").count(b" 200 OK\r\n") == 3
    old = HEAD.format("1.0", length).encode() + body
    assert talk(port, old, until=b"\0").split(b"\r\n")[0].endswith(b" 200 OK")


def test_the_ways_of_http_1(port: int) -> None:
    """As one server or another in front may talk."""
    check_the_ways_of_http_1(port)
