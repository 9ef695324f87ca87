"""How many ingress replicas a GPU needs, and where it breaks with many: `make simulate`.

A discrete-event simulation: requests arrive at random times, an ingress (one core, one request at a time)
reads and tokenises each, sends it to the replica with the fewest requests that this ingress knows of, and
writes the answer out. A replica embeds what waits in one step: first its Python, then the GPU, which is
given the next step before it is through with one. What they
cost is measured, on this machine: per request by `make scale`, per input, token and
number here. GPU speeds are published or derived; `benchmarks/README.md` names the sources.
"""

import argparse
import asyncio
import heapq
import itertools
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.results import FOLDER
from benchmarks.scale import NONE
from benchmarks.workloads import DIMENSION, pool, tokenizer
from deployments.api.encoding import embedding_texts
from deployments.api.fields import read_object
from deployments.api.openai import parse_fields
from deployments.config.load import load_workers
from deployments.dispatch.dispatch import Dispatch
from deployments.engine.batch import Embedded, TokenBatch
from deployments.engine.choice import Packed
from deployments.engine.tokenizer import TextTokenizer
from deployments.metrics import Metrics
from deployments.transport.router import TokenRouter
from tests.harness import workers

REQUESTS = 5_000
LOAD = 0.8
# No more of a request's time in the ingress, 99 times in 100, than this.
P99_SECONDS = 0.02
STEP_TOKENS = 16_384
# What the host takes for a packed step and each of its inputs before the GPU has them, by `make bench-host`:
# from steps of 1 and of 256.
ENGINE_STEP_SECONDS, ENGINE_INPUT_SECONDS = 490e-6, 12e-6
ROUTED = (1, 10, 100, 1000)
# Engine processes that share one GPU.
ENGINES = (1, 2, 4)
REPEATS = 5
UNPROVEN = "\x7f"  # with it in a text the quick tokenizer isn't asked


@dataclass(frozen=True)
class Model:
    """What a GPU does with a model: tokens per second, numbers in a vector. Its tokenizer may be a BERT's."""

    name: str
    tokens_per_second: float
    dimension: int
    bert: bool = True


# bge-base's is published, for a model of its size. all-MiniLM's is half of what its fewer parameters would
# give (small matrices fill a GPU less), Qwen3's 40% of the chip's bf16 peak. Parameters are those that
# multiply for each token: all but the vocabulary's.
PUBLISHED_TOKENS_PER_SECOND = 1.6e6
BGE_PARAMETERS, MINILM_PARAMETERS, SMALL_QWEN_PARAMETERS, QWEN_PARAMETERS = 85e6, 10.6e6, 0.44e9, 6.95e9
H100_PEAK, SHARE_OF_PEAK = 989e12, 0.4  # dense bf16, FLOP/s
MODELS = (
    Model("all-MiniLM-L6-v2", PUBLISHED_TOKENS_PER_SECOND * BGE_PARAMETERS / MINILM_PARAMETERS / 2, 384),
    Model("bge-base", PUBLISHED_TOKENS_PER_SECOND, 768),
    Model("Qwen3-Embedding-0.6B", SHARE_OF_PEAK * H100_PEAK / (2 * SMALL_QWEN_PARAMETERS), 1024, bert=False),
    Model("Qwen3-Embedding-8B", SHARE_OF_PEAK * H100_PEAK / (2 * QWEN_PARAMETERS), 4096, bert=False),
)


@dataclass(frozen=True)
class Traffic:
    """What a request holds: inputs, each of so many tokens, answered in base64 or as numbers."""

    inputs: int
    tokens: int
    base64: bool

    @property
    def requests_in_a_step(self) -> int:
        """The most that one takes."""
        return max(1, STEP_TOKENS // (self.inputs * self.tokens))

    def __str__(self) -> str:
        """Say it."""
        how = "base64" if self.base64 else "float"
        return f"{self.inputs} of {self.tokens} tokens, {how}"


TRAFFICS = (
    Traffic(1, 20, True),
    Traffic(64, 20, True),
    Traffic(64, 128, True),
    Traffic(64, 512, True),
)


@dataclass(frozen=True)
class Costs:
    """CPU seconds of one core: an ingress's by request, input, token and number, its front's, a replica's."""

    request: float
    front: float
    input: float
    token: float
    float_number: float
    base64_number: float
    replica_call: float
    replica_step: float
    replica_input: float
    other_token: float  # of a tokenizer that isn't a BERT's

    def before(self, traffic: Traffic) -> float:
        """Return what a request costs in the ingress until it leaves for a replica."""
        return self.request / 2 + traffic.inputs * (self.input + traffic.tokens * self.token)

    def after(self, traffic: Traffic, dimension: int) -> float:
        """Return what its answer costs there."""
        number = self.base64_number if traffic.base64 else self.float_number
        return self.request / 2 + traffic.inputs * dimension * number

    def ingress(self, traffic: Traffic, dimension: int) -> float:
        """Return both."""
        return self.before(traffic) + self.after(traffic, dimension)


# --- measured here ---------------------------------------------------------------------------------------


def best(run: Callable[[], object]) -> float:
    """Return the CPU seconds of the fastest of several runs."""
    took = []
    for _ in range(REPEATS):
        begun = time.process_time()
        run()
        took.append(time.process_time() - begun)
    return min(took)


def measured_costs() -> Costs:
    """Return the costs; those per request are of the last `make scale`."""
    points = json.loads((FOLDER / "scale.json").read_text())["studies"]["replicas"]
    roles = points[0]["by_role"]
    texts = pool("short")[:512]
    encoder = TextTokenizer(tokenizer().to_str())
    ids = encoder.encode(texts)
    tokens = sum(map(len, ids))
    body = json.dumps({"model": "m", "input": texts}).encode()
    vectors = np.random.default_rng(0).standard_normal((512, DIMENSION)).astype(np.float32)
    # Both runs hold what a dispatch costs once; their difference, what it costs by input.
    per_input = best(lambda: parse_fields(read_object(body)))
    per_input += best(lambda: dispatched(ids, vectors)) - best(lambda: dispatched(ids[:1], vectors))
    return Costs(
        request=roles["ingress"] / 1e6,
        front=roles["front"] / 1e6,
        input=per_input / 512,
        token=best(lambda: encoder.encode(texts)) / tokens,
        # By Hugging Face's tokenizers, at the price of a BERT's there.
        other_token=best(lambda: encoder.encode([f"{text}{UNPROVEN}" for text in texts])) / tokens,
        float_number=best(lambda: embedding_texts(vectors, "float")) / vectors.size,
        base64_number=best(lambda: embedding_texts(vectors, "base64")) / vectors.size,
        replica_call=roles["replica"] / 1e6,
        replica_step=ENGINE_STEP_SECONDS,
        replica_input=ENGINE_INPUT_SECONDS,
    )


class _Answers:
    """A handle whose replica answers at once."""

    deployment_id = None

    def __init__(self, vectors: np.ndarray) -> None:
        self.embed = self
        self._vectors = vectors

    async def remote(self, batch: TokenBatch, _: object) -> Embedded:
        return Embedded(self._vectors[: len(batch)], batch.tokens, 1e-3, 1e3 * batch.tokens)


def dispatched(ids: list[list[int]], vectors: np.ndarray) -> None:
    """Send a request of these inputs through a dispatch, to a replica that costs nothing."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "m.toml")
        file.write_text(workers.fake("m", NONE))
        worker = load_workers(file, environ={})[0]

    async def embed() -> None:
        dispatch = Dispatch(worker, _Answers(vectors), Metrics())  # type: ignore[arg-type]
        batch = TokenBatch.of(ids)
        await dispatch.embed(batch, asyncio.get_running_loop().time() + 60)

    asyncio.run(embed())


def routing_seconds(replicas: int) -> float:
    """Return the CPU seconds that the choice among so many replicas takes, for one call."""
    router: Any = TokenRouter.__new__(TokenRouter)
    router._outstanding, router._suspects, router._ended, router._node_id = {}, {}, set(), "here"
    candidates = [SimpleNamespace(replica_id=f"replica-{n}", node_id=f"node-{n}") for n in range(replicas)]
    router._versions = {each.replica_id: "version" for each in candidates}
    calls = max(1, 10_000 // replicas)

    async def choose() -> None:
        for _ in range(calls):
            await router.choose_replicas(candidates)

    return best(lambda: asyncio.run(choose())) / calls


# --- the simulation --------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Request:
    """A request on its way. `queued` is the time it spent waiting for and in the ingress."""

    arrived: float
    ingress: "_Server"
    queued: float = 0.0
    embedded: float = 0.0


class _Server:
    """One core that does one thing after the other."""

    def __init__(self) -> None:
        self.free = 0.0

    def take(self, now: float, seconds: float) -> float:
        """Return when something that comes now is done."""
        self.free = max(now, self.free) + seconds
        return self.free


class _Replica:
    """A GPU with one engine: what waits when it can begin a step goes into that, up to a step's tokens."""

    def __init__(self) -> None:
        self.waiting: deque[_Request] = deque()
        self.steps = 0
        self.host, self.gpu = _Server(), _Server()

    def may_begin(self, now: float) -> bool:
        """Whether something waits, the host is free, and the GPU has one step at most."""
        return bool(self.waiting) and self.host.free <= now and self.steps <= Packed.AHEAD


@dataclass(frozen=True)
class Outcome:
    """What a run has shown: how busy GPUs were, how long requests took, how long of it in the ingress."""

    gpu_busy: float
    p50: float
    p99: float
    ingress_p99: float


@dataclass
class Cluster:
    """Ingress replicas and GPUs of one model under one kind of traffic."""

    model: Model
    traffic: Traffic
    costs: Costs
    ingresses: int
    gpus: int
    engines_per_gpu: int = 1
    events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)

    @property
    def capacity(self) -> float:
        """Requests per second that all engines can do. Those of one GPU share it evenly, busy or not."""
        gpu = self.traffic.inputs * self.traffic.tokens / self.model.tokens_per_second
        step = self.costs.replica_step / self.traffic.requests_in_a_step
        python = self.costs.replica_call + step + self.traffic.inputs * self.costs.replica_input
        return self.gpus * self.engines_per_gpu / max(python, self.engines_per_gpu * gpu)

    def at(self, when: float, what: Callable[[float], None]) -> None:
        """Do something then."""
        heapq.heappush(self.events, (when, next(self._order), what))

    def run(self, rate: float, requests: int, seed: int = 0) -> Outcome:
        """Let so many requests arrive at `rate` per second."""
        rng = np.random.default_rng(seed)
        self._order = itertools.count()
        self._ingresses = [_Server() for _ in range(self.ingresses)]
        self._replicas = [_Replica() for _ in range(self.gpus * self.engines_per_gpu)]
        # What each ingress knows: the requests that it has sent itself.
        self._known = np.zeros((self.ingresses, len(self._replicas)), np.int64)
        self._gpu_seconds, self._done = 0.0, list[_Request]()
        self._finished: list[float] = []
        arrivals = rng.exponential(1 / rate, requests).cumsum()
        for number, when in enumerate(arrivals.tolist()):
            self.at(when, self._arrival(number % self.ingresses))
        while self.events:
            when, _, what = heapq.heappop(self.events)
            what(when)
        times = np.array([end - r.arrived for r, end in zip(self._done, self._finished, strict=True)])
        queued = np.array([r.queued for r in self._done])
        seconds = max(self._finished)
        return Outcome(
            self._gpu_seconds / self.gpus / seconds,
            float(np.percentile(times, 50)),
            float(np.percentile(times, 99)),
            float(np.percentile(queued, 99)),
        )

    def _arrival(self, ingress: int) -> Callable[[float], None]:
        def arrive(now: float) -> None:
            server = self._ingresses[ingress]
            request = _Request(now, server)
            sent = server.take(now, self.costs.before(self.traffic))
            request.queued += sent - now
            self.at(sent, lambda when: self._send(request, ingress, when))

        return arrive

    def _send(self, request: _Request, ingress: int, now: float) -> None:
        known = self._known[ingress]
        # The first of the least, from a place of its own: ingress replicas don't all begin with the same one.
        offset = ingress * len(self._replicas) // self.ingresses
        place = (int(np.argmin(np.roll(known, -offset))) + offset) % len(self._replicas)
        known[place] += 1
        replica = self._replicas[place]
        replica.waiting.append(request)
        request.embedded = place + ingress * len(self._replicas)  # where to take it off again
        self._step(replica, now)

    def _step(self, replica: _Replica, now: float) -> None:
        if not replica.may_begin(now):
            return
        traffic = self.traffic
        most = min(traffic.requests_in_a_step, len(replica.waiting))
        batch = [replica.waiting.popleft() for _ in range(most)]
        inputs = len(batch) * traffic.inputs
        gpu = inputs * traffic.tokens / self.model.tokens_per_second
        calls = len(batch) * self.costs.replica_call
        python = calls + self.costs.replica_step + inputs * self.costs.replica_input
        self._gpu_seconds += gpu
        replica.steps += 1
        given = replica.host.take(now, python)
        self.at(given, lambda when: self._step(replica, when))
        end = replica.gpu.take(given, gpu * self.engines_per_gpu)
        self.at(end, lambda when: self._stepped(replica, batch, when))

    def _stepped(self, replica: _Replica, batch: list[_Request], now: float) -> None:
        replica.steps -= 1
        for request in batch:
            ingress, place = divmod(int(request.embedded), len(self._replicas))
            self._known[ingress, place] -= 1
            end = request.ingress.take(now, self.costs.after(self.traffic, self.model.dimension))
            request.queued += end - now
            self._done.append(request)
            self._finished.append(end)
        self._step(replica, now)


def fed(cluster: Cluster, requests: int) -> Outcome:
    """Run with the least ingress replicas that feed a GPU at 80% load in time; return how that goes."""
    own = cluster.costs.ingress(cluster.traffic, cluster.model.dimension)
    rate = LOAD * cluster.capacity
    cluster.ingresses = max(1, int(np.ceil(rate * own)))  # fewer couldn't, whatever they wait
    while (outcome := cluster.run(rate, requests)).ingress_p99 > P99_SECONDS + own:
        cluster.ingresses += 1
    return outcome


def answers(costs: Costs, requests: int) -> dict[str, list[dict[str, Any]]]:
    """Return what the tables show."""
    needs = []
    for model, traffic, engines in itertools.product(MODELS, TRAFFICS, ENGINES):
        own = costs if model.bert else replace(costs, token=costs.other_token)
        cluster = Cluster(model, traffic, own, 1, 1, engines)
        outcome = fed(cluster, requests)
        needs.append(
            {
                "model": model.name,
                "traffic": str(traffic),
                "engines": engines,
                "requests": LOAD * cluster.capacity,
                "gpu": outcome.gpu_busy,
                "ingresses": cluster.ingresses,
                "fronts": LOAD * cluster.capacity * costs.front,
                "ingress_p99": outcome.ingress_p99,
                "p99": outcome.p99,
            }
        )
    grown = []
    one = Cluster(MODELS[1], TRAFFICS[3], costs, 1, 1)
    fed(one, requests)
    for gpus in (1, 4, 16, 64):
        # The same load for each; what grows is how little each ingress knows of the others.
        cluster = replace(one, ingresses=one.ingresses * gpus, gpus=gpus, events=[])
        outcome = cluster.run(LOAD * cluster.capacity, requests)
        grown.append({"gpus": gpus, "ingresses": cluster.ingresses, "p50": outcome.p50, "p99": outcome.p99})
    routing = [{"replicas": count, "seconds": routing_seconds(count)} for count in ROUTED]
    return {"needs": needs, "grown": grown, "routing": routing}


def tables(costs: Costs, shown: dict[str, list[dict[str, Any]]]) -> str:
    """Return the tables in markdown."""
    lines = ["| cost, one core | µs |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {1e6 * value:.3g} |" for name, value in asdict(costs).items()]
    lines += [
        "",
        "| one H100 | requests | engines | requests/s | GPU busy | ingress replicas | HAProxy cores"
        " | ingress p99, ms | p99, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for n in shown["needs"]:
        lines.append(
            f"| {n['model']} | {n['traffic']} | {n['engines']} | {n['requests']:,.0f} | {n['gpu']:.0%}"
            f" | {n['ingresses']} | {n['fronts']:.2f} | {1e3 * n['ingress_p99']:.1f} | {1e3 * n['p99']:.1f} |"
        )
    lines += ["", "| GPUs | ingress replicas | p50, ms | p99, ms |", "|---|---|---|---|"]
    for g in shown["grown"]:
        lines.append(f"| {g['gpus']} | {g['ingresses']} | {1e3 * g['p50']:.1f} | {1e3 * g['p99']:.1f} |")
    lines += ["", "| replicas of a model | µs to choose one, a call |", "|---|---|"]
    lines += [f"| {r['replicas']:,} | {1e6 * r['seconds']:,.0f} |" for r in shown["routing"]]
    return "\n".join(lines)


def main() -> int:
    """Measure what can be measured here, simulate, keep and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each run")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_args()
    costs = measured_costs()
    shown = answers(costs, given.requests)
    text = tables(costs, shown)
    print(text)
    file = given.folder / "simulation.json"
    file.write_text(json.dumps({"costs": asdict(costs), **shown}, indent=1) + "\n")
    if given.folder == FOLDER:
        report.insert(report.NOTES, "simulation", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
