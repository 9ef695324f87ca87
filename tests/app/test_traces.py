"""Traces in one process: by either protocol, named in the logs, of what ended early; and none at all."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from deployments import tracing
from deployments.__main__ import main
from deployments.errors import EngineCrashError
from deployments.http.app import make_app
from deployments.tracing import Times, gaps, objection, tracer
from tests.app.conftest import LocalHandle, client_of, make_serving
from tests.app.test_logs import application, told
from tests.harness.collector import ERROR, Collector, check, collector, covered

ON = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.fixture(params=["http/protobuf", "grpc"])
def collected(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """What the application in this process sends."""
    with collector() as found:
        url = found.http_url if request.param != "grpc" else found.grpc_url
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", request.param)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")  # what is sent is what is flushed
        forget()
        yield found
        provider = tracing._provider()
        assert provider is not None
        provider.shutdown()
    forget()


def forget() -> None:
    """Let the environment be read anew."""
    tracing._provider.cache_clear()
    tracer.cache_clear()


async def test_the_log_names_the_trace(
    handles: dict[str, LocalHandle],
    collected: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A line of JSON by a field of its own, a line of text in its text."""
    caplog.set_level(logging.INFO, "ray.serve")
    monkeypatch.setenv("LOG_FORMAT", "json")
    async with application(handles) as client:
        await client.post("/embeddings", json={"model": "a", "input": "x"})
    monkeypatch.setenv("LOG_FORMAT", "text")
    monkeypatch.setenv("LOG_SLOW_SECONDS", "0.1")
    async with application(handles) as client:
        await client.post("/embeddings", json={"model": "patient", "input": "x"})
    (line, _), (_, text) = told(caplog), caplog.messages
    await asyncio.to_thread(tracing.flush)
    (first, *_), (second, *_) = sorted(collected.traces().values(), key=lambda spans: spans[0].times)
    assert (line["trace_id"], line["span_id"]) == (first.trace, first.id)
    assert f"trace_id {second.trace}, span_id {second.id}" in text


async def test_a_request_out_of_time_shows_where_it_was(
    client: httpx.AsyncClient, collected: Collector
) -> None:
    """In a call that hadn't ended: the span ends with the request."""
    body = {"model": "slow", "input": "x"}
    await client.post("/embeddings", json=body)  # brings the engine up
    answer = await client.post("/embeddings", json=body)
    assert answer.status_code == 408
    await asyncio.to_thread(tracing.flush)
    _, (root, *others) = sorted(collected.traces().values(), key=lambda spans: spans[0].times)
    assert root.attributes["error.type"] == "deadline_exceeded"
    (call,) = [each for each in others if each.name == "call"]
    assert root.times[0] < call.times[0] < call.times[1] <= root.times[1]
    assert covered([each.times for each in others], root.times) >= 0.9


async def test_spans_nest_whatever_becomes_of_a_request(
    handles: dict[str, LocalHandle], collected: Collector
) -> None:
    """Joined with others, split into several calls, repeated: they leave hardly any of its time out."""
    handle = handles["patient"]
    async with client_of(make_serving(handles)) as client:

        async def ask(*texts: str) -> None:
            body = {"model": "patient", "input": texts}
            assert (await client.post("/embeddings", json=body)).is_success

        await ask("x")  # brings the engine up
        await asyncio.gather(*(ask(f"text {number}") for number in range(6)))
        await ask(*(f"{number:100}" for number in range(100)))
        handle.failures.append(EngineCrashError("gone"))
        await ask("once more")
    await asyncio.to_thread(tracing.flush)
    traces = sorted(collected.traces().values(), key=lambda spans: spans[0].times)[1:]
    *joined, split, repeated = [check(spans) for spans in traces]
    sharing = Counter(each.attributes["embedding.call.id"] for calls in joined for each in calls)
    assert max(sharing.values()) > 1
    for (call,) in joined:
        assert call.attributes["embedding.call.requests"] == sharing[call.attributes["embedding.call.id"]]
    assert len(split) > 1
    assert sum(each.attributes["embedding.call.inputs"] for each in split) == 100
    tries = [(each.attributes["embedding.call.attempt"], each.status) for each in repeated]
    assert tries == [(1, ERROR), (2, 0)]
    assert repeated[0].attributes["error.type"] == EngineCrashError.__name__


async def test_what_has_ended_is_sent_as_the_application_ends(
    handles: dict[str, LocalHandle], collected: Collector
) -> None:
    """Whatever the exporter's own rhythm."""
    serving = make_serving(handles)

    async def gather() -> list[bytes]:
        return []

    app = make_app(serving, gather)
    async with app.router.lifespan_context(app), client_of(serving) as client:
        await client.post("/embeddings", json={"model": "a", "input": "x"})
        assert not collected.traces()
    assert len(collected.traces()) == 1


async def test_a_text_that_somebody_waits_for_is_ones_own_call_too(
    handles: dict[str, LocalHandle], collected: Collector
) -> None:
    """From when one came: the call was under way by then."""
    serving = make_serving(handles)
    waiting = serving.catalog.find("patient").dispatch._inputs
    body = {"model": "patient", "input": "x"}
    async with client_of(serving) as client:
        await client.post("/embeddings", json=body)  # brings the engine up
        first = asyncio.create_task(client.post("/embeddings", json=body))
        while not any(each.part for each in waiting.values()):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)
        await asyncio.gather(first, client.post("/embeddings", json=body))
    await asyncio.to_thread(tracing.flush)
    traces = sorted(collected.traces().values(), key=lambda spans: spans[0].times)[1:]
    calls = [each for spans in traces for each in spans if each.name == "call"]
    assert len({each.attributes["embedding.call.id"] for each in calls}) == 1
    assert calls[0].times[0] < calls[1].times[0] == traces[1][0].times[0]
    for spans in traces:
        (call,), (engine,) = ([each for each in spans if each.name == name] for name in ("call", "engine"))
        assert call.times[0] <= engine.times[0] <= engine.times[1] <= call.times[1]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=["nothing is set", "disabled", "no exporter"],
)
async def test_off_nothing_is_made(
    handles: dict[str, LocalHandle], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """No trace, no exporter, no thread."""
    threads = set(threading.enumerate())
    for name, value in (ON | variables if variables else {}).items():
        monkeypatch.setenv(name, value)
    forget()
    traced = []
    monkeypatch.setattr(tracing, "Trace", lambda *_: traced.append(_))
    async with application(handles) as client:
        assert (await client.post("/embeddings", json={"model": "a", "input": "x"})).is_success
    assert tracer() is None
    assert not traced
    assert not [each for each in threading.enumerate() if each not in threads and "Otel" in each.name]
    forget()


OFF = """
import sys
import deployments.batches.deployment, deployments.http.ingress, deployments.bulk.connections
from deployments.tracing import tracer
assert tracer() is None
print([name for name in sys.modules if name.startswith("opentelemetry.exporter.otlp")])
"""
ALONE = """
import sys
import deployments.logs
from deployments.tracing import tracer
tracer()
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from deployments.tracing import objection, tracer
assert tracer() is None
print(objection())
"""


def run(code: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environ | variables, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("code", [OFF, ALONE], ids=["as the ingress has it", "by itself"])
def test_off_nothing_is_imported(code: str) -> None:
    """The ingress has what Ray Serve imports of OpenTelemetry, and nothing that sends."""
    assert run(code, {}).stdout == "[]\n"


def test_without_the_extra_one_line_says_what_to_install() -> None:
    """In the log of each process that would make traces; `serve` prints it too."""
    what = "no traces: OTEL_EXPORTER_OTLP_ENDPOINT is set, and embedding-cluster[traces] isn't installed\n"
    found = run(WITHOUT, ON)
    assert (found.stdout, found.stderr) == (what, what)


def test_serve_says_why_there_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything else."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        "no traces: OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf or grpc, and is http/json\n"
        f"127.0.0.1:{port}: Address already in use\n"
    )


def test_a_wrong_variable_stops_no_request() -> None:
    """What the SDK says of it is told."""
    found = run(
        "from deployments.tracing import tracer; print(tracer())", ON | {"OTEL_PROPAGATORS": "none of ours"}
    )
    assert found.stdout == "None\n"
    what = "no traces: Propagator none of ours not found. It is either misspelled or not installed.\n"
    assert found.stderr == what


def test_a_protocol_that_there_isnt_is_told() -> None:
    """With those that there are."""
    wrong = ON | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}
    what = "no traces: OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf or grpc, and is http/json"
    assert objection(wrong) == what
    assert not objection(wrong | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"})


@pytest.mark.parametrize(
    ("windows", "busy", "found"),
    [
        ([], [(0, 1)], []),
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(2, 4), (3, 5), (9, 12)], [(0, 2), (5, 9)]),
        ([(0, 10)], [(-5, -1), (0, 10)], []),
        ([(0, 10), (2, 4), (8, 12)], [(3, 9)], [(0, 3), (9, 10), (10, 12)]),
        ([(0, 1), (5, 6)], [(20, 30)], [(0, 1), (5, 6)]),
    ],
)
def test_what_nothing_covers(windows: list[Times], busy: list[Times], found: list[Times]) -> None:
    """Of windows that may overlap, in order."""
    assert list(gaps(windows, busy)) == found
