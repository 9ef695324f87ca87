"""Files and batches over the whole application, with OpenAI's own client: routes, keys, usage, refusals."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import openai
import pytest
from openai.types import Batch

from deployments.batches import lines as batch_lines
from deployments.batches import run as job
from deployments.batches.lines import Bulk
from deployments.batches.routes import batch_routes
from deployments.batches.runner import Runner
from deployments.batches.serving import BatchServing
from deployments.batches.store import BatchPlace, Quota
from deployments.bulk import patience
from deployments.errors import EngineError, ModelUnavailableError
from deployments.http.app import make_app
from deployments.http.auth import Access
from deployments.http.serving import Serving
from deployments.keys.file import Key, Keys, hash_of
from deployments.keys.rates import LocalRates
from deployments.keys.ring import KeyRing
from tests.app.conftest import LocalHandle, expected, make_serving

NOW = datetime.now(UTC)
MAX_FILE_BYTES = 100_000
QUOTA = Quota(files=200, bytes=3_000_000)
KEEP_SECONDS = 3600 * 24


def key(name: str, **fields: Any) -> Key:
    """Return a key whose plaintext is `secret-NAME`."""
    return Key(name=name, sha256=hash_of(f"secret-{name}".encode()), created=NOW, **fields)


@dataclass
class Application:
    """The application, its storage's folder, and clients of it by their keys' names."""

    folder: Path
    client: Callable[[str], openai.AsyncOpenAI]
    http: httpx.AsyncClient


@pytest.fixture
async def application(
    handles: dict[str, LocalHandle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Application]:
    """With keys on, and a runner beside it."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(patience, "MAX_PAUSE_SECONDS", 0.02)
    folder = tmp_path / "storage"
    ring = KeyRing(Keys(keys=(key("all"), key("some", models=("a",)), key("few", tokens_per_minute=1000))))
    access = Access(ring, LocalRates(lambda: 0.0))  # what is used up stays so, however long a test takes
    serving = make_serving(handles, access.rates)
    batches = BatchPlace(str(folder), KEEP_SECONDS, QUOTA).open()
    runner = Runner(batches.files, Bulk(serving).embed, ring, KEEP_SECONDS)
    served = BatchServing(batches, MAX_FILE_BYTES, runner.wake, serving)
    app = make_app(serving, none, access=access, batches=batch_routes(served))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    work = asyncio.create_task(runner.serve())
    async with httpx.AsyncClient(transport=transport, base_url="http://cluster/v1") as http:

        def client(name: str) -> openai.AsyncOpenAI:
            return openai.AsyncOpenAI(
                base_url="http://cluster/v1",
                api_key=f"secret-{name}",
                http_client=http,  # type: ignore[arg-type]
                max_retries=0,
            )

        yield Application(folder, client, http)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


def completed(batches: Iterable[Batch]) -> int:
    """Return how many lines of batches are done."""
    return sum(each.request_counts.completed for each in batches if each.request_counts)


async def none() -> list[bytes]:
    """Return no metrics."""
    return []


def line(number: int, body: dict[str, Any]) -> bytes:
    """Return a line of an input file."""
    request = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/embeddings", "body": body}
    return json.dumps(request).encode() + b"\n"


async def eventually(found: Callable[[], Awaitable[Any]], wanted: Callable[[Any], bool]) -> Any:
    """Return what is found once it is as wanted."""
    async with asyncio.timeout(120):
        while not wanted(value := await found()):  # noqa: ASYNC110 - as a client has to
            await asyncio.sleep(0.01)
    return value


async def run(client: openai.AsyncOpenAI, content: bytes) -> Any:
    """Run a batch to its end."""
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"job": "x"}
    )
    return await eventually(
        lambda: client.batches.retrieve(batch.id), lambda b: b.status in ("completed", "failed")
    )


async def read(client: openai.AsyncOpenAI, name: str | None) -> list[dict[str, Any]]:
    """Return a file's lines."""
    assert name is not None
    content = await client.files.content(name)
    return [json.loads(each) for each in content.text.splitlines()]


async def test_a_batch_runs_from_upload_to_result(application: Application) -> None:
    """The vectors are those of `/embeddings`; what is wrong with a line is told as HTTP would tell it."""
    client = application.client("some")
    content = b"".join(line(n, {"model": "a", "input": f"text {n}", "user": None}) for n in range(30))
    content += line(30, {"model": "a", "input": "x", "dimensions": 5})
    content += line(31, {"model": "b", "input": "x"}) + line(32, {"model": "nothing", "input": "x"})
    content += line(33, {"model": "a", "input": ["y", "z"], "encoding_format": "base64"})
    batch = await run(client, content)
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (
        34,
        31,
        3,
    )
    assert batch.metadata == {"job": "x"}
    output = await read(client, batch.output_file_id)
    answers = {each["custom_id"]: each["response"]["body"] for each in output}
    got = [answers[f"c{n}"]["data"][0]["embedding"] for n in range(30)]
    assert np.array_equal(np.array(got, np.float32), expected([f"text {n}" for n in range(30)]))
    assert isinstance(answers["c33"]["data"][1]["embedding"], str)
    assert batch.usage.total_tokens == sum(body["usage"]["total_tokens"] for body in answers.values())
    errors = await read(client, batch.error_file_id)
    found = [(e["custom_id"], e["response"]["status_code"], e["error"]["code"]) for e in errors]
    assert found == [
        ("c30", 400, "invalid_request"),
        ("c31", 403, "model_not_allowed"),
        ("c32", 404, "model_not_found"),
    ]
    usage = await application.http.get("/usage", headers={"x-api-key": "secret-some"})
    tokens = batch.usage.total_tokens
    assert usage.json()["models"] == [{"model": "a", "requests": 31, "inputs": 32, "tokens": tokens}]


async def test_files_and_batches_are_listed_and_removed(application: Application) -> None:
    """By pages, as the SDK turns them."""
    client = application.client("all")
    batch = await run(client, line(1, {"model": "a", "input": "x"}))
    for _ in range(3):
        await client.files.create(file=("more.jsonl", b"x"), purpose="batch")
    names = [file.id async for file in client.files.list(limit=2)]
    assert len(names) == len(set(names)) == 5
    assert [f.id async for f in client.files.list(purpose="batch_output")] == [batch.output_file_id]
    assert [b.id async for b in client.batches.list(limit=1)] == [batch.id]
    shown = await client.files.retrieve(batch.output_file_id)
    assert (shown.filename, shown.purpose) == (f"{batch.id}_output.jsonl", "batch_output")
    assert shown.expires_at == shown.created_at + KEEP_SECONDS
    for name in names:
        assert (await client.files.delete(name)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.content(batch.output_file_id)
    contents = [p for p in application.folder.glob("**/*") if p.is_file() and p.suffix != ".json"]
    assert contents == []


async def test_every_example_fits_its_schema(application: Application) -> None:
    """In requests and answers of all routes: no schema stands in another one's place."""
    document = (await application.http.get("/openapi.json")).json()
    seen = 0
    for operations in document["paths"].values():
        for operation in operations.values():
            parts = [*operation.get("requestBody", {}).get("content", {}).values()]
            parts += [
                part for answer in operation["responses"].values() for part in answer["content"].values()
            ]
            for part in parts:
                shown = [each["value"] for each in part.get("examples", {}).values()]
                shown += [part["example"]] if part.get("example") is not None else []
                schema = {**part.get("schema", {}), "components": document["components"]}
                for example in shown:
                    jsonschema_rs.validate(schema, example)
                    seen += 1
    assert seen > 100
    body = document["paths"]["/v1/batch_semantic_embed"]["post"]["requestBody"]["content"]
    reference = body["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert "prompts" in document["components"]["schemas"][reference]["properties"]


async def test_nobody_finds_what_belongs_to_another_key(application: Application) -> None:
    """As if it weren't there; and nothing at all without a key."""
    batch = await run(application.client("all"), line(1, {"model": "a", "input": "x"}))
    other = application.client("some")
    asked: list[Callable[[], Awaitable[Any]]] = [
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: other.files.retrieve(batch.input_file_id),
        lambda: other.files.content(batch.output_file_id),
        lambda: other.files.delete(batch.output_file_id),
        lambda: other.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/embeddings", completion_window="24h"
        ),
    ]
    for ask in asked:
        with pytest.raises(openai.NotFoundError):
            await ask()
    assert (await other.files.list()).data == []
    assert (await other.batches.list()).data == []
    for path in ("/files", "/batches", f"/files/{batch.output_file_id}/content", f"/batches/{batch.id}"):
        assert (await application.http.get(path)).status_code == 401
    assert (await application.http.post("/batches", json={})).status_code == 401


async def test_what_only_time_mends_is_waited_for(
    application: Application, handles: dict[str, LocalHandle]
) -> None:
    """A model that isn't there yet, an engine that fails once; a failure that stays is the line's error."""
    client = application.client("all")
    await run(client, line(0, {"model": "a", "input": "x"}))
    handles["a"].failures = [ModelUnavailableError("not yet"), EngineError("once"), ModelUnavailableError("")]
    batch = await run(client, line(1, {"model": "a", "input": "y"}))
    assert batch.request_counts.completed == 1
    handles["a"].failures = [EngineError("always") for _ in range(20)]
    batch = await run(client, line(1, {"model": "a", "input": "z"}))
    (error,) = await read(client, batch.error_file_id)
    assert (error["response"]["status_code"], error["error"]["code"]) == (500, "internal_error")


async def test_an_owners_lines_start_as_there_is_room_for_them(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another owner's have room of their own."""
    monkeypatch.setattr(batch_lines, "WINDOW_FLIGHTS", 0)  # one at a time: something is always let in
    inside: Counter[str] = Counter()
    most: Counter[str] = Counter()
    together = 0
    answer = Serving.answer

    async def counted(self: Serving, wanted: Any, served: Any, client: Any, deadline: float) -> Any:
        nonlocal together
        inside[client.caller] += 1
        most[client.caller] = max(most[client.caller], inside[client.caller])
        together = max(together, inside.total())
        await asyncio.sleep(0.001)
        try:
            return await answer(self, wanted, served, client, deadline)
        finally:
            inside[client.caller] -= 1

    monkeypatch.setattr(Serving, "answer", counted)
    content = b"".join(line(number, {"model": "a", "input": f"text {number}"}) for number in range(30))
    batches = await asyncio.gather(*(run(application.client(name), content) for name in ("all", "some")))
    assert [batch.request_counts.completed for batch in batches] == [30, 30]
    assert sorted(most.values()) == [1, 1]
    assert together == 2


FORM = {"content-type": "multipart/form-data; boundary=b"}


def form(purpose: str = "batch", more: str = "", content: str = "x") -> bytes:
    """Return a form as a client may send it, the file first."""
    part = '--b\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n{}\r\n'
    text = part.format("file", '; filename="../../etc/ä.jsonl"', content)
    return (text + part.format("purpose", "", purpose) + more + "--b--\r\n").encode()


EXPIRY = (
    '--b\r\nContent-Disposition: form-data; name="expires_after[anchor]"\r\n\r\ncreated_at\r\n'
    '--b\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n{}\r\n'
)


@pytest.mark.parametrize(
    ("content", "headers", "status", "param"),
    [
        (form(), FORM, 200, None),
        (form(more=EXPIRY.format(3600)), FORM, 200, None),
        (form(more=EXPIRY.format(60)), FORM, 400, "expires_after"),
        (form(more=EXPIRY.format("soon")), FORM, 400, "expires_after"),
        (form("assistants"), FORM, 400, "purpose"),
        (form()[:-8], FORM, 400, "body"),
        (form().replace(b'"purpose"', b'"purpose"; x="%b"' % (b"y" * 5000)), FORM, 400, "body"),
        (b"{}", {"content-type": "application/json"}, 400, "content-type"),
        (b"{}", {"content-type": "multipart/form-data"}, 400, "content-type"),
        (b"nonsense", FORM, 400, "body"),
        (b"--b--\r\n", FORM, 400, "file"),
        (form().replace(b'"file"', b'"data"'), FORM, 400, "file"),
        (form() + b"", FORM | {"content-encoding": "gzip"}, 400, "body"),
        (form(content="x" * MAX_FILE_BYTES), FORM, 413, "body"),
        (form(more=form("batch")[: -len("--b--\r\n")].decode()), FORM, 400, "file"),
    ],
)
async def test_an_upload_is_taken_whole_or_leaves_nothing(
    application: Application,
    content: bytes,
    headers: dict[str, str],
    status: int,
    param: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In every order of the form's fields, whatever the file is called; nothing of it is logged."""
    headers |= {"authorization": "Bearer secret-all"}
    answer = await application.http.post("/files", content=content, headers=headers)
    assert (answer.status_code, answer.json().get("error", {}).get("param")) == (status, param), answer.text
    stored = [path for path in application.folder.glob("files/*/*/*") if path.is_file()]
    assert len(stored) == (2 if status == 200 else 0)
    # No folder either, which would count as a file of the key's.
    assert len(list(application.folder.glob("files/*/*"))) == (1 if status == 200 else 0)
    assert [each for each in caplog.records if each.name.startswith("python_multipart")] == []
    if status == 200:
        assert answer.json()["filename"] == "../../etc/ä.jsonl"
        assert answer.json()["bytes"] == 1


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"endpoint": "/v1/chat/completions"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"completion_window": None}, 400, "completion_window"),
        ({"input_file_id": "file-0"}, 404, "input_file_id"),
        ({"input_file_id": "../../runner.json"}, 404, "input_file_id"),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"metadata": {"a": 1}}, 400, "metadata"),
        ({"metadata": {"a": "b" * 513}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": True}}, 400, "output_expires_after"),
    ],
)
async def test_a_batch_that_can_not_be_is_refused(
    application: Application, changes: dict[str, Any], status: int, param: str
) -> None:
    """By the field."""
    headers = {"authorization": "Bearer secret-all"}
    file = (await application.http.post("/files", content=form(), headers=headers | FORM)).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"} | changes
    answer = await application.http.post("/batches", json=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


@pytest.mark.parametrize(
    "path", ["/files?limit=0", "/batches?limit=101", "/files?order=up", "/batches?after=x"]
)
async def test_a_page_that_can_not_be_is_refused(application: Application, path: str) -> None:
    """With a reason."""
    answer = await application.http.get(path, headers={"x-api-key": "secret-all"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


async def test_a_batch_keeps_its_keys_rate(application: Application) -> None:
    """It waits where a request of a person would be refused, and none of its lines fails for it."""
    client = application.client("few")
    content = b"".join(line(n, {"model": "a", "input": "x" * 98}) for n in range(15))
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
    )
    headers = {"authorization": "Bearer secret-few"}
    refused = lambda: application.http.post(  # noqa: E731
        "/embeddings", json={"model": "a", "input": "y" * 98}, headers=headers
    )
    await eventually(refused, lambda answer: answer.status_code == 429)
    await client.batches.cancel(batch.id)
    batch = await eventually(lambda: client.batches.retrieve(batch.id), lambda b: b.status == "cancelled")
    assert 0 < batch.request_counts.completed <= 10
    assert batch.request_counts.failed == 0


async def test_a_key_whose_rate_is_used_up_keeps_no_other_key_waiting(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many batches it has; nor do they end or fail meanwhile."""
    monkeypatch.setattr(job, "TELL_SECONDS", 0.01)
    few = application.client("few")
    content = b"".join(line(n, {"model": "a", "input": "x" * 98}) for n in range(15))
    file = await few.files.create(file=("in.jsonl", content), purpose="batch")
    standing = [
        await few.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        for _ in range(6)
    ]
    await eventually(few.batches.list, lambda page: completed(page.data) == 10)
    batch = await run(application.client("all"), line(1, {"model": "a", "input": "y"}))
    assert (batch.status, batch.request_counts.completed) == ("completed", 1)
    found = (await few.batches.list()).data
    assert completed(found) == 10
    assert {each.status for each in found} <= {"validating", "in_progress"}
    assert len(found) == len(standing)


async def test_a_key_has_a_quota_of_files_and_bytes(application: Application) -> None:
    """What is over it is refused before it is stored, and once some are deleted there is room again."""
    client = application.client("all")
    large = b"x" * 90_000
    stored = [await client.files.create(file=large, purpose="batch") for _ in range(33)]
    with pytest.raises(openai.PermissionDeniedError) as told:
        await client.files.create(file=large, purpose="batch")
    assert told.value.body == {
        "message": "your files may have 3000000 bytes in all; delete some",
        "type": "permission_error",
        "param": None,
        "code": "quota_exceeded",
    }
    names = {each.name for each in (application.folder / "files" / "all").iterdir()}
    assert names == {each.id for each in stored}
    assert await application.client("some").files.create(file=large, purpose="batch")
    await client.files.delete(stored[0].id)
    assert await client.files.create(file=large, purpose="batch")


async def test_several_uploads_at_once_have_no_more_room(application: Application) -> None:
    """Nor those that don't say how long they are."""
    headers = {"authorization": "Bearer secret-all", "content-type": "multipart/form-data; boundary=b"}

    async def form() -> AsyncIterator[bytes]:
        for name, content in (("purpose", b"batch"), ('file"; filename="f', b"x" * 90_000)):
            head = f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
            yield head.encode() + content + b"\r\n"
        yield b"--b--\r\n"

    answers = await asyncio.gather(
        *(application.http.post("/files", content=form(), headers=headers) for _ in range(40))
    )
    statuses = {each.status_code for each in answers}
    assert 403 in statuses
    assert statuses <= {200, 403}
    used = sum(each.stat().st_size for each in application.folder.rglob("*") if each.is_file())
    assert used <= QUOTA.bytes
