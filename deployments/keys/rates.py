"""Requests and tokens per minute: a bucket for each key, one place that fills it for all ingress replicas.

An ingress replica takes what a key uses from the central bucket in leases of some tenths of a second, ahead
of need, so that a request seldom waits for another process and all replicas together never give out more.
"""

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from deployments.errors import RateLimitError
from deployments.keys.file import Key

logger = logging.getLogger("ray.serve")

MINUTE = 60.0
# How much of a key's minute one ingress replica holds at a time.
LEASE_SECONDS = 0.5
# While the central bucket doesn't answer, each replica counts for itself.
CENTRAL_SECONDS = 0.5

KINDS = ("requests", "tokens")
REQUESTS, TOKENS = range(len(KINDS))
Limits = tuple[float, float]  # requests and tokens per minute; infinite where there is no limit


def limits_of(key: Key) -> Limits:
    """Return a key's limits."""
    return key.requests_per_minute or math.inf, key.tokens_per_minute or math.inf


@dataclass(frozen=True)
class Grant:
    """What a bucket gave of what was asked, what is left, and in how many seconds there is enough."""

    given: float
    left: float
    wait: float = 0.0


class Bucket:
    """Holds a minute's worth and fills up evenly. What is larger than it goes through when it is full."""

    def __init__(self, per_minute: float, now: float) -> None:
        """Start full."""
        self.per_minute = per_minute
        self._level = per_minute
        self._since = now

    def take(self, least: float, wanted: float, now: float) -> Grant:
        """Give between `least` and `wanted`, or nothing."""
        self._level = min(self.per_minute, self._level + (now - self._since) * self.per_minute / MINUTE)
        self._since = now
        needed = min(least, self.per_minute)
        if self._level < needed:
            return Grant(0.0, max(self._level, 0.0), (needed - self._level) * MINUTE / self.per_minute)
        given = max(least, min(wanted, self._level))
        self._level -= given
        return Grant(given, max(self._level, 0.0))


class Buckets:
    """The buckets of all keys, by name and kind."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with none."""
        self._clock = clock
        self._buckets: dict[tuple[str, int], Bucket] = {}

    def take(self, key: str, kind: int, per_minute: float, least: float, wanted: float) -> Grant:
        """Take from a key's bucket; one whose limit has changed starts anew."""
        now = self._clock()
        bucket = self._buckets.get((key, kind))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key, kind] = Bucket(per_minute, now)
        return bucket.take(least, wanted, now)


class RateServer:
    """The Ray Serve deployment of the central buckets: one replica, for all ingress replicas."""

    def __init__(self) -> None:
        """Start with every bucket full."""
        self._buckets = Buckets()

    async def take(self, key: str, kind: int, per_minute: float, least: float, wanted: float) -> Grant:
        """As `Buckets.take`."""
        return self._buckets.take(key, kind, per_minute, least, wanted)


# Takes from the central bucket; see `Buckets.take`.
Take = Callable[[str, int, float, float, float], Awaitable[Grant]]


class Rates(ABC):
    """What the ingress asks before it does a client's work."""

    async def spend(self, key: Key, kind: int, amount: float) -> None:
        """Use up so many requests or tokens. Raises RateLimitError that says when to come back."""
        per_minute = limits_of(key)[kind]
        if per_minute < math.inf:
            await self._spend(key, kind, per_minute, amount)

    @abstractmethod
    async def _spend(self, key: Key, kind: int, per_minute: float, amount: float) -> None:
        """As `spend`, of a kind that has a limit."""

    @abstractmethod
    def _left(self, key: Key, kind: int) -> float | None:
        """Return what is left of a minute's worth; None where nothing was used yet."""

    def headers(self, key: Key) -> dict[str, str]:
        """Return the `x-ratelimit-*` headers: limit, remaining and reset of each kind that has a limit.

        The names are OpenAI's; what is left is told as far as it is known here.
        """
        shown = {}
        for kind, (name, per_minute) in enumerate(zip(KINDS, limits_of(key), strict=True)):
            if per_minute == math.inf:
                continue
            left = self._left(key, kind)
            now = per_minute if left is None else left
            limit = f"{per_minute:g}" if per_minute < 1e6 else str(int(per_minute))
            shown[f"x-ratelimit-limit-{name}"] = limit
            shown[f"x-ratelimit-remaining-{name}"] = str(int(now))
            shown[f"x-ratelimit-reset-{name}"] = f"{(per_minute - now) * MINUTE / per_minute:.3f}s"
        return shown


@dataclass
class _Lease:
    """What one ingress replica holds of a key's bucket, and what the bucket had left."""

    held: float = 0.0
    left: float | None = None
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    refill: "asyncio.Task[None] | None" = None


class LocalRates(Rates):
    """The buckets of the only ingress replica, in its own process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with every bucket full."""
        self._buckets = Buckets(clock)
        self._levels: dict[tuple[str, int], float] = {}

    async def _spend(self, key: Key, kind: int, per_minute: float, amount: float) -> None:
        grant = self._buckets.take(key.name, kind, per_minute, amount, amount)
        self._levels[key.name, kind] = grant.left
        if not grant.given:
            raise _refusal(kind, per_minute, grant.wait)

    def _left(self, key: Key, kind: int) -> float | None:
        return self._levels.get((key.name, kind))


class LeasedRates(Rates):
    """What one of several ingress replicas holds of the central buckets."""

    def __init__(self, take: Take) -> None:
        """Hold nothing yet; `take` asks the central buckets."""
        self._take = take
        self._leases: dict[tuple[str, int], _Lease] = {}
        self._alone = Buckets()  # for as long as nobody answers

    async def _spend(self, key: Key, kind: int, per_minute: float, amount: float) -> None:
        """Take from what is held, and ask for more in time."""
        lease = self._leases.setdefault((key.name, kind), _Lease())
        slice_ = per_minute * LEASE_SECONDS / MINUTE
        if lease.held < amount:
            async with lease.asking:
                if lease.held < amount:
                    grant = await self._ask(key, kind, per_minute, amount - lease.held, amount + slice_)
                    lease.held += grant.given
                    lease.left = grant.left
                    if not grant.given:
                        raise _refusal(kind, per_minute, grant.wait)
        lease.held -= amount
        if lease.held < slice_ / 2 and slice_ >= 2 and lease.refill is None:
            lease.refill = asyncio.ensure_future(self._refill(lease, key, kind, per_minute))

    async def _refill(self, lease: _Lease, key: Key, kind: int, per_minute: float) -> None:
        """Ask ahead of need; what isn't given now is asked for when it is needed."""
        try:
            async with lease.asking:
                grant = await self._ask(key, kind, per_minute, 1.0, per_minute * LEASE_SECONDS / MINUTE)
                lease.held += grant.given
                lease.left = grant.left
        finally:
            lease.refill = None

    async def _ask(self, key: Key, kind: int, per_minute: float, least: float, wanted: float) -> Grant:
        try:
            async with asyncio.timeout(CENTRAL_SECONDS):
                return await self._take(key.name, kind, per_minute, least, wanted)
        except Exception as error:  # a valid key is worth more than an exact limit for the time of a restart
            logger.warning("the rate limits are counted here: %s", type(error).__name__)
            return self._alone.take(key.name, kind, per_minute, least, least)

    def _left(self, key: Key, kind: int) -> float | None:
        lease = self._leases.get((key.name, kind))
        return None if lease is None or lease.left is None else lease.left + lease.held


def _refusal(kind: int, per_minute: float, wait: float) -> RateLimitError:
    return RateLimitError(
        f"this key's {per_minute:g} {KINDS[kind]} per minute are used up", None, max(wait, 1.0)
    )
