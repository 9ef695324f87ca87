"""The router's counts: however a call ends, nothing of it stays."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest, RequestRouter

from deployments.engine import VERSION
from deployments.engine.batch import NOBODY, CallContext, TokenBatch
from deployments.transport.router import TokenRouter

BATCH = TokenBatch.of([[1, 2, 3]])


def replica(name: str, version: str = "v") -> Any:
    """Return a replica as Serve's controller tells of it."""
    identity = ReplicaID(name, DeploymentID("m"))
    return SimpleNamespace(replica_id=identity, node_id="here", replica_metadata={VERSION: version})


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that Serve has told of two replicas."""
    node = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr("ray.get_runtime_context", lambda: node)
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda *_: None)
    router: Any = TokenRouter.__new__(TokenRouter)
    router._deployment_id = DeploymentID("m")
    router.initialize_state()
    router.update_replicas([replica("a"), replica("b")])
    return router


def request(number: int, *arguments: Any) -> PendingRequest:
    """Return a call that Serve has been given."""
    return PendingRequest(list(arguments), {}, RequestMetadata(f"request-{number}", f"internal-{number}"))


async def test_no_call_stays_counted_however_it_ends(router: Any) -> None:
    """Answered, failed, dropped before a replica had it, ranked again; with and without a number."""
    replicas = [replica("a"), replica("b")]
    for number in range(40):
        sender = CallContext("me", number) if number % 2 else NOBODY
        asked = request(number, BATCH, sender)
        await router.choose_replicas(replicas, asked)
        await router.choose_replicas(replicas, asked)
        assert sum(router._outstanding.values()) == 3
        if number % 4 < 2:
            asked.future.cancel()
            await asyncio.sleep(0)
        else:
            asked.future.set_result(None)
            router.on_request_routed(asked, replicas[number % 3 % 2].replica_id, None)
            router.on_request_completed(replicas[0].replica_id, f"internal-{number}")
        if sender is not NOBODY:
            router.forget(("me", number), number % 3 == 0)
        assert not any(router._outstanding.values()), number
    question = request(99, CallContext(version="v"))
    await router.choose_replicas(replicas, question)
    router.take(replicas[0].replica_id, 3, ("me", 100))
    router.forget(("me", 100), True)
    assert not any(router._outstanding.values())
    assert not (router._calls or router._places or router._by_call_id)


async def test_a_replica_that_said_that_it_ended_is_never_chosen(router: Any) -> None:
    """Not even where it is the only one, until Serve has taken it out: then nothing is kept of it."""
    router.take(replica("a").replica_id, 3, ("me", 1))
    router.leave_out(("me", 1))
    router.forget(("me", 1), False)
    chosen = await router.choose_replicas([replica("a"), replica("b")], request(1, BATCH))
    assert [each.replica_id for (each,) in chosen] == [replica("b").replica_id]
    assert await router.choose_replicas([replica("a")], request(2, BATCH)) == []
    router.update_replicas([replica("b")])
    assert not router._ended


def test_versions_that_are_gone_are_forgotten(router: Any) -> None:
    """However often the model is deployed anew; the one that came last counts on a tie."""
    for number in range(20):
        router.update_replicas([replica("a", f"v{number}"), replica("b", f"v{number + 1}")])
        assert router.version == f"v{number + 1}"
        assert len(router._seen) == 2
    assert isinstance(router._lock, type(threading.Lock()))


def test_two_applications_have_a_router_each(router: Any) -> None:
    """Of a deployment of one name."""
    other: Any = TokenRouter.__new__(TokenRouter)
    other._deployment_id = DeploymentID("m", "other")
    other.initialize_state()
    assert TokenRouter.of(DeploymentID("m")) is router
    assert TokenRouter.of(DeploymentID("m", "other")) is other
