"""Think times and arrivals: the right shape, and the same for the same seed."""

from __future__ import annotations

from itertools import islice, pairwise
from statistics import fmean

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkClass, ThinkTimes, poisson_arrivals, think_class


def test_a_third_of_the_users_each() -> None:
    assert [think_class(user) for user in range(4)] == [ThinkClass.HOT, ThinkClass.WARM, ThinkClass.COLD, ThinkClass.HOT]


def test_think_times_without_jitter_are_the_class_times() -> None:
    think = ThinkTimes(2.0)
    assert [think.think_s(user, 5) for user in range(3)] == pytest.approx([0.6, 2.0, 5.0])


def test_jittered_think_times_keep_their_mean_and_do_not_depend_on_the_order_of_asking() -> None:
    think = ThinkTimes(2.0, jitter=True, seed=3)
    forward = [think.think_s(1, turn) for turn in range(4000)]
    backward = [think.think_s(1, turn) for turn in reversed(range(4000))]
    assert forward == backward[::-1]
    assert fmean(forward) == pytest.approx(2.0, rel=0.1)
    assert forward[0] != ThinkTimes(2.0, jitter=True, seed=4).think_s(1, 0)


def test_poisson_arrivals() -> None:
    times = list(islice(poisson_arrivals(4.0, seed=1), 4000))
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) > 0
    assert fmean(gaps) == pytest.approx(0.25, rel=0.1)
    assert fmean(gap**2 for gap in gaps) == pytest.approx(2 * 0.25**2, rel=0.15), "the second moment of an exponential"
    assert times == list(islice(poisson_arrivals(4.0, seed=1), 4000))
    assert times[0] != next(poisson_arrivals(4.0, seed=2))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_intervals_and_rates_out_of_range(value: float) -> None:
    with pytest.raises(ConfigError, match="request interval must be at least 0"):
        ThinkTimes(value)
    with pytest.raises(ConfigError, match="arrival rate must be positive"):
        poisson_arrivals(value)
