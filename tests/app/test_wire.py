"""What clients, probes and gateways write in other ways: methods, addresses, encodings, marks, origins."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from deployments.config.origins import allowed_origins
from deployments.errors import ConfigError
from deployments.http.app import make_app
from deployments.http.edge import content as contents
from deployments.http.edge.origins import add_origins
from tests.app.conftest import MAX_BODY_BYTES, LocalHandle, expected, make_serving

BODY = json.dumps({"model": "a", "input": "x"}).encode()


async def ask(
    client: httpx.AsyncClient,
    content: bytes | AsyncIterator[bytes],
    path: str = "/embeddings",
    **headers: str,
) -> Any:
    """Return the answer to a body as it is on the wire."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post(path, content=content, headers={"content-type": "application/json", **sent})


def is_vector(response: httpx.Response) -> bool:
    """Whether a response holds the right vector of `x`."""
    assert response.status_code == 200, response.text
    vector = response.json()["data"][0]["embedding"]
    return np.array_equal(np.array(vector, np.float32), expected(["x"])[0])


def message(response: httpx.Response) -> str:
    """Return an error's whole text."""
    text: str = response.json()["error"]["message"]
    return text


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/models", "/models/a", "/metrics", "/docs", "/ui", "/version"]
)
async def test_a_head_is_answered_as_a_get(client: httpx.AsyncClient, path: str) -> None:
    """The same status and headers; the server leaves the body out (RFC 9110)."""
    async with asyncio.timeout(60):  # a busy machine's models come while they are asked
        while path == "/ready" and (await client.get(path)).status_code != 200:
            pass
    shown, headers = await client.get(path), await client.head(path)
    assert headers.status_code == shown.status_code
    assert headers.headers["content-type"] == shown.headers["content-type"]
    assert headers.content == b""


async def test_a_method_that_a_path_hasnt_names_those_it_has(client: httpx.AsyncClient) -> None:
    """HEAD among them where GET is."""
    for path, method, allowed in (
        ("/embeddings", "HEAD", "POST"),
        ("/embeddings", "DELETE", "POST"),
        ("/models", "POST", "GET, HEAD"),
    ):
        response = await client.request(method, path)
        assert response.status_code == 405
        assert response.headers["allow"] == allowed
        if method != "HEAD":
            assert message(response) == f"this path takes {allowed}"


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v1/v1/embeddings",
        "/v1/v1/v1/embeddings",
        "//embeddings",
        "//v1/embeddings",
        "/v1//embeddings",
        "/v1/embeddings/",
        "/embeddings//",
        "/openai/v1/embeddings",
    ],
)
async def test_base_addresses_that_end_otherwise_are_served(client: httpx.AsyncClient, path: str) -> None:
    """As clients make them of one with `/v1`, with a slash, or with neither."""
    assert is_vector(await ask(client, BODY, f"http://cluster{path}"))
    listed = await client.get(f"http://cluster{path}".replace("embeddings", "models"))
    assert listed.json()["object"] == "list"


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "//", "/v1//"])
async def test_a_base_address_alone_is_teis_and_the_welcome(client: httpx.AsyncClient, path: str) -> None:
    """Its clients post to what they are given, with a slash at the end or without."""
    sent = b'{"model":"a","inputs":"x"}'
    answer = await ask(client, sent, f"http://cluster{path}")
    assert np.array_equal(np.array(answer.json(), np.float32), expected(["x"]))
    assert (await client.get(f"http://cluster{path}")).headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        ("POST", "/api/v1/embeddings", "did you mean POST /v1/embeddings?"),
        ("POST", "/v1/embeddings/embeddings", "did you mean POST /embeddings?"),
        ("POST", "/V1/Embeddings", "did you mean POST /v1/embeddings?"),
        ("POST", "/v1/embedding", "did you mean POST /v1/embeddings?"),
        ("GET", "//metrics", "did you mean GET /metrics?"),
        ("GET", "/v1/v1/metrics", "did you mean GET /v1/metrics?"),
        ("POST", "/embedings/", "did you mean POST /embeddings?"),
        ("POST", "/v1/model-setting", "did you mean GET /v1/model-settings?"),
        ("GET", "/foo/", "/docs shows them all"),
        ("DELETE", "//", "/docs shows them all"),
        ("GET", "/v1/chat/completions", "/docs shows them all"),
        ("GET", "/" + "x/" * 3000, "/docs shows them all"),
    ],
)
async def test_other_addresses_are_told_what_was_meant(
    client: httpx.AsyncClient, method: str, path: str, told: str
) -> None:
    """Operators' routes among them: another spelling opens nothing."""
    response = await client.request(method, f"http://cluster{path}")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert message(response) == f"no route has this path; {told}"


# --- bytes before and inside bodies ---------------------------------------------------------------


async def test_a_byte_order_mark_is_skipped(client: httpx.AsyncClient) -> None:
    """PowerShell writes one into its files; what is wrong behind it is told as without."""
    assert is_vector(await ask(client, b"\xef\xbb\xbf" + BODY))
    assert is_vector(await ask(client, gzip.compress(b"\xef\xbb\xbf" + BODY), content_encoding="gzip"))
    response = await ask(client, b"\xef\xbb\xbf{")
    assert message(response).startswith("the body isn't valid JSON: ")


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-32-be", "UTF-32"),
        ("latin-1", "another encoding (byte 24 isn't UTF-8)"),
        ("cp1252", "another encoding (byte 24 isn't UTF-8)"),
    ],
)
async def test_an_encoding_that_isnt_utf_8_is_named(
    client: httpx.AsyncClient, encoding: str, name: str
) -> None:
    """With the place where it shows, and without what stands there."""
    response = await ask(client, '{"model":"a","input":"é"}'.encode(encoding))
    assert response.status_code == 400
    assert message(response) == f"the body is in {name}; JSON is sent in UTF-8".replace("24", "22")


# --- Content-Encoding -----------------------------------------------------------------------------


def raw_deflate(data: bytes) -> bytes:
    """Return data as clients send it that leave zlib's header out."""
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (gzip.compress(BODY, mtime=0), "gzip"),
        (gzip.compress(BODY, mtime=0), "GZIP, identity"),
        (gzip.compress(BODY, mtime=0), "x-gzip"),
        (gzip.compress(BODY[:5], mtime=0) + gzip.compress(BODY[5:], mtime=0), "gzip"),
        (zlib.compress(BODY), "deflate"),
        (raw_deflate(BODY), "deflate"),
        (zstandard.compress(BODY), "zstd"),
        (zstandard.compress(BODY[:5]) + zstandard.compress(BODY[5:]), "zstd"),
        *((BODY, plain) for plain in ("identity", "", "utf-8", "UTF8", "identity, identity", ",", "none")),
    ],
)
async def test_compressed_bodies_are_read(client: httpx.AsyncClient, content: bytes, encoding: str) -> None:
    """In one part or several, deflate with a header or without; a charset is no encoding."""
    assert is_vector(await ask(client, content, content_encoding=encoding))


@pytest.mark.parametrize("kind", ["gzip", "zlib", "raw", "zstd"])
async def test_it_doesnt_matter_how_a_compressed_body_arrives(client: httpx.AsyncClient, kind: str) -> None:
    """Byte by byte; and whole, where its last bytes hold more than comes out at a time."""
    pack = {**PACKS, "zlib": zlib.compress, "raw": raw_deflate}[kind]
    encoding = kind if kind in PACKS else "deflate"
    assert is_vector(await ask(client, by_byte(pack(BODY)), content_encoding=encoding))
    for size in (contents.PIECE_BYTES, contents.PIECE_BYTES + 1, 3 * contents.PIECE_BYTES):
        assert is_vector(await ask(client, pack(BODY.ljust(size)), content_encoding=encoding))


async def test_nothing_follows_deflate_in_a_part_of_its_own_either(client: httpx.AsyncClient) -> None:
    """Another one would be read as a part of the body."""

    async def parts() -> AsyncIterator[bytes]:
        yield zlib.compress(BODY)
        yield zlib.compress(b" ")

    response = await ask(client, parts(), content_encoding="deflate")
    assert (response.status_code, message(response)) == (400, "the body isn't valid deflate")


async def by_byte(content: bytes) -> AsyncIterator[bytes]:
    """Yield a body in the smallest parts that there are."""
    for begin in range(len(content)):
        yield content[begin : begin + 1]


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip, gzip", "deflate, zstd", "x" * 500])
async def test_other_encodings_are_refused_with_those_that_are_read(
    client: httpx.AsyncClient, encoding: str
) -> None:
    """415, and Accept-Encoding, as RFC 9110 has it."""
    response = await ask(client, BODY, content_encoding=encoding)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_encoding")
    assert response.headers["accept-encoding"] == "gzip, deflate, zstd"
    assert message(response) == "bodies may be encoded with gzip, deflate or zstd, once"


async def test_zstd_is_refused_without_its_library(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any other encoding."""
    monkeypatch.setattr(contents, "KINDS", (contents.GZIP, contents.DEFLATE))
    response = await ask(client, zstandard.compress(BODY), content_encoding="zstd")
    assert (response.status_code, message(response)) == (
        415,
        "bodies may be encoded with gzip or deflate, once",
    )


# A frame that asks for 16 MiB to be read with.
WIDE_ZSTD = b"\x28\xb5\x2f\xfd\x00" + bytes([14 << 3]) + b"\x01\x00\x00"


@pytest.mark.parametrize(
    ("content", "encoding", "told"),
    [
        (BODY, "gzip", "the body isn't valid gzip"),
        (BODY, "deflate", "the body isn't valid deflate"),
        (gzip.compress(BODY, mtime=0)[:-9], "gzip", "the body's gzip ends too early"),
        (gzip.compress(BODY, mtime=0)[:-4], "gzip", "the body's gzip ends too early"),
        (gzip.compress(BODY, mtime=0) + b"xx", "gzip", "the body isn't valid gzip"),
        (zlib.compress(BODY) + BODY, "deflate", "the body isn't valid deflate"),
        (BODY, "zstd", "the body isn't valid zstd"),
        (zstandard.compress(BODY)[:-1], "zstd", "the body's zstd ends too early"),
        (zstandard.compress(BODY) + b"xxxx", "zstd", "the body isn't valid zstd"),
        (WIDE_ZSTD, "zstd", "the body isn't valid zstd"),
    ],
)
async def test_what_isnt_compressed_as_it_says_is_refused(
    client: httpx.AsyncClient, content: bytes, encoding: str, told: str
) -> None:
    """Cut off, followed by something else, or not compressed at all."""
    response = await ask(client, content, content_encoding=encoding)
    assert (response.status_code, message(response)) == (400, told)


PACKS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize("kind", PACKS)
async def test_a_body_may_be_no_larger_for_being_compressed(client: httpx.AsyncClient, kind: str) -> None:
    """A bomb of a hundred times the limit is given up at the limit."""
    pack = PACKS[kind]
    response = await ask(client, pack(b" " * (100 * MAX_BODY_BYTES)), content_encoding=kind)
    assert (response.status_code, message(response)) == (413, "the body is over the limit of 1000000 bytes")
    assert is_vector(
        await ask(client, pack(b" " * (MAX_BODY_BYTES - len(BODY)) + BODY), content_encoding=kind)
    )


def test_little_of_zstd_is_much_and_never_more_than_that() -> None:
    """A block of one byte repeated is 128 KiB: what comes out at a time is bounded all the same."""
    stream, data, sizes = contents.Unzstd(), zstandard.compress(b" " * 2**26), []
    while data:
        sizes.append(len(stream.decompress(data, 2**18)))
        data = stream.unconsumed_tail
    assert stream.eof
    assert sum(sizes) == 2**26
    assert max(sizes) <= 2**21 + 2**18


async def test_a_body_that_was_lost_to_an_upgrade_is_told(client: httpx.AsyncClient) -> None:
    """As plain `serve run` loses it; where it has come there is nothing to tell."""
    headers = {"connection": "upgrade", "upgrade": "h2c"}
    assert is_vector(await client.post("/embeddings", content=BODY, headers=headers))
    response = await client.post("/embeddings", headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "the body was lost, since the request offers to upgrade; send it as HTTP/1.1"
    )


async def test_encodings_on_several_lines_are_as_on_one(client: httpx.AsyncClient) -> None:
    """Each of them counts (RFC 9110, 5.3)."""
    for first, second, status in (("identity", "gzip", 200), ("gzip", "br", 415), ("gzip", "gzip", 415)):
        headers = [("content-encoding", first), ("content-encoding", second)]
        response = await client.post("/embeddings", content=gzip.compress(BODY), headers=headers)
        assert response.status_code == status, response.text


# --- browsers -------------------------------------------------------------------------------------


REQUESTED = "access-control-request-method"


async def test_no_origin_is_allowed_unless_one_is_named(handles: dict[str, LocalHandle]) -> None:
    """Then its preflights are answered without a key, and its answers may be read by the page."""
    preflight = {
        REQUESTED: "POST",
        "access-control-request-headers": "authorization, content-type, x-stainless-lang",
    }
    for origins, origin, allowed in (
        ((), "https://app.example", False),
        (("https://app.example",), "https://app.example", True),
        (("https://app.example",), "https://app.example.evil", False),
        (("*",), "https://any.example", True),
    ):
        serving = make_serving(handles)
        app = make_app(serving, list)  # type: ignore[arg-type]
        add_origins(app, origins)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://cluster/v1", headers={"origin": origin}
        ) as page:
            asked = await page.options("/embeddings", headers=preflight)
            response = await page.post("/embeddings", json={"model": "a", "input": "x"})
            refused = await page.post("/embeddings", json={})
            others = [
                await page.options("/embeddings", headers={**preflight, REQUESTED: method})
                for method in ("HEAD", "PUT")
            ]
        assert is_vector(response)
        if allowed:
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] in (origin, "*")
            assert "authorization" in asked.headers["access-control-allow-headers"]
            assert [each.status_code for each in others] == [200, 400]
            assert others[1].json()["error"]["message"] == (
                "pages may ask by GET, HEAD, POST, DELETE, from the same kind of network; wrong is the method"
            )
            assert response.headers["access-control-allow-origin"] in (origin, "*")
            assert refused.headers["access-control-allow-origin"] in (origin, "*")
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        else:
            assert asked.status_code == (400 if origins else 405)
            assert asked.json()["error"]["message"] == (
                "this origin may not ask here; `allow_origins` names those that may"
                if origins
                else "this path takes POST"
            )
            assert "access-control-allow-origin" not in response.headers


def test_what_is_no_origin_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path behind it would never be met; the environment stands in for the option."""
    assert allowed_origins("") == ()
    assert allowed_origins("https://a.example, http://localhost:3000,,https://a.example") == (
        "https://a.example",
        "http://localhost:3000",
    )
    monkeypatch.setenv("EMBEDDING_CLUSTER_ALLOW_ORIGINS", "*")
    assert allowed_origins("") == ("*",)
    for wrong in ("https://a.example/", "a.example", "https://*.example", "null"):
        with pytest.raises(ConfigError) as caught:
            allowed_origins(wrong)
        assert caught.value.message == (
            f"allow_origins: `{wrong}` is no origin, such as https://app.example.com, and not `*`"
        )
