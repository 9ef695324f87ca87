"""Scaling by tokens: what a replica reports, and the policy by which Ray Serve adds and removes replicas.

Senders say with each call how much they have outstanding. A replica passes that on with its own speed, Serve
collects it from all of them, and the policy divides the one by the other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

from deployments.engine.batch import CallContext

# Names of what a replica reports; a sender's id follows after the colon.
TOKENS, REQUESTS = "outstanding_tokens:", "outstanding_requests:"
RATE, BUSY = "tokens_per_second", "busy"

# What a sender said counts while it has a call here, and is told as zero for a while after.
FORGET_SECONDS = 60.0
# A replica that is busy for a larger share of the time isn't one too many.
FULL_SHARE = 0.8


class ReplicaLoad:
    """What one replica knows of the load: how busy it is, and what its senders have waiting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Know nothing yet."""
        self._clock = clock
        self._senders: dict[str, _Sender] = {}
        self._running = 0
        self._since = self._told = clock()
        self._busy = 0.0  # seconds since it was told

    def begin(self, call: CallContext) -> None:
        """A call arrives."""
        now = self._clock()
        if not self._running:
            self._since = now
        self._running += 1
        sender = self._senders.setdefault(call.sender, _Sender())
        sender.running += 1
        sender.at = now
        sender.tokens, sender.requests = call.outstanding_tokens, call.outstanding_requests

    def end(self, call: CallContext) -> None:
        """A call has been answered."""
        now = self._clock()
        self._count(now)
        self._running -= 1
        sender = self._senders[call.sender]
        sender.running -= 1
        sender.at = now

    def report(self, tokens_per_second: float) -> dict[str, float]:
        """Return what Ray Serve collects from a replica whose engine is that fast."""
        now = self._clock()
        self._count(now)
        share = self._busy / max(now - self._told, 1e-6)
        self._told, self._busy = now, 0.0
        self._senders = {
            name: sender
            for name, sender in self._senders.items()
            if sender.running or now - sender.at < FORGET_SECONDS
        }
        report = {BUSY: min(share, 1.0), RATE: tokens_per_second}
        for name, sender in self._senders.items():
            report[TOKENS + name] = float(sender.tokens if sender.running else 0)
            report[REQUESTS + name] = float(sender.requests if sender.running else 0)
        return report

    def _count(self, now: float) -> None:
        """Add the time since the last change, if a call was running in it."""
        if self._running:
            self._busy += now - self._since
        self._since = now


@dataclass
class _Sender:
    """One process's dispatch: its calls here, and what it last said."""

    running: int = 0
    at: float = 0.0
    tokens: int = 0
    requests: int = 0


class TokenPolicy:
    """Ray Serve's autoscaling policy: as many replicas as embed what is outstanding in `target_seconds`.

    What is outstanding makes it grow. What is done keeps it from shrinking: replicas that keep up have
    nothing waiting, and are needed all the same. Serve applies the delays and bounds of the worker file.
    """

    def __init__(self, target_seconds: float, target_requests: float | None = None) -> None:
        """With `target_requests`, a replica's share is so many requests instead."""
        self._target_seconds = target_seconds
        self._target_requests = target_requests

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the wanted number of replicas, which may be broken, and no state."""
        running = context.current_num_replicas
        if not running:  # Serve brings the first one up itself when something waits for it
            return context.target_num_replicas, {}
        metrics = _latest(context)
        if not metrics.get(BUSY):
            return context.target_num_replicas, {}
        rates = [rate for rate in metrics.get(RATE, []) if rate > 0]
        if self._target_requests is not None:
            wanted = _outstanding(metrics, REQUESTS) / self._target_requests
        elif rates:
            wanted = _outstanding(metrics, TOKENS) / (sum(rates) / len(rates)) / self._target_seconds
        else:
            wanted = context.target_num_replicas if _outstanding(metrics, TOKENS) else 0.0
        needed = sum(metrics.get(BUSY, [])) / FULL_SHARE
        return max(wanted, min(needed, running)), {}


def _latest(context: AutoscalingContext) -> dict[str, list[float]]:
    """Return each metric's last values, of the replicas that have told one lately."""
    stale = (context.current_time or time.time()) - FORGET_SECONDS
    return {
        name: [series[-1].value for series in by_replica.values() if series and series[-1].timestamp > stale]
        for name, by_replica in (context.raw_metrics or {}).items()
    }


def _outstanding(metrics: dict[str, list[float]], prefix: str) -> float:
    """Add up the senders; what one of them told several replicas counts once."""
    return sum(max(told, default=0.0) for name, told in metrics.items() if name.startswith(prefix))
