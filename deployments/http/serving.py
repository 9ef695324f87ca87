"""A request in named steps: read, parse, find, prepare, dispatch, answer. Counts how each one ends."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self, TypeVar

from starlette.requests import ClientDisconnect, Request

from deployments.api.encoding import normalize, truncate
from deployments.api.fields import Body, Fields, count_values, read_object
from deployments.api.request import EmbeddingRequest, EmbeddingResult, TokensRequest
from deployments.dispatch.catalog import Catalog, Served
from deployments.dispatch.offload import offload
from deployments.dispatch.prepare import Prepared, prepare
from deployments.dispatch.work import Lane
from deployments.engine import ModelCard
from deployments.engine.tokenizer import TextTokenizer
from deployments.errors import (
    DeadlineExceededError,
    EmbeddingError,
    InvalidRequestError,
    TooManyInputsError,
)
from deployments.http.auth import key_of
from deployments.http.edge.bodies import (
    BODY_SECONDS,
    Buffer,
    BytesInHand,
    Take,
    body_chunks,
    declared_length,
)
from deployments.http.edge.traces import begin_trace, describe_inputs, end_trace
from deployments.http.errors import CLIENT_CLOSED_REQUEST
from deployments.keys.file import Key
from deployments.keys.rates import REQUESTS, TOKENS, Rates
from deployments.keys.usage import Usage
from deployments.logs import Record, RequestLog, spent
from deployments.metrics import CANCELLED, SUCCESS, Metrics
from deployments.status.history import History
from deployments.tracing import current, tracer

T = TypeVar("T")
# Reads the fields of a dialect's body, none of them null.
Parse = Callable[[Fields], EmbeddingRequest]

# Ray Serve's own header: a client may lower its request's deadline, never raise it.
TIMEOUT_HEADER = "x-request-timeout-seconds"
# How much earlier we answer: a share of the client's time, at least what the way there and back may take.
TIMEOUT_SHARE = 0.1
TIMEOUT_SECONDS = 0.1
# What a body may hold beside inputs and their tokens.
OTHER_VALUES = 1000


@dataclass
class Client:
    """For whom a request is: its key, whose turn it takes, in which lane; whether its tokens are paid for."""

    key: Key | None
    caller: str
    lane: Lane
    charged: bool = False


class Serving:
    """Embeds over a catalog of models."""

    def __init__(
        self, catalog: Catalog, metrics: Metrics, max_body_bytes: int, rates: Rates | None = None
    ) -> None:
        """Keep what every request needs; `rates` where there are keys."""
        self.rates = rates
        self.usage = Usage(metrics)
        self.history = History(metrics)
        self._log = RequestLog()
        tracer()  # what is wrong with it is told now, and what it needs is loaded
        self.catalog = catalog
        self.metrics = metrics
        self.in_hand = BytesInHand(max_body_bytes)
        self._max_body_bytes = max_body_bytes

    def find(self, request: Request, name: str | None, tags: frozenset[str] = frozenset()) -> Served:
        """Return the model that a request is for. Raises what `Catalog.find` does."""
        return self.find_for(key_of(request.scope), name, tags)

    def find_for(self, key: Key | None, name: str | None, tags: frozenset[str] = frozenset()) -> Served:
        """Return the model of that name for whoever has the key."""
        return self.catalog.find(name, tags, key.may_use) if key else self.catalog.find(name, tags)

    def find_wanted(
        self, request: Request, wanted: EmbeddingRequest | TokensRequest, record: Record
    ) -> Served:
        """Return the model that a parsed request is for, and note it in the request's record."""
        served = self.find(request, wanted.model, wanted.tags)
        queue = served.dispatch.worker.queue
        record.serve(served.name, queue.service_name, queue.service_role)
        return served

    def visible(self, request: Request) -> list[Served]:
        """Return the models that the client may use."""
        key = key_of(request.scope)
        return self.catalog.models(key.may_use) if key else self.catalog.models()

    async def charge(self, key: Key | None, kind: int, amount: float = 1) -> None:
        """Use up some of what a key may have in a minute. Raises RateLimitError."""
        if key is not None and self.rates is not None:
            await self.rates.spend(key, kind, amount)

    async def embed(self, request: Request, parse: Parse) -> bytes:
        """Return the answer in the dialect that `parse` reads, or raise an EmbeddingError."""
        arrival = asyncio.get_running_loop().time()
        with self.counted(arrival, request) as counted, self.in_hand.hold() as take:
            patience = wanted_seconds(request)
            key = key_of(request.scope)
            await self.charge(key, REQUESTS)
            body = await self.read(request, arrival + min(BODY_SECONDS, patience), take)
            with Timed(self.metrics, "parse") as parsing:
                wanted = await self.parse(parse, body)
            del body  # its texts are what is worked on
            served = self.find_wanted(request, wanted, counted)
            served.check_embeds()
            worker = served.dispatch.worker
            self.metrics.stage_seconds.labels(worker.name, "parse").observe(parsing.seconds)
            counted.stages["parse"] = parsing.seconds
            deadline = arrival + min(worker.limits.request_timeout_s, patience)
            client = Client(key, caller_of(request), lane_of(request))
            answer, counted.tokens = await self.answer(wanted, served, client, deadline)
            return answer

    async def answer(
        self, wanted: EmbeddingRequest, served: Served, client: "Client", deadline: float
    ) -> tuple[bytes, int]:
        """Return the JSON answer and its tokens, or raise an EmbeddingError."""
        worker = served.dispatch.worker

        async def tokens_for(card: ModelCard, tokenizer: TextTokenizer) -> Prepared:
            with Timed(self.metrics, "tokenise", worker.name):
                prepared = await prepare(wanted, served.model.embedding_task, worker.limits, card, tokenizer)
            if (trace := current.get()) is not None:
                describe_inputs(trace, served, prepared.batch)
            return prepared

        async def charge(tokens: int) -> None:
            if not client.charged:  # a model that changes meanwhile costs nothing more
                await self.charge(client.key, TOKENS, tokens)
                client.charged = True

        card, prepared, vectors = await served.dispatch.embed_by(
            tokens_for, deadline, client.lane, client.caller, charge
        )
        batch, cut, version = prepared.batch, prepared.truncated, str(worker.queue.version)

        def encode() -> bytes:
            shown = truncate(vectors, wanted.dimensions, card.normalizes)
            if wanted.normalize:
                shown = normalize(shown)
            result = EmbeddingResult(shown, served.name, batch.tokens, cut, version, batch.lengths)
            return wanted.answer(result)

        with Timed(self.metrics, "encode", worker.name):
            answer = await offload(vectors.size, encode)
        self.metrics.inputs.labels(worker.name).inc(len(batch))
        self.metrics.tokens.labels(worker.name).inc(batch.tokens)
        if client.key is not None:
            self.usage.count(client.key, served.name, len(batch), batch.tokens)
        return answer, batch.tokens

    async def parse(self, parse: Callable[[Fields], T], body: Body) -> T:
        """Return what a dialect makes of a body. Raises InvalidRequestError by field."""
        limits = [dispatch.worker.limits for dispatch in self.catalog.dispatches.values()]
        most = max((each.max_inputs + each.max_request_tokens for each in limits), default=0)
        few = most + OTHER_VALUES

        def bounded() -> T:
            if len(body) > few and count_values(body, few) > few:
                raise TooManyInputsError("the body holds more than any model here takes", "body")
            return parse(read_object(body))

        return await offload(len(body), bounded)

    async def read(self, request: Request, deadline: float, take: Take) -> Body:
        """Return the body. Raises BodyTooLargeError, QueueFullError, DeadlineExceededError at `deadline`."""
        try:
            async with asyncio.timeout_at(deadline):
                take(taken := declared_length(request, self._max_body_bytes))
                body = Buffer(self._max_body_bytes)
                async for chunk in body_chunks(request, self._max_body_bytes):
                    if (more := body.size + len(chunk) - taken) > 0:
                        take(more)
                        taken += more
                    body.append(chunk)
                if not body.size and "upgrade" in request.headers:
                    # uvicorn gives up reading what offers another protocol.
                    told = "the body was lost, since the request offers to upgrade; send it as HTTP/1.1"
                    raise InvalidRequestError(told, "upgrade")
                return body.content()
        except TimeoutError:
            raise DeadlineExceededError("the body took too long to arrive", "body") from None

    @contextmanager
    def counted(self, arrival: float, request: Request) -> Iterator[Record]:
        """Count the request by model and outcome, however it ends, and log it where it is to be logged."""
        key = key_of(request.scope)
        trace = begin_trace(request, key) if tracer() is not None else None
        counted = Record(key.name if key else None, trace)
        before = spent.set(counted.stages)
        outcome, status = EmbeddingError.code, EmbeddingError.status
        try:
            yield counted
            outcome, status = SUCCESS, HTTPStatus.OK
        except EmbeddingError as error:
            outcome, status = error.code, error.status
            raise
        except (asyncio.CancelledError, ClientDisconnect):
            outcome, status = CANCELLED, CLIENT_CLOSED_REQUEST
            raise
        finally:
            seconds = asyncio.get_running_loop().time() - arrival
            self.metrics.requests.labels(counted.model, outcome).inc()
            self.metrics.request_seconds.labels(counted.model).observe(seconds)
            spent.reset(before)
            self._log.write(counted, outcome, seconds)
            if trace is not None:
                end_trace(trace, counted.model, "" if outcome == SUCCESS else outcome, status)


class Timed:
    """Times a stage of a request; counts it, unless it fails, where the worker is known already."""

    seconds = 0.0

    def __init__(self, metrics: Metrics, name: str, worker: str | None = None) -> None:
        """Time the block that follows."""
        self._metrics, self._name, self._worker = metrics, name, worker
        self._begun = time.perf_counter()  # uvloop's own clock counts milliseconds

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End, and note it in the request's trace however it ends."""
        ended = time.perf_counter()
        if (trace := current.get()) is not None:
            trace.note(self._name, self._begun, ended)
        self.seconds = ended - self._begun
        if kind is None and self._worker is not None:
            self._metrics.stage_seconds.labels(self._worker, self._name).observe(self.seconds)
            if (stages := spent.get()) is not None:
                stages[self._name] = self.seconds


def wanted_seconds(request: Request) -> float:
    """Return how long the client is willing to wait; infinity where it doesn't say.

    A little less than it says: it should read our answer rather than Ray Serve's, or give up by itself.
    """
    try:
        seconds = float(request.headers.get(TIMEOUT_HEADER, ""))
    except ValueError:
        return math.inf
    if not seconds > 0:
        return math.inf
    return seconds - min(max(seconds * TIMEOUT_SHARE, TIMEOUT_SECONDS), seconds / 2)


def lane_of(request: Request) -> Lane:
    """Return the lane that the query asks for: `nice=true` lets others go first."""
    if not request.scope["query_string"]:
        return Lane.INTERACTIVE
    match request.query_params.get("nice", "false"):
        case "true":
            return Lane.BULK
        case "false":
            return Lane.INTERACTIVE
    raise InvalidRequestError("`nice` must be true or false", "nice")


def caller_of(request: Request) -> str:
    """Return what tells callers apart for taking turns: the key, else the address. Never logged."""
    if (key := key_of(request.scope)) is not None:
        return key.name
    for header in ("authorization", "x-api-key", "api-key"):
        if value := request.headers.get(header):
            return value
    return request.client.host if request.client else ""
