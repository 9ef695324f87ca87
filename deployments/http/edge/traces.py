"""What a trace says of a request: by OpenTelemetry's names where it has some."""

import time

from ray.serve.context import _get_serve_request_context
from starlette.requests import Request

from deployments.dispatch.catalog import Served
from deployments.engine.batch import TokenBatch
from deployments.keys.file import Key
from deployments.tracing import PARSE, WAIT, Attributes, Trace, current


def begin_trace(request: Request, key: Key | None) -> Trace:
    """Begin the trace of a request, and make it that of this task."""
    route = getattr(request.scope.get("route"), "path", "")  # a path may hold what the client made up
    attributes: Attributes = {
        "http.request.method": request.method,
        "http.route": route,
        "url.scheme": request.url.scheme,
        "network.protocol.version": request.scope["http_version"],
        "embedding.request.id": _get_serve_request_context().request_id,
    }
    if key is not None:
        attributes["embedding.key"] = key.name
    trace = Trace(f"{request.method} {route}", attributes, request.scope)
    current.set(trace)
    return trace


def describe_inputs(trace: Trace, served: Served, batch: TokenBatch) -> None:
    """Say in a trace for which model its request is, and how large."""
    worker = served.dispatch.worker
    trace.describe(
        {
            "gen_ai.operation.name": "embeddings",
            "gen_ai.request.model": served.name,
            "gen_ai.usage.input_tokens": batch.tokens,
            "embedding.inputs": len(batch),
            "embedding.worker": worker.name,
            # The name that tracing backends draw their maps of services by.
            "peer.service": worker.queue.service_name,
            "embedding.worker.role": worker.queue.service_role,
        }
    )


def end_trace(trace: Trace, model: str, error: str, status: int) -> None:
    """End the trace of a request: what came before it was parsed was its reading."""
    current.set(None)
    trace.describe({"gen_ai.request.model": model})
    now = time.perf_counter()
    parsed = next((times for name, *times in trace.stages if name == PARSE), [now, now])
    trace.note("read", trace.begun, parsed[0])
    trace.note(WAIT, parsed[1], now)
    trace.end(error, status)
