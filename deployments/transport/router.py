"""Ray Serve's request router for our replicas: the one with the fewest outstanding tokens.

Serve's own counts requests, and a request may be two tokens or two hundred thousand. One router lives in
every process that holds a handle; it knows the tokens that this process has sent.
"""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import ray
from ray.serve._private.common import DeploymentID
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.engine import ADDRESS, VERSION
from deployments.engine.batch import NOBODY, CallContext, TokenBatch

# How long a replica that hung is chosen last. After that one call finds out whether it is back.
SUSPECT_SECONDS = 5.0
MAX_SUSPECT_SECONDS = 80.0


# A call's sender and its number there.
CallId = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Call:
    """A call under way: where its tokens count."""

    replica: ReplicaID
    tokens: int
    call_id: CallId | None


@dataclass(frozen=True, slots=True)
class _Suspicion:
    """A replica that hung is left out until then, on `time.monotonic`; the next time twice as long."""

    until: float
    seconds: float


class TokenRouter(RequestRouter):
    """Ranks replicas by outstanding tokens, those on this node first on a tie, suspects last.

    A call's context names it, so that its sender can find out where it went, and the model's version that it
    was prepared for: replicas of another version come after all others.
    """

    _by_deployment: ClassVar[WeakValueDictionary[DeploymentID, "TokenRouter"]] = WeakValueDictionary()

    def initialize_state(self, **_: Any) -> None:
        """Ray Serve's constructor for subclasses."""
        self._outstanding: dict[ReplicaID, int] = {}
        self._lock = threading.Lock()  # of the counts: Serve's loop may be another thread than the calls'
        self._calls: dict[str | CallId, _Call] = {}
        self._places: dict[CallId, ReplicaID] = {}
        self._by_call_id: dict[CallId, str | CallId] = {}
        self._versions: dict[ReplicaID, str] = {}
        self._seen: list[str] = []
        self._suspects: dict[ReplicaID, _Suspicion] = {}
        self._ended: set[ReplicaID] = set()
        self._node_id = ray.get_runtime_context().get_node_id()
        self._by_deployment[self._deployment_id] = self

    @classmethod
    def of(cls, deployment: DeploymentID) -> "TokenRouter | None":
        """Return this process's router of an application's deployment, once its handle has been used."""
        return cls._by_deployment.get(deployment)

    @property
    def num_replicas(self) -> int:
        """How many replicas there are to choose from."""
        return len(self.curr_replicas)

    @property
    def version(self) -> str | None:
        """The version that most replicas have, the one that came last on a tie; None without replicas."""
        counts = Counter(self._versions.values())
        return max(counts, key=lambda each: (counts[each], self._seen.index(each)), default=None)

    def suspect(self, call_id: CallId) -> bool:
        """Choose the call's replica last from now on; say whether there is another one to choose."""
        place = self._places.get(call_id)
        if place is None or self.num_replicas < 2:
            return False
        before = self._suspects.get(place)
        seconds = min(before.seconds * 2, MAX_SUSPECT_SECONDS) if before else SUSPECT_SECONDS
        self._suspects[place] = _Suspicion(time.monotonic() + seconds, seconds)
        return True

    def leave_out(self, call_id: CallId) -> None:
        """Never choose the call's replica again: by its own word its engine has ended.

        It takes Serve a while to notice. A call that is there as the process ends looks as if it were why.
        """
        if (place := self._places.get(call_id)) is not None:
            self._ended.add(place)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas one by one, the best first. Its tokens count as sent from here on."""
        if pending_request is not None:
            # Serve asks again at once otherwise, without ever giving way.
            pending_request.routing_context.should_backoff = True
        version = _context(pending_request.args).version if pending_request is not None else ""
        ranked = sorted(self._living(candidate_replicas), key=lambda replica: self._cost(replica, version))
        if ranked and pending_request is not None:
            self._take(ranked[0].replica_id, pending_request)
        return [[replica] for replica in ranked]

    def best_address(self, version: str) -> tuple[ReplicaID, str] | None:
        """Return the replica that a call would go to and its address, if that can be called on this node."""
        replicas = list(self.curr_replicas.values())  # a copy: Serve's loop may be another thread
        best = min(self._living(replicas), key=lambda each: self._cost(each, version), default=None)
        if best is None or best.node_id != self._node_id:
            return None
        address = best.replica_metadata.get(ADDRESS)
        return (best.replica_id, address) if address else None

    def take(self, replica: ReplicaID, tokens: int, call_id: CallId) -> None:
        """Count the tokens of a call that goes to the replica without Serve."""
        self._count(call_id, _Call(replica, tokens, call_id))

    def _living(self, replicas: Sequence[RunningReplica]) -> list[RunningReplica]:
        """Return the replicas that haven't said that their engine has ended."""
        return [each for each in replicas if each.replica_id not in self._ended]

    def _cost(self, replica: RunningReplica, version: str) -> tuple[bool, bool, int, bool]:
        identity = replica.replica_id
        other = bool(version) and self._versions.get(identity, version) != version
        elsewhere = replica.node_id != self._node_id
        suspicion = self._suspects.get(identity)
        suspected = suspicion is not None and time.monotonic() < suspicion.until
        return other, suspected, self._outstanding.get(identity, 0), elsewhere

    def _take(self, replica: ReplicaID, request: PendingRequest) -> None:
        """Count the request's tokens now: a burst is routed before the first of it is accepted."""
        self._release(request.metadata.internal_request_id)
        tokens = _tokens(request.args)
        if not tokens:
            return  # a question, not work
        context = _context(request.args)
        call_id = (context.sender, context.number) if context.sender else None
        key = request.metadata.internal_request_id
        self._count(key, _Call(replica, tokens, call_id))
        # Of one that is cancelled before a replica has taken it, Serve tells nothing.
        request.future.add_done_callback(lambda future: self._release(key) if future.cancelled() else None)

    def _count(self, key: str | CallId, call: _Call) -> None:
        with self._lock:
            self._calls[key] = call
            if call.call_id is not None:
                self._by_call_id[call.call_id] = key
                self._places[call.call_id] = call.replica
            self._outstanding[call.replica] = self._outstanding.get(call.replica, 0) + call.tokens

    def _release(self, key: str | CallId) -> None:
        with self._lock:
            call = self._calls.pop(key, None)
            if call is None:
                return
            if call.replica in self._outstanding:
                self._outstanding[call.replica] -= call.tokens
            if call.call_id is not None:
                self._by_call_id.pop(call.call_id, None)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has taken the call, perhaps not the one that was ranked first."""
        call = self._calls.get(pending_request.metadata.internal_request_id)
        if call is not None and call.replica != replica_id:
            self._take(replica_id, pending_request)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Take the call's tokens off again."""
        self._release(internal_request_id)

    def forget(self, call_id: CallId, answered: bool) -> None:
        """The call has ended; a replica that answered is no suspect any more."""
        if (key := self._by_call_id.get(call_id)) is not None:
            self._release(key)  # Serve tells nothing of a call that was never sent
        place = self._places.pop(call_id, None)
        if answered and place is not None:
            self._suspects.pop(place, None)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget what was counted for replicas that are gone."""
        super().update_replicas(replicas)
        alive = {replica.replica_id for replica in replicas}
        self._ended &= alive
        self._suspects = {i: suspicion for i, suspicion in self._suspects.items() if i in alive}
        with self._lock:
            self._outstanding = {i: tokens for i, tokens in self._outstanding.items() if i in alive}
        self._versions = {r.replica_id: r.replica_metadata.get(VERSION, "") for r in replicas}
        there = dict.fromkeys(self._versions.values())
        self._seen = [
            *(each for each in self._seen if each in there),
            *(v for v in there if v not in self._seen),
        ]


def _context(arguments: Sequence[Any]) -> CallContext:
    return next((each for each in arguments if isinstance(each, CallContext)), NOBODY)


def _tokens(arguments: Sequence[Any]) -> int:
    return sum(argument.tokens for argument in arguments if isinstance(argument, TokenBatch))
