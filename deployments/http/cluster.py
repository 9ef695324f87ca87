"""What is asked of the cluster itself: its models, its health, its metrics."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse

from deployments.dispatch.offload import offload
from deployments.errors import (
    IncompleteError,
    InvalidKeyError,
    ModelNotAllowedError,
    ModelNotFoundError,
    OperatorOnlyError,
)
from deployments.http.auth import key_of
from deployments.http.errors import as_json, json_response
from deployments.http.metrics_port import MetricsPort
from deployments.http.serving import Serving
from deployments.http.table import Audience, Entry, answers, plain
from deployments.metrics import CONTENT_TYPE, merge
from deployments.status.look import Counted, GatherCounts, Lookout

# The version of the inference API that we speak; clients ask for major 1, 1.19.0 or later.
API_VERSION = "1.19.0"
MODEL = {
    "id": "all-minilm-l6-v2",
    "object": "model",
    "created": 0,
    "owned_by": "all-minilm-l6-v2",
    "engine": "vllm",
    "version": 1,
    "description": "English sentences and short paragraphs",
    "maximum_completion_tokens": None,
    "max_model_len": 256,
    "embedding_task": {"supported": True},
}
SAMPLE = 'embedding_tokens_total{worker="all-minilm-l6-v2"} 7.0'
MODEL_ERRORS = (InvalidKeyError, ModelNotAllowedError, ModelNotFoundError)
READY = {"ready": False, "models": [{"ready": False, "reason": "no replica answers", "deployment": "a"}]}
STATUS = {
    "object": "status",
    "created": 1790000000,
    "ready": True,
    "problems": [],
    "seconds": 900,
    "slot_seconds": 10,
    "models": [
        {
            "deployment": "all-minilm-l6-v2",
            "models": ["all-minilm-l6-v2"],
            "engine": "vllm",
            "version": 1,
            "ready": True,
            "replicas": {"running": 1},
            "tokens_per_second": 812.4,
            "capacity_tokens_per_second": 5210,
            "outstanding_tokens": 64,
            "queued_tokens": 0,
            "p50_seconds": 0.011,
            "p99_seconds": 0.048,
            "requests": 5210,
            "cancelled": 0,
            "errors": {"context_length_exceeded": 2},
            "batch_lines": 0,
            "batch_errors": {},
            "inputs": 9120,
            "tokens": 121007,
            "cache_hits": 0,
            "cold_starts": 0,
            "series": {"requests": [58, 61], "p99_seconds": [None, 0.048]},
        }
    ],
    "ingress_replicas": 1,
    "errors": {"invalid_api_key": 1},
}
# Returns the metrics of every ingress replica, as text.
Gather = Callable[[], Awaitable[list[bytes]]]


class Cluster:
    """Answers for all of the cluster."""

    def __init__(
        self,
        serving: Serving,
        gather: Gather,
        ports: Mapping[str, MetricsPort],
        gather_counts: GatherCounts | None = None,
    ) -> None:
        """Share the catalog of `serving`; `ports` are the workers' own metrics ports.

        Without `gather_counts` this process is the only one.
        """
        self._lookout = Lookout(gather_counts or self._own_counts, self._states)
        self._serving = serving
        self._gather = gather
        self._ports = ports

    async def models(self, request: Request) -> Response:
        """List the models."""
        listed = [each.listing() for each in self._serving.visible(request)]
        return as_json({"object": "list", "data": listed})

    async def model(self, request: Request, name: str) -> Response:
        """Show one model; without a name, as `/models/` has none, all of them."""
        if not (plain := name.rstrip("/")):
            return await self.models(request)
        return as_json(self._serving.find(request, plain).listing())

    async def ping(self, request: Request) -> Response:
        """Say the same to SageMaker, which wants nothing but the status."""
        return Response()

    async def health(self, request: Request) -> Response:
        """Say that this process is alive."""
        return as_json({"status": "ok"})

    async def _states(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each worker, by name: whether a replica answers, and what isn't well."""
        states = await asyncio.gather(*(d.state() for d in self._serving.catalog.dispatches.values()))
        for state in states:
            port = self._ports.get(state["deployment"])
            if port is not None and port.problem:
                state["metrics"] = port.problem
        return {state["deployment"]: state for state in states}

    async def ready(self, request: Request) -> Response:
        """Say for each worker whether a replica answers; 200 when all do, else 503.

        Where there are keys, whoever has none is told no more than that.
        """
        states = list((await self._states()).values())
        everything = all(state["ready"] for state in states)
        known = self._serving.rates is None or key_of(request.scope) is not None
        body = {"ready": everything, "models": states} if known else {"ready": everything}
        return as_json(body, 200 if everything else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics of the whole cluster's ingress."""
        texts = await self._gather()
        return Response(await offload(sum(map(len, texts)), merge, texts), media_type=CONTENT_TYPE)

    async def status(self, request: Request) -> Response:
        """Show each model's last minutes, over all ingress replicas, and what isn't well with what to do."""
        key = key_of(request.scope)
        everything = key is None or key.operator
        return json_response(await self._lookout.tell(self._serving.visible(request), everything))

    async def _own_counts(self) -> Counted:
        return Counted([self._serving.history.minutes()], [], {})

    async def version(self, request: Request) -> Response:
        """Give the version of the API as plain text."""
        return Response(API_VERSION, media_type="text/plain")


def cluster_routes(cluster: Cluster) -> Iterator[Entry]:
    """Yield what is asked of all of it."""
    listed = answers({"object": "list", "data": [MODEL]}, InvalidKeyError)
    yield Entry(path="/models", handler=cluster.models, responses=listed)
    yield Entry(path="/models/{name:path}", handler=cluster.model, responses=answers(MODEL, *MODEL_ERRORS))
    anybody = Audience.ANYBODY
    alive = answers({"status": "ok"})
    yield Entry(path="/health", handler=cluster.health, access=anybody, responses=alive)
    for method in ("GET", "POST"):
        yield Entry(path="/ping", handler=cluster.ping, method=method, access=anybody, shown=False)
    not_ready = {**answers(READY)[200], "description": "Not every model is ready"}
    ready = {**answers(READY | {"ready": True}), 503: not_ready}
    yield Entry(path="/ready", handler=cluster.ready, access=anybody, responses=ready)
    yield Entry(
        path="/version",
        handler=cluster.version,
        access=anybody,
        responses=plain(API_VERSION),
        response_class=PlainTextResponse,
    )
    seen = answers(STATUS, InvalidKeyError, IncompleteError)
    yield Entry(path="/status", handler=cluster.status, responses=seen)
    yield Entry(
        path="/metrics",
        handler=cluster.metrics,
        access=Audience.OPERATORS,
        responses=answers(None, InvalidKeyError, OperatorOnlyError, IncompleteError) | plain(SAMPLE),
        response_class=PlainTextResponse,
    )
