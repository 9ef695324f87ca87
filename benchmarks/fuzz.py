"""Whatever bytes come in, an answer goes out: every parser of the package under hypothesis, for a time each.

    python -m benchmarks.fuzz --seconds 600 --only csv "POST /embeddings"

Held of each input: no 5xx, no exception but the parser's own refusal, and no more than a second of computing.
"""

import argparse
import asyncio
import gzip
import json
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import zstandard
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from deployments.api.batches import LineError, parse_line
from deployments.api.batches.upload import Upload
from deployments.batches.routes import batch_routes
from deployments.batches.serving import BatchServing
from deployments.batches.store import BatchPlace
from deployments.batches.validation import BatchFailed, make_plan, read_lines
from deployments.bulk.connection import mistake
from deployments.config.load import load_workers
from deployments.errors import InvalidRequestError, JobError
from deployments.http.app import make_app
from deployments.jobs.source import open_source
from deployments.plan.placement import Machine
from deployments.plan.plan import make_plans
from tests.app.conftest import LocalHandle, make_serving
from tests.harness import workers

MODEL = "a"
TASK = 'prompts = {query = "find: "}\ndimensions = [4, 8]'
# Of computing, since other programs may have the cores.
HANGS_SECONDS = 1.0
EXAMPLES_AT_ONCE = 50
KEEP_SECONDS = 3600
BOUNDARY = "b"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(2**64) | st.just(MODEL),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=9)}), max_size=2)
MESSAGE = st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=9) | PARTS | JSON})
VALUES = (
    JSON
    | st.lists(st.text(max_size=9), max_size=4)
    | st.lists(st.integers(-1, 300), max_size=5)
    | st.lists(MESSAGE, max_size=3)
)
CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ mood | tojson }}{% endfor %}"
ENCODINGS = st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32"])
# What is put between: what ends texts, lines, cells and parts, and any bytes at all.
ODD = st.sampled_from([b"\n", b"\r", b'"', b",", b"\0", b"\xff", b"\\ud800", b"--b", b"NaN", b"[", b"{"])
CONTENT_ENCODINGS = st.sampled_from(["", "identity", "gzip", "deflate", "zstd", "br", "gzip, gzip"])
Check = Callable[[Any], object]


@dataclass(frozen=True)
class Target:
    """A parser: what is put in, and what raises AssertionError where it does wrong."""

    name: str
    inputs: st.SearchStrategy[Any]
    check: Check


@st.composite
def spoilt(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Draw bytes as they should be, and cut, double or change some."""
    content = draw(whole)
    for _ in range(draw(st.integers(0, 2))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.integers(begin, min(len(content), begin + 8)))
        content = content[:begin] + draw(ODD | st.binary(max_size=4)) + content[end:]
    return content


def as_json(value: Any, encoding: str) -> bytes:
    """Write a value as Python's programs do, lone surrogates and NaN included."""
    return json.dumps(value).encode(encoding)


def joined(lines: list[bytes], end: bytes) -> bytes:
    """Put lines one after the other."""
    return end.join(lines)


def lines_of(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Draw files of lines, most of them JSON."""
    line = st.builds(as_json, rows, st.just("utf-8")) | ODD | st.binary(max_size=9)
    return spoilt(st.builds(joined, st.lists(line, max_size=6), st.sampled_from([b"\n", b"\r\n", b"\n\n"])))


# --- files of jobs and batches -----------------------------------------------------------------------


def read_rows(content: bytes, name: str) -> None:
    """Read a job's file to its end: each row comes once, as a text or as an error."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(content)
        try:
            source = open_source(file, "text")
            slices = list(source.slices(2))
        except JobError as error:
            assert "\n" not in error.message, error.message
            return
    texts = [text for each in slices for text in each.texts]
    assert len(texts) == source.rows
    if name.endswith(".jsonl") and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        rows = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert len(texts) == sum(not row.isspace() for row in rows if row)
    for each in slices:
        assert each.kept.num_rows == len(each.texts) or not source.schema.names
        each.kept.validate(full=True)
    assert all(isinstance(text, str) or mistake(text) for text in texts)


def read_batch(content: bytes, loop: asyncio.AbstractEventLoop) -> None:
    """Read a batch's file to its end."""

    async def chunks() -> AsyncIterator[bytes]:
        for begin in range(0, len(content), 7):
            yield content[begin : begin + 7]

    async def read() -> None:
        try:
            plan = await make_plan(chunks(), ("content",))
        except BatchFailed as failure:
            assert failure.errors
            return
        lines = [line async for line in read_lines(chunks())]
        assert len(lines) == plan.total
        for line in lines:
            try:
                parse_line(line.raw)
            except LineError as error:
                assert error.code

    loop.run_until_complete(read())


def read_form(content: bytes, loop: asyncio.AbstractEventLoop) -> None:
    """Read an uploaded form to its end."""

    async def chunks() -> AsyncIterator[bytes]:
        for begin in range(0, len(content), 11):
            yield content[begin : begin + 11]

    async def read() -> None:
        form = Upload(f"multipart/form-data; boundary={BOUNDARY}")
        try:
            size = sum([len(piece) async for piece in form.content(chunks())])
        except InvalidRequestError:
            return
        assert size <= len(content)

    loop.run_until_complete(read())


def part(name: str, more: str, content: bytes) -> bytes:
    """Write a part of a form."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode("utf-8", "replace") + content + b"\r\n"


PART = st.builds(
    part,
    st.sampled_from(["file", "purpose", "expires_after[anchor]", "expires_after[seconds]"])
    | st.text(max_size=5),
    st.sampled_from(["", '; filename="f"', "; filename*=UTF-8''f", "; filename="]),
    st.sampled_from([b"batch", b"created_at", b"3600"]) | st.binary(max_size=20),
)
FORM = spoilt(st.builds(lambda parts: joined(parts, b"") + b"--b--\r\n", st.lists(PART, max_size=4)))
ROW = st.dictionaries(st.sampled_from(["text", "id", "t"]), VALUES, min_size=1, max_size=3) | JSON
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.text(max_size=3) | JSON,
        "method": st.just("POST") | JSON,
        "url": st.just("/v1/embeddings") | JSON,
        "body": st.fixed_dictionaries({"model": st.just(MODEL), "input": VALUES}) | JSON,
    },
)
CELLS = st.lists(st.text(max_size=5) | st.just('"x\ny"'), min_size=1, max_size=3)
TABLE = st.builds(
    lambda rows, end, encoding: end.join(["text,id", *map(",".join, rows)]).encode(encoding, "replace"),
    st.lists(CELLS, max_size=6),
    st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    ENCODINGS,
)


# --- the dialects ------------------------------------------------------------------------------------


def application(folder: Path) -> FastAPI:
    """Return the whole application over a stand-in engine, with files and batches."""
    (folder / "a.toml").write_text(
        workers.fake(MODEL, f'dimension = 16, chat_template = "{CHAT}"', task=TASK)
    )
    plans = make_plans(load_workers(folder / "a.toml", environ={}), Machine(2, 0, 2))
    serving = make_serving({plan.name: LocalHandle(plan) for plan in plans})
    batches = BatchPlace(str(folder / "batches"), KEEP_SECONDS).open()

    async def gather() -> list[bytes]:
        return []

    return make_app(
        serving, gather, batches=batch_routes(BatchServing(batches, 10_000, lambda: None, serving))
    )


def routes_of(app: FastAPI) -> Iterator[str]:
    """Yield the paths that take a body."""
    for route in app.routes:
        if isinstance(route, APIRoute) and "POST" in route.methods and "{" not in route.path:
            yield route.path


def fields_of(document: dict[str, Any], path: str) -> list[str]:
    """Return the names of all fields that the document knows of a route's body."""
    schemas = document["components"]["schemas"]
    names = {"model", "input"}
    waiting: list[Any] = [document["paths"].get(path, {}).get("post", {}).get("requestBody", {})]
    seen: set[str] = set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            reference = str(each.get("$ref", "")).rpartition("/")[2]
            if reference and reference not in seen:
                seen.add(reference)
                waiting.append(schemas.get(reference, {}))
            properties = each.get("properties")
            names |= set(properties) if isinstance(properties, dict) else set()
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return sorted(names)


def bodies_of(names: list[str]) -> st.SearchStrategy[bytes]:
    """Draw bodies, most of which name the model and some of the route's fields."""
    some = st.dictionaries(st.sampled_from(names), VALUES, max_size=5)
    body = st.builds(lambda fields, model: fields | model, some, st.sampled_from([{}, {"model": MODEL}]))
    return spoilt(st.builds(as_json, body | JSON, ENCODINGS))


def route_target(app: FastAPI, path: str, loop: asyncio.AbstractEventLoop) -> Target:
    """Return what asks one route."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://cluster")
    is_form = path.endswith("/files")
    kind = f"multipart/form-data; boundary={BOUNDARY}" if is_form else "application/json"

    def check(drawn: tuple[bytes, str]) -> None:
        content, encoding = drawn
        headers = {"content-type": kind, **({"content-encoding": encoding} if encoding else {})}
        if encoding == "gzip":
            content = gzip.compress(content, 1, mtime=0)
        elif encoding == "zstd":
            content = zstandard.compress(content)
        answer = loop.run_until_complete(client.post(path, content=content, headers=headers))
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json().keys() >= {"error"}, answer.text
            assert "Traceback" not in answer.text

    bodies = FORM if is_form else bodies_of(fields_of(app.openapi(), path))
    return Target(f"POST {path}", st.tuples(bodies, st.just("") | CONTENT_ENCODINGS), check)


@contextmanager
def targets() -> Iterator[list[Target]]:
    """Give every parser, by name."""
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder:
        app = application(Path(folder))
        yield [
            Target("lines of jobs", lines_of(ROW), lambda content: read_rows(content, "in.jsonl")),
            Target("csv", spoilt(TABLE), lambda content: read_rows(content, "in.csv")),
            Target("lines of batches", lines_of(REQUEST), lambda content: read_batch(content, loop)),
            Target("multipart", FORM, lambda content: read_form(content, loop)),
            *(route_target(app, path, loop) for path in routes_of(app) if not path.startswith("/v1/")),
        ]
    loop.close()


def seconds_of(target: Target, drawn: Any) -> float:
    """Return the CPU-seconds that this process takes over one input."""
    begun = time.process_time()
    target.check(drawn)
    return time.process_time() - begun


def fuzz(target: Target, seconds: float) -> tuple[int, float]:
    """Try inputs for a time; return how many, and how long the slowest took to compute.

    Raises what the first bad one raised, made as small as hypothesis can.
    """
    tried, slowest = 0, 0.0

    def one(drawn: Any) -> None:
        nonlocal tried, slowest
        took = seconds_of(target, drawn)
        if took > HANGS_SECONDS:  # the first of a kind pays for what is loaded then
            took = seconds_of(target, drawn)
        tried, slowest = tried + 1, max(slowest, took)
        assert took <= HANGS_SECONDS, f"{took:.1f} s"

    end = time.monotonic() + seconds
    number = 0
    while number == 0 or time.monotonic() < end:
        shown = settings(
            max_examples=EXAMPLES_AT_ONCE,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        seed(number)(shown(given(target.inputs)(one)))()
        number += 1
    return tried, slowest


def main() -> int:
    """Fuzz all, or those that are named; return 1 where one did wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="for each parser (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="names of parsers, as they are printed")
    parsed = parser.parse_args()
    failed = 0
    with targets() as found:
        for target in found:
            if parsed.only and target.name not in parsed.only:
                continue
            try:
                tried, slowest = fuzz(target, parsed.seconds)
            except Exception:  # whatever it is, the other parsers are tried, too
                traceback.print_exc()
                failed += 1
                print(f"{target.name}: FAILED", flush=True)
            else:
                print(f"{target.name}: {tried:,} inputs, the slowest {slowest:.3f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
