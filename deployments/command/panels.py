"""What the dashboard shows, row by row: each panel's title, unit, and queries in Prometheus's language.

`$model` and `$worker` are chosen at the top of the dashboard, all of them at first.
"""

from dataclasses import dataclass

from deployments.metrics import STAGES

# Grafana puts in a range that holds at least four scrapes.
RANGE = "$__rate_interval"
OF_MODEL, OF_WORKER = 'model=~"$model"', 'worker=~"$worker"'
PER_SECOND = "ops"
TOKENS, TOKENS_PER_SECOND = "short", "short"


@dataclass(frozen=True)
class Panel:
    """A plot, or with `now` the last number: pairs of a query and the legend of what it gives."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    what: str = ""
    now: bool = False


def rate(counter: str, by: str, where: str) -> str:
    """Return the query for how much a counter grows in a second, added up by labels."""
    return f"sum by ({by}) (rate(embedding_{counter}{{{where}}}[{RANGE}]))"


def plot(title: str, unit: str, query: str, legend: str, what: str = "") -> Panel:
    """Return a panel of one query."""
    return Panel(title, unit, ((query, legend),), what)


def now(title: str, unit: str, query: str) -> Panel:
    """Return a panel of one number."""
    return Panel(title, unit, ((query, ""),), now=True)


def quantile(share: float, histogram: str, by: str, where: str) -> str:
    """Return the query for a quantile of a histogram."""
    buckets = rate(f"{histogram}_bucket", f"le, {by}", where)
    return f"histogram_quantile({share}, {buckets})"


def mean(histogram: str, by: str, where: str) -> str:
    """Return the query for the mean of what a histogram saw."""
    return f"{rate(f'{histogram}_sum', by, where)} / {rate(f'{histogram}_count', by, where)}"


# What the cluster is to blame for, or its operator. A client that leaves is nobody's error.
FAILED = "internal_error|non_finite_embedding|model_unavailable"
LATE = "queue_full|deadline_exceeded"
REQUESTS = rate("requests_total", "model", OF_MODEL)
ALL_ERRORS = f'{OF_MODEL},outcome!~"ok|cancelled"'
QUEUE_SECONDS = (
    f"max by (worker) (embedding_queued_tokens{{{OF_WORKER}}})"
    f" / (max by (worker) (embedding_capacity_tokens_per_second{{{OF_WORKER}}}) > 0)"
)
USED = (
    f"{rate('call_tokens_sum', 'worker', OF_WORKER)}"
    f" / (max by (worker) (embedding_capacity_tokens_per_second{{{OF_WORKER}}}) > 0)"
)
LOCAL = rate("local_calls_total", "worker", OF_WORKER)
CALLS = rate("call_inputs_count", "worker", OF_WORKER)
HITS, INPUTS = (rate(each, "worker", OF_WORKER) for each in ("cache_hits_total", "inputs_total"))

ROWS: dict[str, tuple[Panel, ...]] = {
    "Now": (
        now(
            "Replicas that run",
            "short",
            f'sum(embedding_replica_states{{{OF_WORKER},state="running"}})',
        ),
        now("Requests", PER_SECOND, f"sum(rate(embedding_requests_total{{{OF_MODEL}}}[{RANGE}]))"),
        now(
            "Errors, of all requests",
            "percentunit",
            f"(sum(rate(embedding_requests_total{{{ALL_ERRORS}}}[{RANGE}])) or vector(0))"
            f" / sum(rate(embedding_requests_total{{{OF_MODEL}}}[{RANGE}]))",
        ),
        now(
            "p99 of a request",
            "s",
            "histogram_quantile(0.99, sum by (le)"
            f" (rate(embedding_request_seconds_bucket{{{OF_MODEL}}}[{RANGE}])))",
        ),
        now("Tokens per second", TOKENS_PER_SECOND, f"sum(rate(embedding_tokens_total[{RANGE}]))"),
        now("Tokens that wait", TOKENS, f"sum(embedding_queued_tokens{{{OF_WORKER}}})"),
    ),
    "Traffic": (
        plot("Requests", PER_SECOND, REQUESTS, "{{model}}"),
        plot("Inputs", PER_SECOND, INPUTS, "{{worker}}", "Of successful requests and lines of batches."),
        plot("Tokens", TOKENS_PER_SECOND, rate("tokens_total", "worker", OF_WORKER), "{{worker}}"),
    ),
    "Errors": (
        plot(
            "Errors by code",
            PER_SECOND,
            rate("requests_total", "model, outcome", ALL_ERRORS),
            "{{model}}: {{outcome}}",
            "What each code means stands in the README; `unknown` are requests that named no model of ours.",
        ),
        plot(
            "Clients that left",
            PER_SECOND,
            rate("requests_total", "model", f'{OF_MODEL},outcome="cancelled"'),
            "{{model}}",
            "Before they had their answer: their own timeout is shorter than ours.",
        ),
        plot("Requests without a right key", PER_SECOND, rate("denied_total", "code", ""), "{{code}}"),
    ),
    "Latency": (
        Panel(
            "Requests",
            "s",
            tuple(
                (quantile(share, "request_seconds", "model", OF_MODEL), f"{{{{model}}}} p{100 * share:g}")
                for share in (0.5, 0.95, 0.99)
            ),
            "From the first byte to the answer.",
        ),
        plot(
            "Mean of each stage",
            "s",
            mean("stage_seconds", "worker, stage", OF_WORKER),
            "{{worker}}: {{stage}}",
            f"{', '.join(STAGES)}; a call holds its engine's time.",
        ),
        plot(
            "p99 of each stage",
            "s",
            quantile(0.99, "stage_seconds", "worker, stage", OF_WORKER),
            "{{worker}}: {{stage}}",
        ),
        plot(
            "Cold starts, mean",
            "s",
            mean("cold_start_seconds", "worker", OF_WORKER),
            "{{worker}}",
            "From the first request without a replica to its answer.",
        ),
    ),
    "Queue": (
        plot(
            "Tokens let in and not answered",
            TOKENS,
            f"sum by (worker) (embedding_outstanding_tokens{{{OF_WORKER}}})",
            "{{worker}}",
        ),
        plot(
            "Tokens that wait",
            TOKENS,
            f"sum by (worker) (embedding_queued_tokens{{{OF_WORKER}}})",
            "{{worker}}",
            "For a place in flight to a replica.",
        ),
        plot("Seconds of work that wait", "s", QUEUE_SECONDS, "{{worker}}", "At what the replicas can do."),
    ),
    "Replicas": (
        plot(
            "States",
            "short",
            f"max by (worker, state) (embedding_replica_states{{{OF_WORKER}}})",
            "{{worker}}: {{state}}",
            "As Ray Serve's controller sees them.",
        ),
        plot(
            "Can be called",
            "short",
            f"max by (worker) (embedding_replicas{{{OF_WORKER}}})",
            "{{worker}}",
        ),
        plot(
            "Versions and services",
            "short",
            f"max by (worker, version, service_name, service_role) (embedding_worker_info{{{OF_WORKER}}})",
            "{{worker}} {{version}}: {{service_name}}, {{service_role}}",
            "As the worker files name them.",
        ),
        plot(
            "Share of what they can do",
            "percentunit",
            USED,
            "{{worker}}",
            "Tokens in calls, of the tokens per second that the replicas' engines have measured.",
        ),
        Panel(
            "Calls repeated or given up",
            PER_SECOND,
            (
                (rate("retries_total", "worker", OF_WORKER), "{{worker}}: repeated"),
                (rate("cuts_total", "worker", OF_WORKER), "{{worker}}: replica hung"),
            ),
        ),
    ),
    "Engines": (
        plot(
            "Calls' time in the engine",
            "s",
            rate("stage_seconds_sum", "worker", f'{OF_WORKER},stage="engine"'),
            "{{worker}}",
            "Seconds in a second, over all calls under way.",
        ),
        Panel(
            "Size of a call, mean",
            "short",
            (
                (mean("call_inputs", "worker", OF_WORKER), "{{worker}}: inputs"),
                (mean("call_tokens", "worker", OF_WORKER), "{{worker}}: tokens"),
            ),
        ),
        Panel(
            "Joined, split, shared",
            PER_SECOND,
            (
                (rate("joined_parts_total", "worker", OF_WORKER), "{{worker}}: parts joined"),
                (rate("split_parts_total", "worker", OF_WORKER), "{{worker}}: parts split"),
                (rate("shared_inputs_total", "worker", OF_WORKER), "{{worker}}: inputs shared"),
            ),
        ),
        plot("Calls on the ingress's node", "percentunit", f"{LOCAL} / {CALLS}", "{{worker}}"),
        Panel(
            "vLLM: requests",
            "short",
            tuple(
                (f'sum by (model_name) (vllm:num_requests_{state}{{model_name=~"$worker"}})', legend)
                for state, legend in (
                    ("running", "{{model_name}}: in the step"),
                    ("waiting", "{{model_name}}: waiting"),
                )
            ),
            "Of workers that vLLM computes.",
        ),
        plot(
            "vLLM: tokens of a step, mean",
            "short",
            "sum by (model_name)"
            f' (rate(vllm:iteration_tokens_total_sum{{model_name=~"$worker"}}[{RANGE}]))'
            " / sum by (model_name)"
            f' (rate(vllm:iteration_tokens_total_count{{model_name=~"$worker"}}[{RANGE}]))',
            "{{model_name}}",
        ),
    ),
    "Cache": (
        plot("Inputs that it held", "percentunit", f"{HITS} / {INPUTS}", "{{worker}}"),
        plot(
            "Memory",
            "bytes",
            f"sum by (worker) (embedding_cache_bytes{{{OF_WORKER}}})",
            "{{worker}}",
        ),
    ),
    "Keys": (
        plot(
            "Requests", PER_SECOND, rate("key_requests_total", "key, model", OF_MODEL), "{{key}}: {{model}}"
        ),
        plot("Tokens", TOKENS_PER_SECOND, rate("key_tokens_total", "key", OF_MODEL), "{{key}}"),
        plot(
            "Over their rate",
            PER_SECOND,
            f'sum(rate(embedding_requests_total{{outcome="rate_limit_exceeded"}}[{RANGE}]))',
            "refused with 429",
        ),
    ),
    "Batches": (
        plot(
            "Lines",
            PER_SECOND,
            rate("batch_lines_total", "model, outcome", OF_MODEL),
            "{{model}}: {{outcome}}",
        ),
    ),
}
