"""What goes first where there are fewer cores than threads that want one."""

import os
import threading
from collections.abc import Callable

import pytest

from deployments.priority import ENGINE_STEPS, LEAST_NICENESS, behind_requests, in_background


def seen_from(lower: Callable[[], None]) -> list[tuple[int, int]]:
    """Lower a thread; return policy and niceness of it and of one that it starts."""
    seen: list[tuple[int, int]] = []

    def look() -> None:
        thread = threading.get_native_id()
        seen.append((os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)))

    def run() -> None:
        lower()
        look()
        child = threading.Thread(target=look)
        child.start()
        child.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return seen


def test_an_engines_threads_come_behind_requests() -> None:
    """Those that it starts too, which compute; the thread that asks for it alone."""
    here = os.getpriority(os.PRIO_PROCESS, 0)
    lowered = min(here + ENGINE_STEPS, LEAST_NICENESS)
    assert seen_from(behind_requests) == [(os.SCHED_OTHER, lowered)] * 2
    assert os.getpriority(os.PRIO_PROCESS, 0) == here


def test_bulk_work_has_what_others_leave() -> None:
    """All of its threads, and no others."""
    assert [policy for policy, _ in seen_from(in_background)] == [os.SCHED_IDLE] * 2
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("lower", [behind_requests, in_background])
def test_a_sandbox_may_refuse_it(lower: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all run as they did."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert seen_from(lower) == [(os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0))] * 2
