"""An OpenTelemetry collector of the tests' own: takes spans over OTLP, by HTTP and by gRPC."""

import gzip
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from deployments.metrics import STAGES

Times = tuple[int, int]
# The spans below a request's own.
BELOW = {*STAGES, "read"}
INTERNAL, SERVER, CLIENT = Message.SPAN_KIND_INTERNAL, Message.SPAN_KIND_SERVER, Message.SPAN_KIND_CLIENT
ERROR = Status.STATUS_CODE_ERROR


@dataclass(frozen=True)
class Span:
    """A span as it came; times in nanoseconds of the epoch, ids in hexadecimal digits."""

    trace: str
    id: str
    parent: str
    name: str
    kind: int
    status: int
    times: Times
    state: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector(TraceServiceServicer):
    """Keeps what comes, each with the protocol that it came by."""

    def __init__(self) -> None:
        """Have nothing yet."""
        self.spans: list[Span] = []
        self.raw = b""
        self.protocols: set[str] = set()
        self.http_url = self.grpc_url = ""

    def take(self, request: ExportTraceServiceRequest, protocol: str) -> None:
        """Keep a request's spans."""
        self.protocols.add(protocol)
        self.raw += request.SerializeToString()
        for resource in request.resource_spans:
            of = _plain(resource.resource.attributes)
            self.spans += [_span(each, of) for scope in resource.scope_spans for each in scope.spans]

    def Export(self, request: ExportTraceServiceRequest, _: Any) -> ExportTraceServiceResponse:  # noqa: N802
        """Take a request by gRPC."""
        self.take(request, "grpc")
        return ExportTraceServiceResponse()

    def traces(self) -> dict[str, list[Span]]:
        """Return the spans of each trace that is whole, the request's own first: it comes last."""
        found: dict[str, list[Span]] = defaultdict(list)
        for span in list(self.spans):
            found[span.trace].append(span)
        for spans in found.values():
            spans.sort(key=lambda each: (each.name in BELOW, each.times))
        return {trace: spans for trace, spans in found.items() if spans[0].name not in BELOW}


@contextmanager
def collector() -> Iterator[Collector]:
    """Listen on two ports of the loopback interface until the block ends."""
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            found.take(ExportTraceServiceRequest.FromString(body), f"http{self.path}")
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(found, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    found.http_url, found.grpc_url = f"http://127.0.0.1:{http.server_port}", f"http://127.0.0.1:{port}"
    try:
        yield found
    finally:
        server.stop(None).wait()
        http.shutdown()
        http.server_close()


def covered(times: Iterable[Times], within: Times) -> float:
    """Return the share of a time that the union of others covers."""
    at, sum_of = within[0], 0
    for begun, ended in sorted(times):
        first, last = max(begun, at), min(ended, within[1])
        if last > first:
            sum_of += last - first
            at = last
    return sum_of / (within[1] - within[0])


def check(spans: list[Span]) -> list[Span]:
    """Hold that a request's spans nest and leave hardly any of its time out; return its calls."""
    root, *others = spans
    by_id = {each.id: each for each in spans}
    for each in others:
        parent = by_id[each.parent]
        assert parent.times[0] <= each.times[0] <= each.times[1] <= parent.times[1], (parent, each)
        assert (each.kind == CLIENT) == (each.name == "call")
    assert covered([each.times for each in others], root.times) >= 0.95, spans
    calls = [each for each in others if each.name == "call"]
    assert {each.parent for each in calls} == {root.id}
    # The engine's time lies in the call that was answered.
    answered = sorted(each.id for each in calls if each.status != ERROR)
    assert sorted(each.parent for each in others if each.name == "engine") == answered
    return calls


def _span(message: Message, resource: dict[str, Any]) -> Span:
    return Span(
        message.trace_id.hex(),
        message.span_id.hex(),
        message.parent_span_id.hex(),
        message.name,
        message.kind,
        message.status.code,
        (message.start_time_unix_nano, message.end_time_unix_nano),
        message.trace_state,
        _plain(message.attributes),
        resource,
    )


def _plain(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    """Return attributes as plain data."""
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in attributes}
