"""What the dashboard and the alert rules ask for, and Debian's Prometheus where it is installed."""

import re
import shutil
from collections.abc import Iterator

import pytest
from prometheus_client import Counter, Gauge, Histogram

from deployments.command.alerts import ALERTS
from deployments.command.dashboard import dashboard
from deployments.command.panels import RANGE
from deployments.metrics import Metrics

PANELS = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
QUERIES = {
    f"{panel['id']}{target['refId']}: {panel['title']}": target["expr"]
    for panel in PANELS
    for target in panel["targets"]
}
CONDITIONS = {alert.name: alert.expression for alert in ALERTS}
# A metric, and its labels where some are named.
METRIC = re.compile(r"\b(embedding_\w+|vllm:\w+)(?:\{([^}]*)\})?")
LABEL = re.compile(r"(\w+)(?:=~|!~|!=|=)")
# What a histogram has, and a counter.
SUFFIX = re.compile(r"_(bucket|sum|count|total)$")

# Of every metric that an ingress registers, and of what the controller tells, its labels.
LABELS = {
    each._name: set(each._labelnames)
    for each in vars(Metrics()).values()
    if isinstance(each, Counter | Gauge | Histogram)
} | {"embedding_replica_states": {"worker", "state"}}
HISTOGRAMS = {e._name for e in vars(Metrics()).values() if isinstance(e, Histogram)}
GAUGES = {e._name for e in vars(Metrics()).values() if isinstance(e, Gauge)}
GAUGES |= {"embedding_replica_states"}

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="Prometheus isn't installed (Debian: apt-get install prometheus)",
)


def asked(query: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric that a query names, and the labels that it is chosen by."""
    for name, labels in METRIC.findall(query):
        yield name, set(LABEL.findall(labels))


def names(prefix: str) -> set[str]:
    """Return the names of all metrics with that prefix that a panel or an alert asks for."""
    queries = [*QUERIES.values(), *CONDITIONS.values()]
    return {name for query in queries for name, _ in asked(query) if name.startswith(prefix)}


def concrete(query: str, window: str) -> str:
    """Return a query as Grafana sends it, with everything chosen."""
    return query.replace(RANGE, window).replace("$model", ".*").replace("$worker", ".*")


def metric_of(name: str) -> str:
    """Return the metric behind a series of its own."""
    if name in GAUGES:
        return name
    bare = SUFFIX.sub("", name)
    if bare in HISTOGRAMS:
        assert name != f"{bare}_total"
    else:
        assert name == f"{bare}_total"
    return bare
