"""Every metric: name, labels, buckets. Recorded in the ingress, where a request begins and ends.

Replicas send their timings along with their results, so that nothing is lost when one of them dies. Labels
come from closed sets: the workers and models of the worker files, the codes of our errors, the stages below.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

# When a process began counting is of no meaning in a sum over processes.
disable_created_metrics()

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A millisecond, a lone request on a CPU, up to the largest deadline that makes sense.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
INPUTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (16, 64, 256, 1024, 4096, 16_384, 65_536)
STAGES = ("parse", "tokenise", "wait", "call", "engine", "encode")
SUCCESS = "ok"
CANCELLED = "cancelled"  # the client left
# Requests for a model that there isn't, or whose body couldn't be read, have no model of ours.
NO_MODEL = "unknown"


# Ray Serve's names for what a replica may be doing.
REPLICA_STATES = ("STARTING", "UPDATING", "RECOVERING", "RUNNING", "STOPPING", "PENDING_MIGRATION")
# Every process sees all the replicas; a share of several processes isn't the sum of theirs.
NOT_ADDED = {
    "embedding_replicas",
    "embedding_capacity_tokens_per_second",
    "embedding_worker_info",
    "vllm:kv_cache_usage_perc",
}


class Metrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self) -> None:
        """Register every metric."""
        self.registry = CollectorRegistry()
        self._served: set[tuple[str, str]] = set()  # as label and value
        self._gone: set[tuple[str, str]] = set()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"embedding_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"embedding_{name}", what, ("worker",), registry=self.registry)

        def histogram(name: str, what: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(
                f"embedding_{name}", what, labels, buckets=tuple(buckets), registry=self.registry
            )

        self.requests = counter(
            "requests", "Requests by model and outcome (`ok`, or the error's code)", "model", "outcome"
        )
        self.request_seconds = histogram(
            "request_seconds", "Time from the first byte to the answer", SECONDS, "model"
        )
        self.stage_seconds = histogram("stage_seconds", "Time in each stage", SECONDS, "worker", "stage")
        self.batch_lines = counter(
            "batch_lines",
            "Lines of batches by model and outcome (`ok`, or the error's code)",
            "model",
            "outcome",
        )
        self.inputs = counter("inputs", "Inputs of successful requests", "worker")
        self.tokens = counter("tokens", "Tokens of successful requests", "worker")
        self.call_inputs = histogram("call_inputs", "Inputs of one call to a replica", INPUTS, "worker")
        self.call_tokens = histogram("call_tokens", "Tokens of one call to a replica", TOKENS, "worker")
        self.local_calls = counter(
            "local_calls", "Calls to a replica on the same node, over its own socket", "worker"
        )
        self.joined = counter("joined_parts", "Parts that left together with others", "worker")
        self.split = counter("split_parts", "Parts that requests were split into", "worker")
        self.shared = counter(
            "shared_inputs", "Inputs that were already waited for, and embedded once", "worker"
        )
        self.retries = counter("retries", "Calls that were repeated", "worker")
        self.cuts = counter("cuts", "Calls that were given up because their replica hung", "worker")
        self.cache_hits = counter("cache_hits", "Inputs whose vectors the cache held", "worker")
        self.cold_start_seconds = histogram(
            "cold_start_seconds", "From the first request without a replica to its answer", SECONDS, "worker"
        )
        self.key_requests = counter("key_requests", "Successful requests of a key", "key", "model")
        self.key_tokens = counter("key_tokens", "Tokens of a key's successful requests", "key", "model")
        self.denied = counter(
            "denied", "Requests without a key that may ask this, by the error's code", "code"
        )
        self.outstanding = gauge("outstanding_tokens", "Tokens let in and not yet answered")
        self.queued = gauge("queued_tokens", "Tokens that wait for a place in flight")
        self.replicas = gauge("replicas", "Replicas that this process can choose from")
        self.capacity = gauge(
            "capacity_tokens_per_second", "What the replicas can do together, as measured; 0 until it is"
        )
        self.cache_bytes = gauge("cache_bytes", "Memory that the cache takes")
        labels = "worker", "service_name", "service_role", "version"
        self.worker_info = Gauge(
            "embedding_worker_info", "1, with what the worker file says", labels, registry=self.registry
        )
        for metric in self._all():
            # To find a row takes as long as to count in it, and each request does so a dozen times.
            vars(metric)["labels"] = functools.cache(metric.labels)

    def describe(self, worker: str, service_name: str, service_role: str, version: str) -> None:
        """Show these of a worker, in place of what was shown before."""
        _remove(self.worker_info, "worker", worker)
        self.worker_info.labels(worker, service_name, service_role, version).set(1)

    def watch(self, worker: str, gauges: Mapping[Gauge, Callable[[], float]]) -> None:
        """Read the gauges of a worker when they are asked for."""
        for gauge, read in gauges.items():
            gauge.labels(worker).set_function(read)

    def serve(self, names: set[tuple[str, str]]) -> None:
        """Serve the workers and models of these labels from now on: the rows of those that are gone go."""
        self._forget()  # what ended late, of those that may come back now
        self._gone = (self._gone | self._served) - names
        self._served = names
        self._forget()

    def _forget(self) -> None:
        for metric in self._all():
            for label, value in self._gone:
                _remove(metric, label, value)

    def _all(self) -> Iterator[Counter | Gauge | Histogram]:
        return (each for each in vars(self).values() if isinstance(each, Counter | Gauge | Histogram))

    def text(self) -> bytes:
        """Return this process's metrics in Prometheus's text format."""
        self._forget()  # a request that was under way as its worker went is counted as it ends
        return generate_latest(self.registry)


def _remove(metric: Counter | Gauge | Histogram, label: str, value: str) -> None:
    """Remove the rows with that label, where there is such a label."""
    vars(metric)["labels"].cache_clear()
    with contextlib.suppress(ValueError):
        metric.remove_by_labels({label: value})


def states_text(states: Mapping[str, Mapping[str, int]]) -> bytes:
    """Return, as text, how many replicas of each worker are in which of Ray Serve's states."""
    registry = CollectorRegistry()
    gauge = Gauge(
        "embedding_replica_states",
        "Replicas by state, as Ray Serve's controller sees them",
        ("worker", "state"),
        registry=registry,
    )
    for worker, counts in states.items():
        for state in REPLICA_STATES:
            gauge.labels(worker, state.lower()).set(counts.get(state, 0))
    return generate_latest(registry)


def engine_text(worker: str, engine: str, dtype: str) -> bytes:
    """Return, as text, that a replica of a worker has this engine; the sum of all are how many have it."""
    registry = CollectorRegistry()
    labels = "worker", "engine", "dtype"
    gauge = Gauge(
        "embedding_engine_replicas", "Replicas by engine and its numbers", labels, registry=registry
    )
    gauge.labels(worker, engine, dtype).set(1)
    return generate_latest(registry)


def vllm_text() -> bytes:
    """Return what vLLM counts in this process, as text; its names begin with `vllm:`."""

    class Vllm(Collector):
        def collect(self) -> Iterator[Metric]:
            return (each for each in REGISTRY.collect() if each.name.startswith("vllm:"))

    registry = CollectorRegistry()
    registry.register(Vllm())
    return generate_latest(registry)


class _Merged(Collector):
    """The sum of several processes' metrics; of replicas, which all of them see, the largest number."""

    def __init__(self, texts: Iterable[bytes], names: Collection[str] | None) -> None:
        self._texts = tuple(texts)
        self._names = names

    def _wants(self, labels: Mapping[str, str]) -> bool:
        name = next((labels[label] for label in ("worker", "model", "model_name") if label in labels), None)
        return self._names is None or name is None or name in self._names

    def collect(self) -> Iterator[Metric]:
        """Yield each family once, its samples added up by name and labels."""
        families: dict[str, Metric] = {}
        totals: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
        for text in self._texts:
            for family in text_string_to_metric_families(text.decode()):
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    if not self._wants(sample.labels):
                        continue
                    key = family.name, sample.name, tuple(sorted(sample.labels.items()))
                    add = max if family.name in NOT_ADDED else float.__add__
                    totals[key] = add(totals.get(key, 0.0), float(sample.value))
        for (name, sample_name, labels), value in totals.items():
            families[name].add_sample(sample_name, dict(labels), value)
        yield from families.values()


def merge(texts: Iterable[bytes], names: Collection[str] | None = None) -> bytes:
    """Return several processes' metrics as one; with `names`, those of these workers and models alone."""
    registry = CollectorRegistry()
    registry.register(_Merged(texts, names))
    return generate_latest(registry)
