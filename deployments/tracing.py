"""Traces: a span for each request, and below it one for each of its stages and calls to replicas.

OpenTelemetry's own variables say where to and how. A request notes times while it runs, on
`time.perf_counter`, and becomes spans as it ends. None holds a text, a key or a vector. Where no variable
names an endpoint nothing is noted, and nothing of OpenTelemetry is imported from here.
"""

import asyncio
import contextlib
import functools
import importlib
import importlib.util
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deployments.errors import EmbeddingError, first_line
from deployments.metrics import CANCELLED

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

logger = logging.getLogger("ray.serve")

SERVICE = "embedding-cluster"
# OpenTelemetry's names: any of the first turns traces on, the first of the second that is set counts.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
DEFAULT_PROTOCOL = "http/protobuf"  # as the specification has it
EXPORTERS = {
    DEFAULT_PROTOCOL: "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}
# The names of spans, as those of the stages of `metrics`.
PARSE, WAIT, CALL, ENGINE = "parse", "wait", "call", "engine"
# Our loop's own turn from one thing to the next isn't a wait.
SHORT_SECONDS = 0.0001

Times = tuple[float, float]  # when something began and ended
Attributes = dict[str, str | int]


# --- whether, and where to ------------------------------------------------------------------------------


def objection(environ: Mapping[str, str] = os.environ) -> str:
    """Return why traces that are asked for can't be made, in one line; empty where nothing is wrong."""
    endpoint = next((name for name in ENDPOINTS if environ.get(name)), None)
    if endpoint is None or not _is_wanted(environ):
        return ""
    if (protocol := _protocol(environ)) not in EXPORTERS:
        return f"no traces: {PROTOCOLS[1]} must be {' or '.join(EXPORTERS)}, and is {protocol}"
    try:
        found = importlib.util.find_spec(EXPORTERS[protocol])
    except ModuleNotFoundError:
        found = None
    if found is None:
        return f"no traces: {endpoint} is set, and embedding-cluster[traces] isn't installed"
    return ""


def _is_wanted(environ: Mapping[str, str]) -> bool:
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not disabled and "otlp" in environ.get("OTEL_TRACES_EXPORTER", "otlp")


def _protocol(environ: Mapping[str, str]) -> str:
    return next((environ[name] for name in PROTOCOLS if environ.get(name)), DEFAULT_PROTOCOL)


@functools.cache
def _provider() -> "TracerProvider | None":
    """Return what sends this process's spans; None where the environment asks for none, or wrongly."""
    if not any(map(os.environ.get, ENDPOINTS)) or not _is_wanted(os.environ):
        return None
    if reason := objection():
        logger.warning(reason)
        return None
    try:
        return _made_provider()
    except Exception as error:  # whatever a variable holds, requests are worth more than their traces
        logger.warning("no traces: %s", first_line(error))
        return None


def _made_provider() -> "TracerProvider":
    """Return what sends spans, as OpenTelemetry's variables say."""
    from opentelemetry import propagate  # noqa: F401 - reads which headers there are as it is imported
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = importlib.import_module(EXPORTERS[_protocol(os.environ)]).OTLPSpanExporter()
    # What the variables say of it goes before what we say.
    resource = Resource.create({SERVICE_NAME: SERVICE}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


@functools.cache
def tracer() -> "Tracer | None":
    """Return what makes this process's spans; None where there are to be none."""
    provider = _provider()
    return None if provider is None else provider.get_tracer(SERVICE)


def flush() -> None:
    """Send the spans of what has ended; blocks as long as the exporter tries."""
    if (provider := _provider()) is not None:
        provider.force_flush()


# --- what a request notes -------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Call:
    """A call to a replica, shared by the traces of all requests that wait for it.

    `engine_seconds` is what the replica's engine took of it, `error` the class of that which it failed with.
    """

    attributes: Attributes
    begun: float
    ended: float = math.inf
    engine_seconds: float = 0.0
    error: str = ""

    @classmethod
    def begin(cls, numbers: Mapping[str, int]) -> "Call":
        """Return one that begins now, with an id by which its spans in several traces know each other."""
        named: Attributes = {f"embedding.call.{name}": number for name, number in numbers.items()}
        own = random.getrandbits(64)
        return cls(named | {"embedding.call.id": f"{own:016x}"}, time.perf_counter())


class Trace:
    """One request's span, and what will be spans below it."""

    def __init__(self, name: str, attributes: Attributes, scope: Mapping[str, Any] | None = None) -> None:
        """Begin a span; of an HTTP request, by its ASGI `scope`, as part of the caller's trace."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind

        made = tracer()
        assert made is not None
        self._tracer = made
        kind, context = SpanKind.INTERNAL, None
        if scope is not None:
            kind = SpanKind.SERVER
            headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
            context = propagate.extract(headers)
        self.begun = time.perf_counter()
        self._offset = time.time_ns() - int(1e9 * self.begun)
        self._span: Span = made.start_span(name, context, kind, attributes, start_time=self._ns(self.begun))
        self.calls: dict[Call, None] = {}
        self.stages: list[tuple[str, float, float]] = []
        self.ids: dict[str, str] = {}  # as logs have them
        if (own := self._span.get_span_context()).is_valid:
            self.ids = {"trace_id": f"{own.trace_id:032x}", "span_id": f"{own.span_id:016x}"}

    def describe(self, attributes: Attributes) -> None:
        """Say more of the request."""
        self._span.set_attributes(attributes)

    def note(self, stage: str, begun: float, ended: float) -> None:
        """Remember a stage. One of WAIT is of the time in it in which nothing else is under way."""
        self.stages.append((stage, begun, ended))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note the block as a stage, however it ends."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.note(name, begun, time.perf_counter())

    def end(self, error: str = "", status: int = 0) -> None:
        """Make spans of all that was noted. `error` is a code of `errors`, `status` HTTP's."""
        from opentelemetry.trace import StatusCode

        ended = time.perf_counter()
        if self._span.is_recording():
            self._make_spans(ended)
        if status:
            self._span.set_attribute("http.response.status_code", status)
        if error:
            self._span.set_attribute("error.type", error)
        if error and not 0 < status < 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end(self._ns(ended))

    def _make_spans(self, ended: float) -> None:
        """Make the spans below the request's, none of them beyond its own time."""
        from opentelemetry.trace import set_span_in_context

        own = set_span_in_context(self._span)
        busy: list[Times] = []
        for name, begun, end in self.stages:
            if name != WAIT:
                self._make_span(name, (begun, end), own)
                busy.append((begun, end))
        for call in self.calls:
            # One that waits for a text under way already has a share of that call, since it came itself.
            times = max(call.begun, self.begun), min(call.ended, ended)
            busy.append(times)
            span = self._make_span(CALL, times, own, call)
            if call.engine_seconds:
                # The replica's clock may be another one. As long on the way back as on the way there.
                way = max((call.ended - call.begun - call.engine_seconds) / 2, 0.0)
                begun, end = max(call.begun + way, times[0]), min(call.ended - way, times[1])
                self._make_span(ENGINE, (begun, max(begun, end)), set_span_in_context(span))
        waits = [(begun, end) for name, begun, end in self.stages if name == WAIT]
        for begun, end in gaps(waits, busy):
            if end - begun >= SHORT_SECONDS:
                self._make_span(WAIT, (begun, end), own)

    def _make_span(self, name: str, times: Times, parent: "Context", call: Call | None = None) -> "Span":
        """Make the span of something that has ended; of a `call`, with what is known of it."""
        from opentelemetry.trace import SpanKind, StatusCode

        begun, ended = map(self._ns, times)
        kind = SpanKind.INTERNAL if call is None else SpanKind.CLIENT
        attributes = None if call is None else call.attributes
        span = self._tracer.start_span(name, parent, kind, attributes, start_time=begun)
        if call is not None and call.error:
            span.set_attribute("error.type", call.error)
            span.set_status(StatusCode.ERROR)
        span.end(ended)
        return span

    def _ns(self, seconds: float) -> int:
        """Return a time of `perf_counter` as nanoseconds of the epoch."""
        return self._offset + int(1e9 * seconds)


def gaps(windows: list[Times], busy: list[Times]) -> Iterator[Times]:
    """Yield what of the windows no other time covers, in order."""
    done = -math.inf
    for begun, ended in sorted(windows):
        at = max(begun, done)
        for first, last in sorted(busy):
            if first >= ended:
                break
            if first > at:
                yield at, first
            at = max(at, last)
        if at < ended:
            yield at, ended
        done = max(done, ended)


# --- the request that this task is for ------------------------------------------------------------------

current: ContextVar[Trace | None] = ContextVar("current", default=None)
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def stage(name: str) -> AbstractContextManager[None]:
    """Note the block as a stage of this task's request, where that is traced."""
    trace = current.get()
    return _NOTHING if trace is None else trace.stage(name)


def describe(attributes: Attributes) -> None:
    """Say more of this task's request, where it is traced."""
    if (trace := current.get()) is not None:
        trace.describe(attributes)


def traced(name: str, attributes: Attributes) -> AbstractContextManager[None]:
    """Make a trace of the block, which is no HTTP request's, or a part of that which the caller is in."""
    return _NOTHING if tracer() is None else _traced(name, attributes)


@contextlib.contextmanager
def _traced(name: str, attributes: Attributes) -> Iterator[None]:
    trace, error = Trace(name, attributes), EmbeddingError.code
    before = current.set(trace)
    try:
        yield
        error = ""
    except EmbeddingError as raised:
        error = raised.code
        raise
    except asyncio.CancelledError:
        error = CANCELLED
        raise
    finally:
        current.reset(before)
        trace.end(error)
