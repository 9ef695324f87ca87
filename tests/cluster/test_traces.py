"""Traces of a real server, at a collector of the tests': joined, split, repeated, of a batch, of a job."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from ray.exceptions import ActorDiedError

from deployments.errors import EngineCrashError
from deployments.keys.file import Key, create_key
from tests.harness import workers
from tests.harness.collector import BELOW, ERROR, INTERNAL, SERVER, Collector, Span, check, collector
from tests.harness.jobs import address_of, environ
from tests.harness.server import Server, serve, wait_for

pytestmark = pytest.mark.cluster
PRIVATE = "a private text"  # no span may hold it, nor the key
SECONDS = 60
# Long enough that what lies between two stages is nothing beside it.
MODEL = "call_seconds = 0.4, token_seconds = 0.0005"
JOB = f"""
from opentelemetry import context, trace
from deployments.client import EmbeddingClient
client = EmbeddingClient("m")
caller = trace.SpanContext(0xC0DE, 0xCA11, is_remote=False, trace_flags=trace.TraceFlags(1))
context.attach(trace.set_span_in_context(trace.NonRecordingSpan(caller)))
client.embed(["{PRIVATE}", "another"])
"""


@dataclass
class Site:
    """A server, what it sends spans to, a key, and where its engines say what they compute."""

    server: Server
    collector: Collector
    key: str
    calls: Path
    asked: int = 0

    def ask(self, *texts: str, caller: str = "", sampled: bool = True, status: int = 200) -> str:
        """Send a request as a part of a trace of that id, and return the id."""
        self.asked += 1
        caller = caller or f"{self.asked:032x}"
        headers = {
            "authorization": f"Bearer {self.key}",
            "traceparent": f"00-{caller}-00000000000000ff-0{int(sampled)}",
            "tracestate": "vendor=value",
        }
        body = {"model": "m", "input": list(texts)}
        answer = httpx.post(f"{self.server.url}/v1/embeddings", json=body, headers=headers, timeout=120)
        assert answer.status_code == status, answer.text
        return caller

    def trace(self, name: str) -> list[Span]:
        """Return a trace's spans, the root first, once they have come."""
        wait_for(
            lambda: name in self.collector.traces(), SECONDS, lambda: str(self.collector.traces().keys())
        )
        return self.collector.traces()[name]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One fake model with two replicas, keys on."""
    folder = tmp_path_factory.mktemp("traces")
    calls = folder / "calls"
    calls.mkdir()
    (folder / "workers").mkdir()
    arguments = f'{MODEL}, calls_folder = "{calls}"'
    more = "[deployment]\nnum_replicas = 2"
    (folder / "workers" / "m.toml").write_text(workers.fake("m", arguments, more))
    file = folder / "keys.json"
    key = create_key(file, lambda sha256: Key(name="team", sha256=sha256, created=datetime.now(UTC)))
    with collector() as found:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": found.http_url,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with serve(folder / "workers", folder, variables, keys=file) as server:
            yield Site(server, found, key, calls)


def inputs(calls: Iterable[Span]) -> int:
    """Return how many inputs some calls have together."""
    return sum(each.attributes["embedding.call.inputs"] for each in calls)


def test_a_request_is_a_trace(where: Site) -> None:
    """The caller's, with what OpenTelemetry has names for; one that isn't to be sampled leaves nothing."""
    where.ask(PRIVATE, caller="a" * 32, sampled=False)
    where.ask(PRIVATE, caller="b" * 32)
    where.ask("x" * 1000, caller="c" * 32, status=400)
    root, *others = spans = where.trace("b" * 32)
    (call,) = check(spans)
    assert (root.name, root.kind, root.parent) == ("POST /v1/embeddings", SERVER, "00000000000000ff")
    assert root.state == call.state == "vendor=value"
    assert root.resource["service.name"] == "embedding-cluster"
    assert root.resource["deployment.environment.name"] == "test"
    assert root.attributes.pop("embedding.request.id")
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "gen_ai.operation.name": "embeddings",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": len(PRIVATE),
        "embedding.inputs": 1,
        "embedding.worker": "m",
        "embedding.worker.role": "Worker",
        "peer.service": "worker",
        "embedding.key": "team",
    }
    assert call.attributes.pop("embedding.call.id")
    sizes = {"inputs": 1, "tokens": len(PRIVATE), "requests": 1, "attempt": 1}
    assert call.attributes == {f"embedding.call.{name}": number for name, number in sizes.items()}
    assert Counter(each.name for each in others if each.name != "wait") == Counter(
        ["read", "parse", "tokenise", "call", "engine", "encode"]
    )
    refused = where.trace("c" * 32)[0].attributes
    said = refused["gen_ai.request.model"], refused["error.type"], refused["http.response.status_code"]
    assert said == ("m", "context_length_exceeded", 400)
    assert "a" * 32 not in where.collector.traces()
    assert where.collector.protocols == {"http/v1/traces"}


def test_joined_requests_share_a_call(where: Site) -> None:
    """Each has its share of it as a span of its own."""
    with ThreadPoolExecutor(16) as pool:
        names = list(pool.map(lambda number: where.ask(f"{PRIVATE} {number}"), range(16)))
    shared: dict[str, list[Span]] = {}
    for name in names:
        (call,) = check(where.trace(name))
        shared.setdefault(call.attributes["embedding.call.id"], []).append(call)
    assert max(map(len, shared.values())) > 1
    for calls in shared.values():
        assert {each.attributes["embedding.call.requests"] for each in calls} == {len(calls)}


def test_a_split_request_has_many_calls(where: Site) -> None:
    """All in the one trace."""
    calls = check(where.trace(where.ask(*(f"{number:100}" for number in range(100)))))
    assert len(calls) >= 4
    assert sum(each.attributes["embedding.call.tokens"] for each in calls) == 100 * 100
    assert len({each.attributes["embedding.call.id"] for each in calls}) == len(calls)


def test_a_repeated_call_is_a_call_each_time(where: Site) -> None:
    """The first one with what became of it."""
    before = {each.name: each.read_text() for each in where.calls.iterdir()}

    def busy() -> list[int]:
        return [int(file.name) for file in where.calls.iterdir() if file.read_text() != before.get(file.name)]

    with ThreadPoolExecutor(2) as pool:
        texts = [[f"{request} {number:398}" for number in range(10)] for request in range(2)]
        asking = [pool.submit(where.ask, *each) for each in texts]
        wait_for(lambda: len(busy()) == 2, SECONDS, "both replicas have a call")
        psutil.Process(busy()[0]).kill()
        traces = [check(where.trace(each.result())) for each in asking]
    # A call of both requests is in both traces.
    calls = {each.attributes["embedding.call.id"]: each for calls in traces for each in calls}.values()
    failed = [each for each in calls if each.status == ERROR]
    again = [each for each in calls if each.attributes["embedding.call.attempt"] == 2]
    assert {each.attributes["error.type"] for each in failed} <= {
        EngineCrashError.__name__,
        ActorDiedError.__name__,
    }
    assert {each.attributes["embedding.call.attempt"] for each in failed} == {1}
    assert {each.status for each in again} == {0}
    assert inputs(again) == inputs(failed)
    assert inputs(calls) == 20 + inputs(failed)


def test_a_line_of_a_batch_is_a_trace(where: Site) -> None:
    """Of its own, that names the batch."""
    client = openai.OpenAI(base_url=f"{where.server.url}/v1", api_key=where.key, max_retries=5)

    def line(number: int) -> dict[str, Any]:
        body = {"model": "m", "input": f"{PRIVATE} of line {number}"}
        return {"custom_id": f"{PRIVATE} {number}", "method": "POST", "url": "/v1/embeddings", "body": body}

    content = "\n".join(json.dumps(line(number)) for number in range(3))
    file = client.files.create(file=("requests.jsonl", content.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")

    def lines() -> list[list[Span]]:
        traces = where.collector.traces().values()
        return [each for each in traces if each[0].attributes.get("embedding.batch.id") == batch.id]

    wait_for(lambda: len(lines()) == 3, SECONDS, lambda: str(client.batches.retrieve(batch.id)))
    for spans in lines():
        assert len(check(spans)) == 1
        root = spans[0]
        assert (root.name, root.kind, root.parent) == ("batch line", INTERNAL, "")
        assert root.attributes["embedding.key"] == "team"
        assert root.attributes["gen_ai.request.model"] == "m"
        assert root.attributes["gen_ai.usage.input_tokens"] == len(f"{PRIVATE} of line 0")


def test_a_client_continues_the_trace_that_it_is_in(where: Site) -> None:
    """Over the other protocol."""
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": where.collector.grpc_url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_SERVICE_NAME": "job",
    }
    command = [sys.executable, "-c", JOB]
    subprocess.run(command, env={**environ(address_of(where.server)), **variables}, check=True, timeout=600)
    root, *_ = spans = where.trace(f"{0xC0DE:032x}")
    check(spans)
    assert (root.name, root.kind, root.parent) == ("embed", INTERNAL, f"{0xCA11:016x}")
    assert root.attributes == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": len(PRIVATE) + len("another"),
        "embedding.inputs": 2,
    }
    assert root.resource["service.name"] == "job"
    assert "grpc" in where.collector.protocols


def test_no_span_holds_what_was_sent(where: Site) -> None:
    """Nor the key; and there is one trace for each request, no more."""
    traces = where.collector.traces()
    served = [spans for spans in traces.values() if spans[0].kind == SERVER]
    assert len(served) == where.asked - 1  # the one that wasn't to be sampled
    for _, *others in traces.values():
        assert all(each.name in BELOW for each in others)
    assert PRIVATE.encode() not in where.collector.raw
    assert where.key.encode() not in where.collector.raw
