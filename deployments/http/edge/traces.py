"""What a trace says of a request: by OpenTelemetry's names where it has some."""

from ray.serve.context import _get_serve_request_context
from starlette.requests import Request

from deployments.dispatch.catalog import Served
from deployments.engine.batch import TokenBatch
from deployments.keys.file import Key
from deployments.tracing import Attributes, Trace, current, tracer


def begin_trace(request: Request, key: Key | None) -> Trace | None:
    """Begin the trace of a request, and make it that of this task; None where there are to be none."""
    if tracer() is None:
        return None
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


def describe_inputs(served: Served, batch: TokenBatch) -> None:
    """Say in the trace of this task's request, where it has one, for which model it is, and how large."""
    if (trace := current.get()) is not None:
        trace.describe(
            {
                "gen_ai.operation.name": "embeddings",
                "gen_ai.request.model": served.name,
                "gen_ai.usage.input_tokens": batch.tokens,
                "embedding.inputs": len(batch),
                "embedding.worker": served.dispatch.worker.name,
            }
        )
