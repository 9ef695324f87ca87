"""When somebody should be told, and what there is to do: rules for Prometheus."""

from dataclasses import dataclass

from deployments.command.panels import FAILED, LATE

JOB = "embedding-cluster"
# Less than that is no crowd: of two requests one that fails is half of them.
MIN_REQUESTS_PER_SECOND = 0.1


@dataclass(frozen=True)
class Alert:
    """A rule: fires once `expression` has given data for the time `lasting`. `action` is what to do."""

    name: str
    expression: str
    lasting: str
    severity: str
    summary: str
    action: str


def share(counter: str, where: str) -> str:
    """Return the query for a share of what ended in the last five minutes, where there was enough of it."""
    some = f"sum by (model) (rate(embedding_{counter}{{{where}}}[5m]))"
    whole = f"sum by (model) (rate(embedding_{counter}[5m]))"
    return f"{some} / ({whole} > {MIN_REQUESTS_PER_SECOND})"


def new(counter: str, by: str) -> str:
    """Return the query for what was counted in the last ten minutes, the first time of all included.

    Prometheus sees no increase in a series that begins at one; and what it meets at its own start isn't new.
    """
    grown = f"sum by ({by}) (increase({counter}[10m])) > 0"
    begun = f"sum by ({by}) ({counter} unless {counter} offset 10m) > 0"
    return f'{grown} or {begun} and on () (up{{job="{JOB}"}} offset 10m == 1)'


def in_state(states: str) -> str:
    """Return the query for how many replicas of each worker are in one of the states."""
    return f'sum by (worker) (embedding_replica_states{{state=~"{states}"}})'


COMING = "starting|updating|recovering"
IS_FAILED, IS_LATE = f'outcome=~"{FAILED}"', f'outcome=~"{LATE}"'
IS_OVER_RATE, IS_NOT_OK = 'outcome="rate_limit_exceeded"', 'outcome!="ok"'
ALERTS = (
    Alert(
        "EmbeddingClusterSilent",
        f'up{{job="{JOB}"}} == 0',
        "2m",
        "critical",
        "Nothing answers at {{ $labels.instance }}/metrics",
        "Ask /health at that address. No answer: the process or its machine is down; start it, and read the"
        " last lines of its log. 401 or 403: Prometheus needs an operator's key. 503: an ingress replica is"
        " silent; `serve status` shows which.",
    ),
    Alert(
        "EmbeddingModelDown",
        f"{in_state('running')} == 0 and {in_state(COMING)} > 0",
        "10m",
        "critical",
        "No replica of {{ $labels.worker }} runs, and none has come up for ten minutes",
        "`embedding-cluster status` and `serve status` give the reason that the engine told. Is there memory,"
        " a free GPU or enough cores for it; are the model's files on that node?",
    ),
    Alert(
        "EmbeddingReplicaMissing",
        f"{in_state(COMING)} > 0 and {in_state('running')} > 0",
        "20m",
        "warning",
        "A replica of {{ $labels.worker }} hasn't come up for twenty minutes",
        "The others serve meanwhile. `serve status` tells why: most often no node has what it asks for; add"
        " one, or lower max_replicas.",
    ),
    Alert(
        "EmbeddingErrors",
        f"{share('requests_total', IS_FAILED)} > 0.01",
        "5m",
        "critical",
        "More than 1% of the requests for {{ $labels.model }} fail",
        "The dashboard's errors show the code. model_unavailable: see its replicas. non_finite_embedding and"
        " internal_error: see the alerts of these names.",
    ),
    Alert(
        "EmbeddingTooMuchWork",
        f"{share('requests_total', IS_LATE)} > 0.01",
        "10m",
        "warning",
        "More than 1% of the requests for {{ $labels.model }} are refused or too late",
        "It is asked for more than its replicas can do. Raise num_replicas or max_replicas, give the client"
        " that asks most a limit (dashboard, keys), or have bulk work come as batches or with nice=true.",
    ),
    Alert(
        "EmbeddingQueueGrows",
        "max by (worker) (embedding_queued_tokens)"
        " / (max by (worker) (embedding_capacity_tokens_per_second) > 0) > 20",
        "10m",
        "warning",
        "More than 20 s of work wait for {{ $labels.worker }}",
        "As EmbeddingTooMuchWork. Batches and jobs that fill the queue harm nobody: people go first.",
    ),
    Alert(
        "EmbeddingSlow",
        "histogram_quantile(0.99, sum by (le, model) (rate(embedding_request_seconds_bucket[5m]))) > 10",
        "10m",
        "warning",
        "One request in a hundred for {{ $labels.model }} takes more than 10 s",
        "The dashboard's latency by stage shows where. wait: too few replicas. engine: long inputs or a slow"
        " machine. parse, tokenise, encode: too few cores for the ingress; raise --ingress-replicas.",
    ),
    Alert(
        "EmbeddingInternalError",
        new('embedding_requests_total{outcome="internal_error"}', "model"),
        "0m",
        "warning",
        "A request for {{ $labels.model }} ended in an internal error",
        "A bug, or an input that ended two engines. The log of the ingress has `internal error` with the"
        " place, the replica's log what ended the engine. Please tell us of it.",
    ),
    Alert(
        "EmbeddingNotFinite",
        new('embedding_requests_total{outcome="non_finite_embedding"}', "model"),
        "0m",
        "warning",
        "{{ $labels.model }} gave a vector with NaN or infinity in it",
        "The client had an error and no vector. If it goes on, try the model with another dtype"
        " (generator.engine_args), and `embedding-cluster verify`.",
    ),
    Alert(
        "EmbeddingReplicaHangs",
        new("embedding_cuts_total", "worker"),
        "0m",
        "warning",
        "A replica of {{ $labels.worker }} took calls and didn't answer",
        "Its calls were given to others. Ray Serve replaces it when its health check fails; if it doesn't,"
        " look at its machine: memory that is swapped, a stopped process, a GPU that is lost.",
    ),
    Alert(
        "EmbeddingReplicasDie",
        "sum by (worker) (rate(embedding_retries_total[5m]))"
        " / sum by (worker) (rate(embedding_call_inputs_count[5m])) > 0.05",
        "5m",
        "warning",
        "More than 5% of the calls to {{ $labels.worker }} are repeated",
        "Its replicas die or are moved under load. `serve status` and the replicas' logs say why; out of"
        " memory is the most frequent reason.",
    ),
    Alert(
        "EmbeddingColdStartSlow",
        "histogram_quantile(0.5, sum by (le, worker) (increase(embedding_cold_start_seconds_bucket[30m])))"
        " > 30",
        "0m",
        "warning",
        "Who asks {{ $labels.worker }} first waits more than 30 s",
        "It scales to zero. Set min_replicas to 1, or raise downscale_delay_s.",
    ),
    Alert(
        "EmbeddingKeysRefused",
        'sum by (code) (rate(embedding_denied_total{code="invalid_api_key"}[5m])) > 1',
        "10m",
        "warning",
        "More than one request in a second comes without a valid key",
        "Most often a client whose key has expired or was revoked: `embedding-cluster keys list`. Else"
        " somebody tries keys: see the access log of what stands before the cluster.",
    ),
    Alert(
        "EmbeddingClientOverRate",
        f"{share('requests_total', IS_OVER_RATE)} > 0.1",
        "15m",
        "warning",
        "More than a tenth of the requests for {{ $labels.model }} is over its key's rate",
        "The dashboard shows which key asks most. Raise its limits, or tell its owner to send batches.",
    ),
    Alert(
        "EmbeddingBatchLinesFail",
        f"{share('batch_lines_total', IS_NOT_OK)} > 0.1",
        "15m",
        "warning",
        "More than a tenth of the lines of batches for {{ $labels.model }} fail",
        "The batch's error file has each line's reason. Most often inputs that are too long:"
        " truncate_prompt_tokens, or truncation in the worker file.",
    ),
)
