"""Keys over the whole application: who is let in, to which models, how often, and what is counted."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.http.app import make_app
from deployments.http.auth import Access
from deployments.keys.file import Key, Keys, hash_of
from deployments.keys.rates import Buckets, Grant, LeasedRates, LocalRates, Rates
from deployments.keys.ring import KeyRing
from tests.app.conftest import LocalHandle, make_serving

NOW = datetime.now(UTC)


def key(name: str, **fields: Any) -> Key:
    """Return a key whose plaintext is `secret-NAME`."""
    return Key(name=name, sha256=hash_of(f"secret-{name}".encode()), created=NOW, **fields)


KEYS = Keys(
    keys=(
        key("all"),
        key("some", models=("a", "w*")),
        key("old", expires=NOW - timedelta(seconds=1)),
        key("operator", operator=True),
        key("requests", requests_per_minute=3),
        key("tokens", tokens_per_minute=10),
    )
)
BODY = {"model": "a", "input": "x"}


def bearer(name: str) -> dict[str, str]:
    """Return the headers of a key."""
    return {"authorization": f"Bearer secret-{name}"}


@pytest.fixture
def ring() -> KeyRing:
    """The keys above, which a test may change."""
    return KeyRing(KEYS)


@pytest.fixture
async def client(handles: dict[str, LocalHandle], ring: KeyRing) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the application with keys on."""
    access = Access(ring, LocalRates())
    serving = make_serving(handles, access.rates)

    async def gather() -> list[bytes]:
        return [serving.metrics.text()]

    transport = httpx.ASGITransport(make_app(serving, gather, access=access), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://cluster/v1") as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        bearer("all"),
        {"authorization": "bearer secret-all"},
        {"x-api-key": "secret-all"},
        {"api-key": "secret-all"},
        {"authorization": "Basic dXNlcjpwYXNz", "x-api-key": "secret-all"},
    ],
)
async def test_a_key_comes_in_any_of_three_headers(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    """Whatever the client's SDK calls it."""
    assert (await client.post("/embeddings", json=BODY, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer secret-nobody"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer"},
        {"authorization": "Basic secret-all"},
        {"authorization": "secret-all"},
        {"authorization": "Bearer secret-all secret-all"},
        {"authorization": "Bearer " + KEYS.keys[0].sha256},
        {"authorization": "Bearer sëcret-all".encode()},
        {"authorization": b"Bearer \xff\xfe\x00"},
        {"authorization": "Bearer " + "x" * 65_536},
        {"x-api-key": ""},
        {"x-api-key": "secret-nobody"},
        {"x-api-key": "Bearer secret-all"},
        bearer("old"),
        {"host": "evil.example", "x-forwarded-for": "127.0.0.1"},
        {"cookie": "authorization=secret-all"},
    ],
)
async def test_no_valid_key_no_answer(
    client: httpx.AsyncClient, headers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """401 with the contract's code; nothing of what was sent is shown or logged."""
    caplog.set_level(logging.DEBUG)
    response = await client.post("/embeddings", json={"model": "a", "input": "private"}, headers=headers)
    assert (response.status_code, response.json()["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    for secret in ("secret-", "private", "evil"):
        assert secret not in response.text
        assert secret not in caplog.text


PATHS = [
    "/v1/embeddings",
    "/embeddings",
    "//v1/embeddings",
    "//embeddings",
    "/v1//embeddings",
    "/v1/../embeddings",
    "/v1/../v1/embeddings",
    "/health/../embeddings",
    "/health/../v1/models",
    "/V1/embeddings",
    "/V1/MODELS",
    "/v1/models",
    "/v1/models/",
    "/v1/models/a",
    "/v1/models/a/tokenizer",
    "/v1/embeddings/",
    "/v1/embeddings?/health",
    "/v1/embeddings;/health",
    "/health/",
    "/HEALTH",
    "//health",
    "/v1/v1/health",
    "/v1/health/x",
    "/docs/",
    "/docs/../usage",
    "/docs/index.html",
    "/metrics",
    "/usage",
    "/v1/status",
    "/v1/model-settings",
    "/v1/models_available",
    "/v1/tokenize",
    "/embed",
    "/v2/embed",
    "//ui",
    "*",
    "",
]


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "get", "X"])
async def test_nothing_but_the_public_paths_is_open(
    client: httpx.AsyncClient, handles: dict[str, LocalHandle], method: str
) -> None:
    """Decided on the path as it stands in the scope: every other spelling needs a key, in every method."""
    app = client._transport.app  # type: ignore[attr-defined]
    for path in PATHS:
        status, headers = await raw(app, method, path)
        assert status == 401, (method, path)
        assert "location" not in headers
    for path in (
        "/health",
        "/v1/health",
        "/ready",
        "/version",
        "/docs",
        "/v1/openapi.json",
        "/docs/swagger-ui.css",
        "/ui",
        "/v1/ui/main.js",
    ):
        status, _ = await raw(app, method, path)
        assert status == (200 if method in ("GET", "HEAD") else 405), (method, path)
    # What leads to the page stands where text-embeddings-inference's clients post.
    assert (await raw(app, method, "/"))[0] == (200 if method == "GET" else 401)
    with_key, headers = await raw(app, "GET", "/v1/models/", bearer("all"))
    assert with_key == 200
    assert "location" not in headers


async def test_a_route_prefix_changes_nothing(client: httpx.AsyncClient) -> None:
    """Ray Serve leaves it on the path: what is open, what needs a key, what an operator's, is the route's."""
    app = client._transport.app  # type: ignore[attr-defined]
    for path, headers, wanted in (
        ("/metrics", bearer("all"), 403),
        ("/v1/metrics", bearer("all"), 403),
        ("/metrics", bearer("operator"), 200),
        ("/metrics", {}, 401),
        ("/v1/health", {}, 200),
        ("/docs/swagger-ui.css", {}, 200),
        ("/v1/models", {}, 401),
        ("/v1/models", bearer("all"), 200),
        ("/docs/x", {}, 401),
    ):
        for prefix in ("", "/emb", "/health", "/a/metrics"):
            status, _ = await raw(app, "GET", prefix + path, headers, prefix)
            assert status == wanted, prefix + path
    assert (await raw(app, "GET", "/health/v1/models", {}, ""))[0] == 401


async def raw(
    app: Any, method: str, path: str, headers: dict[str, str] | None = None, root_path: str = ""
) -> tuple[int, dict[str, str]]:
    """Call the application with a path that no client would leave as it is."""
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        "root_path": root_path,
        "scheme": "http",
        "server": ("cluster", 80),
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
    }
    sent: list[Any] = []

    messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


async def test_a_key_opens_its_own_models(client: httpx.AsyncClient) -> None:
    """403 for others, which aren't listed either; what there isn't is 404 and names only one's own."""
    headers = bearer("some")
    response = await client.post("/embeddings", json={"model": "b", "input": "x"}, headers=headers)
    assert (response.status_code, response.json()["code"]) == (403, "model_not_allowed")
    for path in ("/models/b", "/models/b/tokenizer"):
        assert (await client.get(path, headers=headers)).status_code == 403
    response = await client.post(
        "/tokenize", headers=headers, json={"model": "b", "prompt": "x", "tokens": True, "token_ids": True}
    )
    assert response.status_code == 403
    assert [m["id"] for m in (await client.get("/models", headers=headers)).json()["data"]] == ["a", "wide"]
    assert [m["name"] for m in (await client.get("/model-settings", headers=headers)).json()] == ["a", "wide"]
    response = await client.post("/embeddings", json={"model": "nope", "input": "x"}, headers=headers)
    assert response.status_code == 404
    assert "`b`" not in response.text
    assert (await client.post("/embeddings", json=BODY, headers=headers)).status_code == 200


async def test_metrics_are_the_operators(client: httpx.AsyncClient) -> None:
    """They tell of all clients; `/ready` tells others nothing but its status."""
    response = await client.get("/metrics", headers=bearer("all"))
    assert (response.status_code, response.json()["code"]) == (403, "operator_only")
    assert (await client.get("/metrics", headers=bearer("operator"))).status_code == 200
    assert (await client.get("/ready")).json() == {"ready": True}
    assert len((await client.get("/ready", headers=bearer("all"))).json()["models"]) > 5


async def test_a_revoked_key_ends_at_once_and_a_rotated_one_lives_on(
    client: httpx.AsyncClient, ring: KeyRing
) -> None:
    """As soon as the ring has the new keys; while they change under load nobody is refused."""
    statuses: list[int] = []

    async def ask(name: str) -> int:
        return (await client.post("/embeddings", json=BODY, headers=bearer(name))).status_code

    async def load() -> None:
        for _ in range(50):
            statuses.append(await ask("all"))

    task = asyncio.ensure_future(load())
    for number in range(20):
        fresh = key("all").model_copy(update={"sha256": hash_of(b"secret-fresh%d" % number)})
        ring.take(Keys(keys=(key("all", expires=NOW + timedelta(hours=1)), fresh)))
        assert await ask(f"fresh{number}") == 200
        await asyncio.sleep(0)
    await task
    assert set(statuses) == {200}
    ring.take(Keys())
    assert await ask("all") == 401


async def test_requests_per_minute(client: httpx.AsyncClient) -> None:
    """The fourth is refused, and told when to come back; what is left stands in every answer."""
    for left in (2, 1, 0):
        response = await client.post("/embeddings", json=BODY, headers=bearer("requests"))
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        assert "x-ratelimit-limit-tokens" not in response.headers
    response = await client.post("/embeddings", json=BODY, headers=bearer("requests"))
    assert (response.status_code, response.json()["code"]) == (429, "rate_limit_exceeded")
    assert 15 <= int(response.headers["retry-after"]) <= 20
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await client.post("/embeddings", json=BODY, headers=bearer("all"))).status_code == 200
    assert (await client.get("/models", headers=bearer("requests"))).status_code == 200


async def test_tokens_per_minute(client: httpx.AsyncClient) -> None:
    """Counted as the model reads them; what is larger than a minute's worth goes through when it is full."""

    async def ask(text: str) -> int:
        body = {"model": "a", "input": text}
        return (await client.post("/embeddings", json=body, headers=bearer("tokens"))).status_code

    assert [await ask("x" * 6), await ask("x" * 6), await ask("x" * 3)] == [200, 429, 200]
    access = LocalRates()
    await access.spend(key("tokens", tokens_per_minute=10), 1, 500)


async def test_limits_hold_over_several_ingress_replicas() -> None:
    """Of 1,000 requests over four replicas just a minute's worth gets through, with few questions."""
    now = 0.0
    central, asked = Buckets(lambda: now), 0

    async def take(*arguments: Any) -> Grant:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return central.take(*arguments)

    async def ask(replica: Rates, limited: Key) -> bool:
        try:
            await replica.spend(limited, 0, 1)
        except Exception:
            return False
        return True

    limited = key("requests", requests_per_minute=600)
    replicas = [LeasedRates(take) for _ in range(4)]
    let_in = sum([await ask(replicas[n % 4], limited) for n in range(1000)])
    assert 585 <= let_in <= 600
    assert asked < let_in
    now = 6.0  # a tenth of a minute later
    later = sum(await asyncio.gather(*(ask(replicas[n % 4], limited) for n in range(200))))
    assert 45 <= later <= 75
    assert "x-ratelimit-remaining-requests" in replicas[0].headers(limited)


async def test_a_limit_outlives_its_keeper() -> None:
    """While the central buckets don't answer each replica counts for itself."""

    async def gone(*_: Any) -> Grant:
        raise ConnectionError

    rates = LeasedRates(gone)
    limited = key("requests", requests_per_minute=2)
    await rates.spend(limited, 0, 1)
    await rates.spend(limited, 0, 1)
    with pytest.raises(Exception, match="used up"):
        await rates.spend(limited, 0, 1)


async def test_usage_is_counted_by_key_and_model(client: httpx.AsyncClient) -> None:
    """For its owner alone; the operator sees all of it in the metrics, by names of the key file."""
    for name, model, text in [("all", "a", "xyz"), ("all", "b", "x"), ("some", "a", "xy"), ("all", "a", "x")]:
        body = {"model": model, "input": [text, "z"]}
        assert (await client.post("/embeddings", json=body, headers=bearer(name))).status_code == 200
    await client.post("/embeddings", json={"model": "a", "input": ""}, headers=bearer("all"))
    answer = (await client.get("/usage", headers=bearer("all"))).json()
    assert answer["key"] == "all"
    assert answer["models"] == [
        {"model": "a", "requests": 2, "inputs": 4, "tokens": 6},
        {"model": "b", "requests": 1, "inputs": 2, "tokens": 2},
    ]
    assert "keys" not in answer
    told = (await client.get("/usage", headers=bearer("operator"))).json()
    assert told["models"] == []
    limits = {"models": ["*"], "requests_per_minute": None, "tokens_per_minute": None, "expires": None}
    assert told["keys"] == [
        {"key": "all", "limits": limits},
        {"key": "operator", "limits": limits},
        {"key": "requests", "limits": limits | {"requests_per_minute": 3}},
        {"key": "some", "limits": limits | {"models": ["a", "w*"]}},
        {"key": "tokens", "limits": limits | {"tokens_per_minute": 10}},
    ]
    await client.post("/embeddings", json=BODY)
    text = (await client.get("/metrics", headers=bearer("operator"))).text
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["embedding_key_tokens_total", "some", "a"] == 3
    assert found["embedding_key_requests_total", "all", "a"] == 2
    assert found["embedding_denied_total", "invalid_api_key"] == 1


async def test_ten_thousand_refusals_leave_no_trace(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """No key and no text in any log, at any level."""
    caplog.set_level(logging.DEBUG)
    app = client._transport.app  # type: ignore[attr-defined]
    ask: Callable[[int], Awaitable[tuple[int, Any]]] = lambda n: raw(  # noqa: E731
        app,
        "POST",
        "/v1/embeddings",
        bearer(f"wrong-{n}"),
    )
    for number in range(10_000):
        status, _ = await ask(number)
        assert status == 401
    assert "wrong" not in caplog.text
