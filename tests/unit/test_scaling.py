"""What replicas report of their load, and how many of them the policy wants."""

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engine.batch import CallContext
from deployments.replica.scaling import BUSY, FORGET_SECONDS, RATE, REQUESTS, TOKENS, ReplicaLoad, TokenPolicy

NOW = 1000.0


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        """Start at zero."""
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def test_a_replica_tells_its_speed_and_what_its_senders_have_waiting() -> None:
    """Overlapping calls count their time once; a sender without a call here has nothing to say."""
    clock = Clock()
    load = ReplicaLoad(clock)
    first = CallContext("x", outstanding_tokens=500, outstanding_requests=5)
    second = CallContext("y", outstanding_tokens=70, outstanding_requests=7)
    load.begin(first)
    clock.now = 1.0
    load.begin(second)
    clock.now = 2.0
    assert load.report(0.0) == {BUSY: 1.0, RATE: 0.0, **said("x", 500, 5), **said("y", 70, 7)}
    load.end(first)
    clock.now = 3.0
    load.end(second)
    clock.now = 4.0
    assert load.report(300.0) == {BUSY: 0.5, RATE: 300.0, **said("x", 0, 0), **said("y", 0, 0)}
    clock.now = 4.0 + FORGET_SECONDS
    assert load.report(300.0) == {BUSY: 0.0, RATE: 300.0}


def said(sender: str, tokens: float, requests: float) -> dict[str, float]:
    """Return the part of a report that is of one sender."""
    return {TOKENS + sender: tokens, REQUESTS + sender: requests}


def context(running: int, target: int, *reports: dict[str, float], age: float = 0.0) -> Any:
    """Return what Ray Serve gives a policy: each metric's series by replica."""
    raw: dict[str, dict[int, list[Any]]] = {}
    for replica, report in enumerate(reports):
        for name, value in report.items():
            old = SimpleNamespace(timestamp=NOW - age - 1, value=12345.0)
            new = SimpleNamespace(timestamp=NOW - age, value=value)
            raw.setdefault(name, {})[replica] = [old, new]
    return SimpleNamespace(
        current_num_replicas=running, target_num_replicas=target, current_time=NOW, raw_metrics=raw
    )


@pytest.mark.parametrize(
    ("outstanding", "busy", "wanted"),
    [
        pytest.param(0, 0.0, 0.0, id="idle"),
        pytest.param(100, 0.1, 0.125, id="hardly anything"),
        pytest.param(2000, 1.0, 2.0, id="twice what one does in time"),
        pytest.param(100, 0.9, 1.0, id="busy and keeping up"),
    ],
)
def test_the_policy_divides_what_waits_by_the_speed(outstanding: int, busy: float, wanted: float) -> None:
    """One replica that embeds 1,000 tokens a second, a target of one second."""
    report = {BUSY: busy, RATE: 1000.0, **said("x", outstanding, 1)}
    assert TokenPolicy(1.0)(context(1, 1, report))[0] == pytest.approx(wanted)


def test_busy_replicas_that_keep_up_stay() -> None:
    """Nothing waits, and two of the three are needed all the same; none is added."""
    reports = [{BUSY: 0.5, RATE: 1000.0, **said("x", 10, 1)}] * 3
    assert TokenPolicy(1.0)(context(3, 3, *reports))[0] == pytest.approx(1.875)
    reports = [{BUSY: 1.0, RATE: 1000.0, **said("x", 10, 1)}] * 3
    assert TokenPolicy(1.0)(context(3, 3, *reports))[0] == pytest.approx(3.0)


def test_what_a_sender_told_several_replicas_counts_once() -> None:
    """And several senders add up."""
    first = {BUSY: 1.0, RATE: 1000.0, **said("x", 3000, 30), **said("y", 1000, 10)}
    second = {BUSY: 1.0, RATE: 1000.0, **said("x", 2900, 29)}
    assert TokenPolicy(1.0)(context(2, 2, first, second))[0] == pytest.approx(4.0)
    assert TokenPolicy(1.0, 20)(context(2, 2, first, second))[0] == pytest.approx(2.0)


def test_without_news_nothing_changes() -> None:
    """No replica, no measured speed yet, or only old reports; a replica that nobody has asked can go."""
    report = {BUSY: 0.0, RATE: 0.0, **said("x", 3000, 30)}
    assert TokenPolicy(1.0)(context(0, 2))[0] == 2
    assert TokenPolicy(1.0)(context(1, 2, report))[0] == 2
    assert TokenPolicy(1.0)(context(1, 1, {BUSY: 0.0, RATE: 0.0}))[0] == 0
    assert TokenPolicy(1.0)(context(1, 2, {**report, RATE: 5.0}, age=2 * FORGET_SECONDS))[0] == 2
