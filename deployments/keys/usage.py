"""What each key has used, by model: for its owner and for the operator."""

from collections.abc import Iterable
from typing import Any

from deployments.keys.file import Key
from deployments.keys.ring import KeyRing
from deployments.metrics import Metrics

# Requests, inputs and tokens of one model.
Counts = tuple[int, int, int]


class Usage:
    """Counts successful requests by key and model, in this process."""

    def __init__(self, metrics: Metrics) -> None:
        """Count into the metrics too."""
        self._metrics = metrics
        self._counts: dict[str, dict[str, Counts]] = {}

    def count(self, key: Key, model: str, inputs: int, tokens: int) -> None:
        """Add a request."""
        models = self._counts.setdefault(key.name, {})
        before = models.get(model, (0, 0, 0))
        models[model] = before[0] + 1, before[1] + inputs, before[2] + tokens
        self._metrics.key_requests.labels(key.name, model).inc()
        self._metrics.key_tokens.labels(key.name, model).inc(tokens)

    def of(self, name: str) -> dict[str, Counts]:
        """Return what a key has used, by model."""
        return dict(self._counts.get(name, {}))


def usage_answer(key: Key, parts: Iterable[dict[str, Counts]], ring: KeyRing) -> dict[str, Any]:
    """Return what all ingress replicas together counted of a key, and what it may use.

    An operator is told what every key may use; what they have used stands in the metrics.
    """
    models: dict[str, Counts] = {}
    for part in parts:
        for model, (requests, inputs, tokens) in part.items():
            before = models.get(model, (0, 0, 0))
            models[model] = before[0] + requests, before[1] + inputs, before[2] + tokens
    answer = {
        "object": "usage",
        "key": key.name,
        "models": [
            {"model": model, "requests": requests, "inputs": inputs, "tokens": tokens}
            for model, (requests, inputs, tokens) in sorted(models.items())
        ],
        "limits": _limits(key),
    }
    if key.operator:
        answer["keys"] = [{"key": each.name, "limits": _limits(each)} for each in ring.valid()]
    return answer


def _limits(key: Key) -> dict[str, Any]:
    return {
        "models": list(key.models),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "expires": key.expires.isoformat() if key.expires else None,
    }
