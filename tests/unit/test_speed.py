"""An engine's speed is that of its large steps, whatever it was asked for last."""

import pytest

from deployments.engine.speed import EngineSpeed

STEP, TOKEN = 0.003, 0.00003


def ask(speed: EngineSpeed, now: float, sizes: list[int], slow: float = 1.0) -> float:
    """Record calls that come at once and are embedded one after the other; return when the last one ends."""
    begun = now
    for size in sizes:
        now += slow * (STEP + size * TOKEN)
        speed.record(size, begun, now)
    return now


def true_speed(size: int) -> float:
    """Tokens per second of steps of one size."""
    return size / (STEP + size * TOKEN)


def test_nothing_is_known_at_first() -> None:
    """One step says nothing yet: another call may still belong to it."""
    speed = EngineSpeed()
    speed.record(100, 0.0, 1.0)
    assert speed.best == 0.0


def test_a_call_isnt_charged_for_those_before_it() -> None:
    """Ten calls at once are as fast as one after the other."""
    speed = EngineSpeed()
    ask(speed, 0.0, [1280] * 10)
    assert speed.best == pytest.approx(true_speed(1280))


def test_calls_of_one_step_are_one() -> None:
    """They end together."""
    speed = EngineSpeed()
    for tokens, ended in ((100, 1.0), (300, 1.0001), (100, 3.0), (1, 4.0)):
        speed.record(tokens, 0.0, ended)
    assert speed.best == pytest.approx(400.0)


def test_small_calls_dont_change_what_is_known_of_large_ones() -> None:
    """Nor do slow ones, as long as they are few."""
    speed = EngineSpeed()
    now = ask(speed, 0.0, [2000] * 15)
    now = ask(speed, now + 1.0, [20] * 500)
    now = ask(speed, now + 1.0, [160] * 100, slow=3.0)
    ask(speed, now + 1.0, [2000] * 5, slow=5.0)
    assert speed.best == pytest.approx(true_speed(2000))


def test_an_engine_that_gets_slower_is_known_to_be_slower() -> None:
    """After as many steps as are remembered."""
    speed = EngineSpeed()
    now = ask(speed, 0.0, [2000] * 15)
    ask(speed, now, [2000] * 16, slow=2.0)
    assert speed.best == pytest.approx(true_speed(2000) / 2)
