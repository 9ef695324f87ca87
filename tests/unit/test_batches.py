"""Batches without HTTP and without a model: storage, validation, blocks, restarts, ends."""

import asyncio
import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deployments.api.batches import Line, LineError, NewBatch, Page, parse_line
from deployments.api.batches.schema import Batch, FileObject
from deployments.batches import run as job
from deployments.batches import runner
from deployments.batches import validation as plan
from deployments.batches.run import Embed
from deployments.batches.runner import Runner
from deployments.batches.storage import Storage
from deployments.batches.store import NOBODY, Batches, Files, Quota
from deployments.batches.validation import BatchFailed, make_plan
from deployments.errors import (
    BatchMissingError,
    ConfigError,
    FileMissingError,
    InvalidRequestError,
    QuotaError,
    StorageUnavailableError,
)
from deployments.keys.file import Key, Keys, hash_of
from deployments.keys.ring import KeyRing

DAY = 24 * 3600
KEEP = 30 * DAY
COUNTER = itertools.count()
# A turn takes milliseconds; one that never comes hangs.
HANGS_SECONDS = 60.0


def request(number: int, **changes: Any) -> dict[str, Any]:
    """Return a line of an input file."""
    body = {"model": "m", "input": f"text {number}"}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/embeddings", "body": body} | changes


def lines(*requests: Any) -> bytes:
    """Return an input file."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in requests)


BAD = [
    (b"{", None, "invalid_json_line"),
    (b"[]", None, "invalid_json_line"),
    (lines({k: v for k, v in request(1).items() if k != "custom_id"}), None, "missing_required_parameter"),
    (lines(request(1, custom_id=7)), None, "missing_required_parameter"),
    (lines(request(1, method="GET")), "c1", "invalid_method"),
    (lines(request(1, url="/v1/chat/completions")), "c1", "invalid_url"),
    (lines(request(1, body="text")), "c1", "missing_required_parameter"),
]


@pytest.mark.parametrize(("raw", "custom_id", "code"), BAD)
def test_a_line_that_is_no_request_says_why(raw: bytes, custom_id: str | None, code: str) -> None:
    """By OpenAI's codes, with the custom_id where that can be read."""
    with pytest.raises(LineError) as caught:
        parse_line(raw)
    assert (caught.value.code, caught.value.custom_id) == (code, custom_id)


@pytest.mark.parametrize(
    ("value", "inputs"),
    [
        *[("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2]], 2), (None, 1), ([], 1)],
        *[([{"role": "user"}] * 3, 1), ([[{"role": "user"}]] * 3, 3)],
    ],
)
def test_inputs_are_counted_in_every_shape(value: Any, inputs: int) -> None:
    """A list of token ids is one input, and so is one of messages."""
    assert Line("c", {"input": value}).inputs == inputs
    assert Line("c", {"messages": value}).inputs == inputs


# --- validation ------------------------------------------------------------------------------------


async def chunked(content: bytes, size: int = 7) -> AsyncIterator[bytes]:
    """Yield content in small chunks."""
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def test_blocks_cover_the_file_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks, the blank lines, and the missing last line feed."""
    monkeypatch.setattr(plan, "BLOCK_LINES", 3)
    content = b"\xef\xbb\xbf" + lines(*map(request, range(4))) + b"\n  \n" + lines(*map(request, range(4, 8)))
    content = content.rstrip(b"\n")
    found = await make_plan(chunked(content), ("content",))
    assert (found.total, found.model, found.repeated) == (8, "m", ())
    assert len(found.blocks) == 3
    numbers = []
    for block in found.blocks:
        part = chunked(content[block.start : block.end])
        numbers += [
            (line.number, parse_line(line.raw).custom_id)
            async for line in plan.read_lines(part, block.start, block.first)
        ]
    assert numbers == [
        (1, "c0"),
        (2, "c1"),
        (3, "c2"),
        (4, "c3"),
        (7, "c4"),
        (8, "c5"),
        (9, "c6"),
        (10, "c7"),
    ]


@pytest.mark.parametrize(
    ("limit", "value", "content", "code"),
    [
        ("MAX_LINES", 2, lines(*map(request, range(3))), "too_many_requests"),
        ("MAX_INPUTS", 4, lines(request(1, body={"input": ["a"] * 5})), "too_many_inputs"),
        ("MAX_LINE_BYTES", 50, lines(request(1, body={"input": "a" * 99})), "line_too_long"),
        ("MAX_LINES", 9, b"\n \n", "empty_file"),
        ("MAX_LINES", 9, b"id,text\n1,hello\n", "invalid_json_line"),
    ],
)
async def test_what_can_not_be_run_fails_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int, content: bytes, code: str
) -> None:
    """Over a limit, or with nothing in it that is a request."""
    monkeypatch.setattr(plan, limit, value)
    with pytest.raises(BatchFailed) as caught:
        await make_plan(chunked(content), ())
    assert caught.value.errors[0].code == code


# --- storage ---------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A local folder, and another file system by its URL."""
    local = request.param == "local"
    opened = Storage(str(tmp_path / "storage") if local else f"memory://test-{next(COUNTER)}")
    opened.check()
    return opened


async def test_what_is_written_is_read(storage: Storage) -> None:
    """Whole, in part, in chunks, listed; what isn't there is None."""
    await storage.write("a/b/one", b"12345")
    await storage.write("a/b/one", b"67890")
    assert await storage.read("a/b/one") == b"67890"
    assert await storage.read("a/b/two") is None
    assert await storage.read_range("a/b/one", 1, 3) == b"78"
    assert await storage.write_stream("a/c", chunked(b"x" * 100)) == 100
    assert b"".join([chunk async for chunk in storage.stream("a/c")]) == b"x" * 100
    assert (await storage.names("a"), await storage.names("nothing")) == (["b", "c"], [])
    await storage.remove("a/b")
    await storage.remove("a/b")
    assert await storage.names("a") == ["c"]


async def test_an_upload_that_breaks_off_leaves_nothing(storage: Storage) -> None:
    """The error is the sender's."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 100
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await storage.write_stream("a/c", broken())
    assert await storage.names("a") == []


async def test_a_storage_that_fails_says_so(tmp_path: Path) -> None:
    """Without the path; and one that nothing can open isn't opened."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailableError):
        await Storage(str(tmp_path / "file")).write("a/b", b"")
    with pytest.raises(ConfigError, match="can't be written"):
        Storage(str(tmp_path / "file")).check()
    with pytest.raises(ConfigError, match="batches: gibberish://a"):
        Storage("gibberish://a")


# --- batches ---------------------------------------------------------------------------------------


class Cluster:
    """A storage, a clock, and a model whose answers a test can hold back."""

    def __init__(self, storage: Storage, keys: KeyRing | None = None) -> None:
        """Hold nothing back yet."""
        self.storage = storage
        self.now = datetime(2026, 11, 22, tzinfo=UTC).timestamp()
        self.files = Files(storage, KEEP, lambda: self.now)
        self.batches = Batches(self.files, lambda: self.now)
        self.keys = keys
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.free = 0  # answers given though the gate is shut

    async def embed(self, fields: dict[str, Any], _: Key | None) -> tuple[bytes, int]:
        """Answer with the text itself."""
        if not isinstance(text := fields.get("input"), str):
            raise InvalidRequestError("`input` must be a string", "input")
        self.asked.append(text)
        if self.free > 0:
            self.free -= 1
        else:
            await self.gate.wait()
        return json.dumps(text).encode(), 3

    def runner(self, embed: Embed | None = None) -> Runner:
        """Return a new runner."""
        return Runner(self.files, embed or self.embed, self.keys, KEEP, lambda: self.now)

    async def upload(self, content: bytes, owner: str = NOBODY, purpose: Any = "batch") -> FileObject:
        """Make a file."""
        name, path = self.files.upload(owner)
        size = await self.storage.write_stream(path, chunked(content, 1000))
        file = FileObject(
            id=name,
            bytes=size,
            created_at=int(self.now),
            filename="in.jsonl",
            purpose=purpose,
            expires_at=None,
        )
        return await self.files.add(owner, file, (path,))

    async def create(self, content: bytes, owner: str = NOBODY) -> Batch:
        """Make a batch of a new file."""
        file = await self.upload(content, owner)
        return await self.batches.create(owner, NewBatch(file.id, {"job": "x"}, None))

    async def until(self, runner: Runner, batch: Batch, what: Callable[[Batch], bool]) -> Batch:
        """Let the runner work until a batch is as wanted."""
        end = time.monotonic() + HANGS_SECONDS
        while time.monotonic() < end:
            await runner.turn()
            await asyncio.sleep(0.001)
            owner = self.owner(batch)
            found = await self.batches.find(owner, batch.id)
            # Its end is told before the runner has put everything away.
            if what(found) and not (ended(found) and f"{owner}+{batch.id}" in runner._running):
                return found
        raise AssertionError(found)

    def owner(self, _: Batch) -> str:
        """Return whose batch it is."""
        return "search" if self.keys is not None else NOBODY

    async def read(self, name: str | None, owner: str = NOBODY) -> list[dict[str, Any]]:
        """Return a file's lines."""
        assert name is not None
        record = await self.files.find(owner, name)
        content = b"".join([chunk async for chunk in self.files.content(record)])
        assert len(content) == record.shown.bytes
        return [json.loads(line) for line in content.splitlines()]


def ended(batch: Batch) -> bool:
    """Whether nothing more will happen."""
    return batch.status in ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def cluster(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """One with small blocks."""
    monkeypatch.setattr(plan, "BLOCK_LINES", 4)
    return Cluster(storage)


async def test_bad_lines_are_errors_of_their_own(cluster: Cluster) -> None:
    """Every other line has its result, in order; each bad one its custom_id and reason."""
    bad = [raw.rstrip(b"\n") + b"\n" for raw, _, _ in BAD]
    content = lines(*map(request, range(2, 12))) + b"".join(bad) + lines(request(2))
    content += lines(request(20, body={"model": "m"}), request(21))
    batch = await cluster.create(content)
    assert (batch.status, batch.request_counts.total) == ("validating", 0)
    batch = await cluster.until(cluster.runner(), batch, ended)
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": 20, "completed": 11, "failed": 9}
    assert batch.usage.total_tokens == 33
    assert batch.metadata == {"job": "x"}
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert times == (int(cluster.now),) * 4
    output = await cluster.read(batch.output_file_id)
    assert [each["custom_id"] for each in output] == [*(f"c{n}" for n in range(2, 12)), "c21"]
    assert [each["response"]["body"] for each in output] == [*(f"text {n}" for n in range(2, 12)), "text 21"]
    assert output[0]["response"].keys() == {"status_code", "request_id", "body"}
    assert output[0]["error"] is None
    errors = await cluster.read(batch.error_file_id)
    expected = [(custom_id, code) for _, custom_id, code in BAD]
    # A bad line takes its custom_id too: the later ones of c1 are errors for what is wrong with themselves.
    expected += [("c2", "duplicate_custom_id"), ("c20", "invalid_request")]
    assert [(each["custom_id"], each["error"]["code"]) for each in errors] == expected
    assert errors[0]["response"] is None
    assert errors[0]["error"]["line"] == 11
    assert errors[-1]["response"]["status_code"] == 400
    assert errors[-1]["response"]["body"]["error"]["param"] == "input"
    assert len({each["id"] for each in output + errors}) == 20
    assert await cluster.storage.names("waiting") == []


@pytest.mark.parametrize("free", [0, 3, 4, 5, 21])
async def test_a_restart_goes_on_after_the_last_block(cluster: Cluster, free: int) -> None:
    """Nothing is lost or there twice, wherever it was cut off; at most the blocks under way are repeated."""
    cluster.gate.clear()
    cluster.free = free
    batch = await cluster.create(lines(*map(request, range(22))))
    first = cluster.runner()
    blocks = free // 4
    batch = await cluster.until(
        first,
        batch,
        lambda b: b.request_counts.completed >= 4 * blocks and len(cluster.asked) >= min(22, free + 4),
    )
    await first.stop()
    before = len(cluster.asked)
    cluster.gate.set()
    batch = await cluster.until(cluster.runner(), batch, ended)
    assert batch.status == "completed"
    output = await cluster.read(batch.output_file_id)
    assert [each["custom_id"] for each in output] == [f"c{n}" for n in range(22)]
    assert before + len(cluster.asked[before:]) <= 22 + 4 * job.BLOCKS_AT_ONCE


async def test_counts_move_with_the_lines(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a block takes; they never fall, whoever goes on with it, and are exact in the end."""
    monkeypatch.setattr(job, "TELL_SECONDS", 0.001)
    cluster.gate.clear()
    cluster.free = 6
    batch = await cluster.create(lines(*map(request, range(8))))
    first = cluster.runner()
    await cluster.until(first, batch, lambda b: b.request_counts.completed == 6)
    await first.stop()
    cluster.free = 1
    second = cluster.runner()
    for _ in range(20):
        found = await cluster.until(second, batch, lambda _: True)
        assert found.request_counts.completed >= 6
    cluster.gate.set()
    found = await cluster.until(second, batch, ended)
    assert found.request_counts.model_dump() == {"total": 8, "completed": 8, "failed": 0}
    assert found.usage.total_tokens == 24


async def test_two_runners_never_mix_their_lines(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both work, as while a node is cut off: each line is whole, of either, and the size is the file's."""

    async def too_early(_: Runner) -> None:
        """Look before the other one comes, each time."""

    monkeypatch.setattr(Runner, "_check", too_early)
    batch = await cluster.create(lines(*map(request, range(22))))
    waiting = [0, 0]
    # Neither has a block that the other one hasn't begun.
    both: defaultdict[str, asyncio.Barrier] = defaultdict(lambda: asyncio.Barrier(2))

    def of(number: int) -> Embed:
        async def embed(fields: dict[str, Any], _: Key | None) -> tuple[bytes, int]:
            waiting[number] += 1
            await both[fields["input"]].wait()
            await asyncio.sleep(0.001 * (waiting[number] % 5))
            return json.dumps(fields["input"] + number * " and more").encode(), 3

        return embed

    first, second = cluster.runner(of(0)), cluster.runner(of(1))
    await first.turn()
    await second.turn()
    while first._running or second._running:  # noqa: ASYNC110 - neither looks who else there is
        await asyncio.sleep(0.001)
    assert min(waiting) == 22
    found = await cluster.batches.find(NOBODY, batch.id)
    assert found.status == "completed"
    output = await cluster.read(found.output_file_id)  # holds its size against its content
    assert [each["custom_id"] for each in output] == [f"c{n}" for n in range(22)]
    assert {each["response"]["body"].removesuffix(" and more") for each in output} == {
        f"text {n}" for n in range(22)
    }


async def embed_unless_away(fields: dict[str, Any], _: Key | None) -> tuple[bytes, int]:
    """Answer at once, and never for the model that has no replica."""
    if fields["model"] == "away":
        await asyncio.Event().wait()
    return b"{}", 1


async def test_batches_that_stand_keep_nobody_waiting(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many of one model that has no replica: another model's and another owner's end beside them."""
    monkeypatch.setattr(runner, "MAX_RUNNING", 2)

    body = {"input": "x"}
    for owner in ("greedy", NOBODY):
        for _ in range(5):
            await cluster.create(lines(request(1, body=body | {"model": "away"})), owner)
            cluster.now += 1
    late = [
        await cluster.create(lines(request(2, body=body | {"model": model})), NOBODY)
        for model in ("here", "there", "here")
    ]
    worker = cluster.runner(embed_unless_away)
    for each in late:
        assert (await cluster.until(worker, each, ended)).status == "completed"
    assert Counter(found.owner for found, _ in worker._running.values()) == {"greedy": 1, NOBODY: 1}
    waiting = (await cluster.batches.list(NOBODY, Page(9))).data[3]
    assert waiting.status == "validating"
    await cluster.batches.cancel(NOBODY, waiting.id)
    assert (await cluster.until(worker, waiting, ended)).status == "cancelled"
    other = await cluster.create(lines(request(3, body=body | {"model": "here"})), "third")
    monkeypatch.setattr(cluster, "owner", lambda _: "third")
    assert (await cluster.until(worker, other, ended)).status == "completed"
    await worker.stop()


async def test_cancelling_keeps_what_is_done(cluster: Cluster) -> None:
    """The lines that were answered are in the output file, the others nowhere."""
    cluster.gate.clear()
    cluster.free = 6
    batch = await cluster.create(lines(*map(request, range(22))))
    runner = cluster.runner()
    await cluster.until(runner, batch, lambda _: len(cluster.asked) >= 12)
    assert (await cluster.batches.cancel(NOBODY, batch.id)).status == "cancelling"
    batch = await cluster.until(runner, batch, ended)
    assert (batch.status, batch.error_file_id) == ("cancelled", None)
    assert batch.cancelling_at and batch.cancelled_at
    output = await cluster.read(batch.output_file_id)
    assert batch.request_counts.completed == len({each["custom_id"] for each in output}) == len(output) == 6
    assert (await cluster.batches.cancel(NOBODY, batch.id)).status == "cancelled"


async def test_time_that_runs_out_ends_a_batch(cluster: Cluster) -> None:
    """What is done is kept, and every other line says `batch_expired`."""
    cluster.gate.clear()
    cluster.free = 6
    batch = await cluster.create(lines(*map(request, range(21))) + b"{\n")
    runner = cluster.runner()
    await cluster.until(runner, batch, lambda _: len(cluster.asked) >= 12)
    cluster.now += DAY
    batch = await cluster.until(runner, batch, ended)
    assert batch.status == "expired"
    assert batch.expired_at == batch.expires_at
    output, errors = await cluster.read(batch.output_file_id), await cluster.read(batch.error_file_id)
    assert (len(output), len(errors)) == (6, 16)
    assert sorted(each["custom_id"] for each in output + errors[:-1]) == sorted(f"c{n}" for n in range(21))
    assert {each["error"]["code"] for each in errors[:-1]} == {"batch_expired"}
    assert errors[-1]["error"]["code"] == "invalid_json_line"
    with pytest.raises(InvalidRequestError, match="expired"):
        await cluster.batches.cancel(NOBODY, batch.id)


async def test_a_batch_without_its_file_fails(cluster: Cluster) -> None:
    """It says why; so does one of which nothing can be run."""
    batch = await cluster.create(lines(request(1)))
    await cluster.files.remove(NOBODY, batch.input_file_id)
    csv = await cluster.create(b"a,b\n1,2\n")
    runner = cluster.runner()
    for each, code, line in ((batch, "file_not_found", None), (csv, "invalid_json_line", 1)):
        found = await cluster.until(runner, each, ended)
        assert found.status == "failed"
        assert found.failed_at
        assert found.errors is not None
        assert (found.errors.data[0].code, found.errors.data[0].line) == (code, line)


async def test_the_runner_that_came_last_goes_on_alone(cluster: Cluster) -> None:
    """The other one takes over when it is silent."""
    cluster.gate.clear()
    batch = await cluster.create(lines(request(1)))
    first, second = cluster.runner(), cluster.runner()
    await cluster.until(first, batch, lambda _: len(cluster.asked) == 1)
    await cluster.until(second, batch, lambda _: len(cluster.asked) == 2)
    cluster.gate.set()
    for _ in range(20):
        await first.turn()
        await asyncio.sleep(0.001)
    assert (await cluster.batches.find(NOBODY, batch.id)).status in ("in_progress", "finalizing", "completed")
    assert (await cluster.until(second, batch, ended)).status == "completed"
    third = await cluster.create(lines(request(2)))
    for _ in range(5):
        await first.turn()
    assert len(cluster.asked) == 2
    cluster.now += runner.LEASE_SECONDS
    assert (await cluster.until(first, third, ended)).status == "completed"


async def test_a_failing_storage_delays_a_batch(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run again when the storage is back."""
    batch = await cluster.create(lines(*map(request, range(9))))
    write = cluster.storage.write
    failures = 1

    async def failing(path: str, content: bytes) -> None:
        nonlocal failures
        if "output" in path and failures:
            failures -= 1
            raise StorageUnavailableError("the storage fails")
        await write(path, content)

    monkeypatch.setattr(cluster.storage, "write", failing)
    worker = cluster.runner()
    await cluster.until(worker, batch, lambda _: not failures and not worker._running)
    assert (await cluster.batches.find(NOBODY, batch.id)).status == "in_progress"
    cluster.now += runner.AGAIN_SECONDS
    batch = await cluster.until(worker, batch, ended)
    assert len(await cluster.read(batch.output_file_id)) == 9


async def test_a_revoked_key_ends_its_batches(storage: Storage) -> None:
    """What is done is kept; nobody else's things are found."""
    search = Key(name="search", sha256=hash_of(b"s"), created=datetime.now(UTC))
    ring = KeyRing(Keys(keys=(search,)))
    cluster = Cluster(storage, ring)
    cluster.gate.clear()
    cluster.free = 1
    batch = await cluster.create(lines(request(1), request(2)), "search")
    with pytest.raises(BatchMissingError):
        await cluster.batches.find("other", batch.id)
    with pytest.raises(FileMissingError):
        await cluster.batches.create("other", NewBatch(batch.input_file_id, None, None))
    worker = cluster.runner()
    await cluster.until(worker, batch, lambda _: len(cluster.asked) == 2)
    ring.take(Keys())
    batch = await cluster.until(worker, batch, ended)
    assert (batch.status, batch.request_counts.completed) == ("failed", 1)
    assert batch.errors is not None
    assert batch.errors.data[0].code == "invalid_api_key"
    assert len(await cluster.read(batch.output_file_id, "search")) == 1


async def test_owners_take_turns(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has made many batches doesn't keep others from starting."""
    monkeypatch.setattr(runner, "MAX_RUNNING", 2)
    cluster.gate.clear()
    for _ in range(3):
        await cluster.create(lines(request(1)), "greedy")
        cluster.now += 1
    late = await cluster.create(lines(request(2)), "late")
    worker = cluster.runner()
    await worker.turn()
    assert {found.owner for found, _ in worker._running.values()} == {"greedy", "late"}
    cluster.gate.set()
    for _ in range(200):
        await worker.turn()
        await asyncio.sleep(0.001)
    assert (await cluster.batches.find("late", late.id)).status == "completed"
    assert {b.status for b in (await cluster.batches.list("greedy", Page(9))).data} == {"completed"}


async def test_pages_show_everything_once(cluster: Cluster) -> None:
    """From the newest on, or from the oldest; what has gone meanwhile doesn't matter."""
    made = []
    for _ in range(5):
        made.append((await cluster.upload(b"x")).id)
        cluster.now += 1
    await cluster.upload(b"y", purpose="batch_output")
    seen: list[str] = []
    after = None
    while True:
        page = await cluster.files.list(NOBODY, Page(2, after), "batch")
        seen += [file.id for file in page.data]
        if not page.has_more:
            break
        after = page.last_id
        if after == made[3]:
            await cluster.files.remove(NOBODY, after)
    assert seen == made[::-1]
    page = await cluster.files.list(NOBODY, Page(2, oldest_first=True))
    assert [file.id for file in page.data] == made[:2]
    with pytest.raises(InvalidRequestError, match="after"):
        await cluster.files.list(NOBODY, Page(2, "../../etc"))


async def sweep(worker: Runner) -> None:
    """Let the runner remove what is too old."""
    await worker.turn()
    assert worker._sweeping is not None
    await worker._sweeping


async def test_what_is_too_old_is_removed(cluster: Cluster) -> None:
    """Files and batches after their time, uploads that were never finished."""
    batch = await cluster.create(lines(request(1)))
    worker = cluster.runner()
    batch = await cluster.until(worker, batch, ended)
    _, orphan = cluster.files.upload(NOBODY)
    await cluster.storage.write(orphan, b"half")
    cluster.now += 2 * DAY
    await sweep(worker)
    assert await cluster.storage.read(orphan) is None
    assert len(await cluster.read(batch.output_file_id)) == 1
    cluster.now += KEEP
    with pytest.raises(FileMissingError):
        await cluster.read(batch.output_file_id)
    assert (await cluster.files.list(NOBODY, Page(9))).data == []
    await sweep(worker)
    assert await cluster.storage.names(f"files/{NOBODY}") == []
    assert await cluster.storage.names(f"batches/{NOBODY}") == []
    with pytest.raises(BatchMissingError):
        await cluster.batches.find(NOBODY, batch.id)


async def test_batches_of_several_models_that_stand_keep_nobody_waiting(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do those whose lines name none: what isn't known of a batch yet isn't what they have in common."""
    monkeypatch.setattr(runner, "MAX_RUNNING", 2)

    both = [request(n, body={"model": model, "input": "x"}) for n, model in enumerate(("away", "here"))]
    for _ in range(3):
        await cluster.create(lines(*both))
        cluster.now += 1
    worker = cluster.runner(embed_unless_away)
    for _ in range(20):
        await worker.turn()
        await asyncio.sleep(0.001)
    late = await cluster.create(lines(request(2, body={"model": "here", "input": "x"})))
    assert (await cluster.until(worker, late, ended)).status == "completed"
    await worker.stop()


async def test_a_runner_that_lost_its_place_says_nothing_more_of_a_batch(cluster: Cluster) -> None:
    """Lines that end late, as after a node was cut off, take nothing back of what the other one has told."""
    cluster.gate.clear()
    batch = await cluster.create(lines(*map(request, range(22))))
    first = cluster.runner()
    await cluster.until(first, batch, lambda _: len(cluster.asked) == 8)

    async def at_once(fields: dict[str, Any], _: Key | None) -> tuple[bytes, int]:
        return json.dumps(fields["input"]).encode(), 3

    done = await cluster.until(cluster.runner(at_once), batch, ended)
    cluster.gate.set()
    cluster.free = 100
    while first._running:  # it hasn't looked who else there is
        await asyncio.sleep(0.001)
        assert await cluster.batches.find(NOBODY, batch.id) == done


async def test_a_write_that_hangs_spoils_nothing_when_it_ends(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same runner has gone on with the block by then: what it counts is what it wrote this time."""
    batch = await cluster.create(lines(*map(request, range(3))))
    write = cluster.storage.write
    late: list[Any] = []

    async def hanging(path: str, content: bytes) -> None:
        if "output" in path and not late:
            late.append(write(path, content.replace(b"text", b"another")))
            raise StorageUnavailableError("the storage fails")
        await write(path, content)

    monkeypatch.setattr(cluster.storage, "write", hanging)
    worker = cluster.runner()
    await cluster.until(worker, batch, lambda _: bool(late) and not worker._running)  # the failure is known
    cluster.now += runner.AGAIN_SECONDS
    batch = await cluster.until(worker, batch, ended)
    await late[0]
    output = await cluster.read(batch.output_file_id)  # holds its size against its content
    assert [each["response"]["body"] for each in output] == [f"text {n}" for n in range(3)]


async def test_a_quota_of_files_and_of_batches(cluster: Cluster) -> None:
    """Of each owner alone; a batch that has ended leaves its place to another one."""
    cluster.files.quota = Quota(files=3, batches=2)
    first = await cluster.create(lines(request(1)))
    await cluster.create(lines(request(2)))
    with pytest.raises(QuotaError) as told:
        await cluster.create(lines(request(3)))
    assert told.value.message == (
        "there may be 2 batches of yours that aren't done; wait for one, or cancel one"
    )
    with pytest.raises(QuotaError) as told:
        await cluster.files.check_room(NOBODY, 1)
    assert told.value.message == "there may be 3 files of yours; delete some"
    await cluster.create(lines(request(4)), "other")
    await cluster.until(cluster.runner(), first, ended)
    cluster.files.quota = Quota(files=9, batches=2)  # what came out of it is files, too
    await cluster.batches.create(NOBODY, NewBatch(first.input_file_id, None, None))


async def test_a_file_in_another_encoding_is_named(cluster: Cluster) -> None:
    """As PowerShell writes it; not by one error for each line."""
    text = lines(request(1), request(2)).decode()
    for encoding in ("utf-16", "utf-16-be"):
        content = ("\ufeff" if encoding == "utf-16-be" else "") + text
        batch = await cluster.create(content.encode(encoding))
        batch = await cluster.until(cluster.runner(), batch, ended)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [(each.code, each.message) for each in batch.errors.data] == [
            ("invalid_encoding", "the file is in UTF-16; it must be in UTF-8")
        ]


async def test_a_mark_blank_lines_and_other_line_ends_are_no_mistakes(cluster: Cluster) -> None:
    """Nor do they cost a line."""
    content = b"\xef\xbb\xbf\r\n" + lines(request(1), request(2)).replace(b"\n", b"\r\n\r\n \n")
    batch = await cluster.until(cluster.runner(), await cluster.create(content), ended)
    assert batch.request_counts.model_dump() == {"total": 2, "completed": 2, "failed": 0}
