"""What a worker's measured speed is made of."""

import pytest

from deployments.dispatch.meter import WINDOW_SECONDS, DrainMeter


def test_only_large_calls_tell_the_speed() -> None:
    """What small ones embed beside a large one counts, too; one that fails takes time and gives nothing."""
    meter = DrainMeter()
    meter.begin(0.0, False, 1)
    meter.done(10, 5.0, False, 1)
    assert meter.rate is None
    meter.begin(5.0, True, 1)
    meter.begin(5.0, False, 1)
    meter.done(100, 5.5, False, 1)
    meter.done(900, 6.0, True, 1)
    assert meter.rate == pytest.approx(1000)
    meter.begin(8.0, True, 1)
    meter.done(0, 9.0, True, 1)
    assert meter.rate == pytest.approx(500)


def test_every_replica_has_to_be_busy() -> None:
    """One large call doesn't tell what two replicas can do."""
    meter = DrainMeter()
    meter.begin(0.0, True, 2)
    meter.begin(1.0, True, 2)
    meter.done(500, 2.0, True, 2)
    meter.done(500, 3.0, True, 2)
    assert meter.rate == pytest.approx(500)


def test_the_speed_follows_within_the_window() -> None:
    """An old speed is forgotten."""
    meter, now = DrainMeter(), 0.0
    for speed in (1000, 100):
        for _ in range(5 * round(WINDOW_SECONDS)):
            meter.begin(now, True, 1)
            now += 1.0
            meter.done(speed, now, True, 1)
    assert meter.rate == pytest.approx(100, rel=0.2)


def test_calls_that_were_broken_off_are_no_measure() -> None:
    """Whoever leaves makes no replica slow."""
    meter = DrainMeter()
    meter.begin(0.0, large=True, replicas=1)
    meter.done(None, 1.0, large=True, replicas=1)
    assert meter.rate is None
    meter.begin(2.0, large=True, replicas=1)
    meter.done(100, 3.0, large=True, replicas=1)
    meter.begin(3.0, large=True, replicas=1)
    meter.done(None, 4.0, large=True, replicas=1)
    assert meter.rate == pytest.approx(100)
    # What another one embeds meanwhile takes the whole time.
    meter.begin(5.0, large=True, replicas=1)
    meter.begin(5.0, large=True, replicas=1)
    meter.done(None, 6.0, large=True, replicas=1)
    meter.done(300, 7.0, large=True, replicas=1)
    assert meter.rate == pytest.approx(400 / 3)


def test_where_all_have_failed_nothing_is_measured() -> None:
    """A rate of 0 would refuse whoever comes while somebody is served."""
    meter = DrainMeter()
    meter.begin(0.0, large=True, replicas=1)
    meter.done(0, 1.0, large=True, replicas=1)
    assert meter.rate is None
    meter.begin(2.0, large=True, replicas=1)
    meter.done(100, 3.0, large=True, replicas=1)
    assert meter.rate == pytest.approx(50)
