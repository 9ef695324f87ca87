"""What the whole cluster counted → what somebody who looks at it is shown of each model.

slots of all processes → by deployment → rates, quantiles and small series; states → problems, with what to do
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.utils import floatToGoString

from deployments.config.worker import Worker
from deployments.dispatch.catalog import Served
from deployments.metrics import CANCELLED, NO_MODEL, REPLICA_STATES, SECONDS, SUCCESS
from deployments.status.history import (
    BATCH_LINES,
    CACHE_HITS,
    CAPACITY,
    COLD_STARTS,
    DENIED,
    INPUTS,
    OUTSTANDING,
    QUEUED,
    REPLICAS,
    REQUEST_SECONDS,
    REQUESTS,
    SLOT_SECONDS,
    SLOTS,
    TOKENS,
    Minutes,
)

# Over how many slots a speed is told, and quantiles of all requests.
RATE_SLOTS, QUANTILE_SLOTS = 6, 30
NOTHING = [0.0] * (SLOTS + 1)
BOUNDS = [floatToGoString(bound) for bound in (*SECONDS, math.inf)]  # as the buckets are labelled
PER_MODEL = {REQUESTS, REQUEST_SECONDS, BATCH_LINES}
DO = {
    "failed": "Mend what it says, then deploy again: kill -HUP, or `serve deploy`.",
    "coming": "Wait: a model takes seconds to minutes to load. If it stays so, the replica's log says why.",
    "none": "`serve status` says why: most often no node has the cores, memory or GPU that it asks for.",
    "silent": "Wait: Ray Serve replaces it once its health check has failed. Else look at its machine.",
    "port": "Free the port, or name another one as monitoring.metrics_port in the worker file.",
}


@dataclass(frozen=True)
class Replicas:
    """How many of a deployment's are in which of Ray Serve's states; why its engine can't start, if so."""

    states: Mapping[str, int] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Look:
    """What is seen of the cluster at a time, in seconds since the epoch.

    `states` are what `/ready` tells of each worker. `ingresses` counts the ingress replicas that were asked.
    """

    at: float
    minutes: Minutes
    replicas: Mapping[str, Replicas]
    states: Mapping[str, Mapping[str, Any]]
    ingresses: int


def report(look: Look, served: Iterable[Served], everything: bool) -> dict[str, Any]:
    """Return what is shown of the models that somebody may use; `everything` to an operator.

    What was counted is of the last quarter of an hour. `tokens_per_second` is of the last minute,
    `p50_seconds` and `p99_seconds` are of the last five. A series begins with its oldest slot, and ends with
    the last whole one.
    """
    workers: dict[str, Worker] = {}
    names: dict[str, list[str]] = {}
    for each in served:
        worker = each.dispatch.worker
        workers[worker.name] = worker
        names.setdefault(worker.name, []).append(each.name)
    models = {model: name for name, of in names.items() for model in of}
    columns = _columns(look.minutes, models, names)
    problems = [each for name in workers for each in _problems(look, name, everything)]
    answer = {
        "object": "status",
        "created": int(look.at),
        "ready": all(look.states[name]["ready"] for name in workers),
        "problems": problems,
        "seconds": SLOTS * SLOT_SECONDS,
        "slot_seconds": SLOT_SECONDS,
        "models": [_model(look, worker, names[name], columns[name]) for name, worker in workers.items()],
    }
    if everything:
        answer |= {"ingress_replicas": look.ingresses, "errors": _errors_of_no_model(look.minutes)}
    return answer


# --- one worker --------------------------------------------------------------------------------------

# A number for each slot, by metric and by the label that isn't a name: a code, or a bucket's bound.
_Columns = dict[tuple[str, str], list[float]]


def _columns(minutes: Minutes, models: Mapping[str, str], workers: Iterable[str]) -> dict[str, _Columns]:
    """Return each worker's columns; `models` are the names that count, with the worker of each."""
    found: dict[str, _Columns] = {name: {} for name in workers}
    for (metric, name, *rest), numbers in minutes.series.items():
        worker = models.get(name) if metric in PER_MODEL else name
        if worker in found and metric != DENIED:
            column = metric, rest[0] if rest else ""
            before = found[worker].get(column)
            found[worker][column] = list(map(float.__add__, before, numbers)) if before else numbers
    return found


def _model(look: Look, worker: Worker, names: list[str], columns: _Columns) -> dict[str, Any]:
    """Return what is shown of a worker and those of its models that may be seen."""

    def total(metric: str, slots: int = SLOTS + 1) -> int:
        return int(sum(columns.get((metric, ""), NOTHING)[-slots:]))

    state = look.states[worker.name]
    replicas = look.replicas.get(worker.name, Replicas()).states
    requests, lines = _outcomes(columns, REQUESTS), _outcomes(columns, BATCH_LINES)
    lately = [sum(column[-QUANTILE_SLOTS - 1 :]) for column in _buckets(columns)]
    seconds = RATE_SLOTS * SLOT_SECONDS + look.at % SLOT_SECONDS
    return {
        "deployment": worker.name,
        "models": names,
        "engine": worker.generator.served_by,
        "version": worker.queue.version,
        "ready": state["ready"],
        "replicas": {each.lower(): replicas[each] for each in REPLICA_STATES if replicas.get(each)},
        "tokens_per_second": round(total(TOKENS, RATE_SLOTS + 1) / seconds, 1),
        "capacity_tokens_per_second": total(CAPACITY, 1) or None,
        "outstanding_tokens": total(OUTSTANDING, 1),
        "queued_tokens": total(QUEUED, 1),
        "p50_seconds": quantile(0.5, lately),
        "p99_seconds": quantile(0.99, lately),
        "requests": requests.pop(SUCCESS, 0),
        "cancelled": requests.pop(CANCELLED, 0),
        "errors": requests,
        "batch_lines": lines.pop(SUCCESS, 0),
        "batch_errors": lines,
        "inputs": total(INPUTS),
        "tokens": total(TOKENS),
        "cache_hits": total(CACHE_HITS),
        "cold_starts": total(COLD_STARTS),
        "series": _series(columns),
    }


def _outcomes(columns: _Columns, metric: str) -> dict[str, int]:
    """Return how many ended how, by code."""
    return {label: int(sum(column)) for (name, label), column in sorted(columns.items()) if name == metric}


def _buckets(columns: _Columns) -> list[list[float]]:
    """Return the columns of request times, by bound; what a bucket below all requests holds is nothing."""
    return [columns.get((REQUEST_SECONDS, bound), NOTHING) for bound in BOUNDS]


def _series(columns: _Columns) -> dict[str, list[Any]]:
    """Return what is plotted: a number for each whole slot; None where there is none."""
    outcomes = {label: column for (name, label), column in columns.items() if name == REQUESTS}
    errors = [column for label, column in outcomes.items() if label not in (SUCCESS, CANCELLED)]
    times = list(zip(*_buckets(columns), strict=True))[:-1]
    plain = {name: columns.get((name, ""), NOTHING) for name in (TOKENS, OUTSTANDING, QUEUED, REPLICAS)}
    return {
        "requests": _added(list(outcomes.values())),
        "errors": _added(errors),
        "p50_seconds": [quantile(0.5, slot) for slot in times],
        "p99_seconds": [quantile(0.99, slot) for slot in times],
        **{name: _added([column]) for name, column in plain.items()},
    }


def _added(columns: list[list[float]]) -> list[int]:
    return [int(sum(slot)) for slot in zip(NOTHING, *columns, strict=True)][:-1]


def _errors_of_no_model(minutes: Minutes) -> dict[str, int]:
    """Return the errors of requests that had no valid key, or named no model that there is."""
    found: Counter[str] = Counter()
    for series, numbers in minutes.series.items():
        if series[0] == DENIED or series[:2] == (REQUESTS, NO_MODEL):
            found[series[-1]] += int(sum(numbers))
    return {code: number for code, number in sorted(found.items()) if code != CANCELLED}


def quantile(share: float, buckets: Sequence[float]) -> float | None:
    """Return the seconds within which this share of requests lies; None where there are none.

    `buckets` are how many took no longer than each of the bounds. As Prometheus has it: in a bucket all are
    taken to lie evenly, and beyond the last bound at that bound.
    """
    wanted = share * buckets[-1]
    if not wanted:
        return None
    place = next(index for index, count in enumerate(buckets) if count >= wanted)
    if place == len(SECONDS):
        return SECONDS[-1]
    below, before = (SECONDS[place - 1], buckets[place - 1]) if place else (0.0, 0.0)
    return round(below + (SECONDS[place] - below) * (wanted - before) / (buckets[place] - before), 6)


# --- what isn't well ---------------------------------------------------------------------------------


def _problems(look: Look, name: str, everything: bool) -> Iterator[dict[str, str]]:
    """Yield what `/ready` complains of in a worker, each with what to do."""
    state = look.states[name]
    replicas = look.replicas.get(name, Replicas())
    counts = {each.lower(): n for each, n in replicas.states.items() if n}
    if not state["ready"]:
        told = ", ".join(f"{n} {each}" for each, n in counts.items()) or "there is none"
        what, do = f"{state['reason']}: {told}", "none"
        if replicas.failure:
            # What an engine says may name folders of its node.
            what, do = f"can't start: {replicas.failure}" if everything else "can't start", "failed"
        elif counts.get("running"):
            do = "silent"
        elif counts:
            do = "coming"
        yield {"deployment": name, "what": what, "action": DO[do]}
    if "metrics" in state:
        yield {"deployment": name, "what": state["metrics"], "action": DO["port"]}
