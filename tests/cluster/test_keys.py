"""A server with keys on: whoever has none is refused, and leaves nothing of what was sent."""

import http.client
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
import pytest

from deployments.keys.file import Key, create_key
from tests.harness import workers
from tests.harness.server import Server, serve

pytestmark = pytest.mark.cluster
REQUESTS, CLIENTS = 10_000, 8
SECRET, TEXT = "never-to-be-logged-key", "never-to-be-logged-text"
BODY = f'{{"model": "m", "input": "{TEXT}"}}'.encode()
WRONG: list[dict[str, str | bytes]] = [
    {},
    {"Authorization": f"Bearer {SECRET}"},
    {"Authorization": f"Basic {SECRET}"},
    {"Authorization": "Bearer "},
    {"Authorization": f"Bearer {SECRET}é".encode()},
    {"x-api-key": SECRET},
    {"api-key": SECRET, "Host": f"{TEXT}.example"},
]
PATHS = [
    "/v1/embeddings",
    "//v1/embeddings",
    "/v1/../v1/embeddings",
    "/V1/Embeddings",
    "/v1/embeddings/",
    "/embeddings",
]
METHODS = ["POST", "POST", "POST", "HEAD", "OPTIONS"]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A valid key, and the file that holds its hash."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    made = create_key(file, lambda sha256: Key(name="some", sha256=sha256, created=datetime.now(UTC)))
    return made, file


@pytest.fixture(scope="module")
def server(secret: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One fake model behind two ingress replicas that log all they can."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "workers").mkdir()
    (folder / "workers" / "m.toml").write_text(workers.fake("m"))
    environ = {"LOG_LEVEL": "DEBUG"}
    with serve(folder / "workers", folder, environ, ingress_replicas=2, keys=secret[1]) as server:
        yield server


def ask(server: Server, number: int) -> set[int]:
    """Send every so many-th of the wrong requests over one connection, and return the answers' statuses."""
    host, port = server.url.removeprefix("http://").split(":")
    mistakes = itertools.cycle(itertools.product(PATHS, METHODS, WRONG))
    statuses = set()
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    for path, method, headers in itertools.islice(mistakes, number, REQUESTS, CLIENTS):
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(BODY)))
        connection.endheaders(BODY)
        with connection.getresponse() as response:
            response.read()
            statuses.add(response.status)
            if response.getheader("connection") == "close":
                connection.close()
    connection.close()
    return statuses


def test_ten_thousand_refusals_leave_no_trace(server: Server, secret: tuple[str, Path]) -> None:
    """Neither in our logs, nor in Ray's, nor in HAProxy's."""
    logs = Path(psutil.Process(server.process.pid).environ()["RAY_TMPDIR"])
    with ThreadPoolExecutor(CLIENTS) as pool:
        statuses = set().union(*pool.map(lambda number: ask(server, number), range(CLIENTS)))
    assert statuses == {401}
    headers = {"authorization": f"Bearer {secret[0]}"}
    answer = httpx.post(f"{server.url}/v1/embeddings", content=BODY, headers=headers, timeout=30)
    assert answer.status_code == 200
    texts = [server.log, *(path for path in logs.rglob("*") if path.is_file())]
    held = b"".join(path.read_bytes() for path in texts)
    assert b"serve" in held  # these are the logs
    for word in (SECRET, TEXT, secret[0]):
        assert word.encode() not in held
