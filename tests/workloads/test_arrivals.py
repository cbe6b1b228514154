"""Think times and arrivals: the right shape, and the same for the same seed."""

from __future__ import annotations

import math
import statistics
from itertools import islice, pairwise
from statistics import fmean

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import (
    ThinkClass,
    ThinkTime,
    ThinkTimes,
    even_starts,
    parse_rates,
    poisson_arrivals,
    think_class,
)


def test_a_third_of_the_users_each() -> None:
    assert [think_class(user) for user in range(4)] == [
        ThinkClass.HOT,
        ThinkClass.WARM,
        ThinkClass.COLD,
        ThinkClass.HOT,
    ]


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
    assert fmean(gap**2 for gap in gaps) == pytest.approx(2 * 0.25**2, rel=0.15), (
        "the second moment of an exponential"
    )
    assert times == list(islice(poisson_arrivals(4.0, seed=1), 4000))
    assert times[0] != next(poisson_arrivals(4.0, seed=2))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_intervals_and_rates_out_of_range(value: float) -> None:
    with pytest.raises(ConfigError, match="request interval must be at least 0"):
        ThinkTimes(value)
    with pytest.raises(ConfigError, match="arrival rate must be positive"):
        poisson_arrivals(value)


def test_a_think_time_is_what_its_words_say() -> None:
    assert ThinkTime.parse("2.5") == ThinkTime(2.5) and ThinkTime.parse("exp:3") == ThinkTime(
        3.0, exponential=True
    )
    assert [str(ThinkTime.parse(text)) for text in ("0", "2.5", "exp:3")] == ["0", "2.5", "exp:3"]
    assert ThinkTime(2.5).draw_s(0, 1, 2) == 2.5


@pytest.mark.parametrize("text", ["", "fast", "-1", "exp:", "exp:-1", "norm:3", "nan", "exp:inf", "3:exp"])
def test_a_think_time_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="think time"):
        ThinkTime.parse(text)


def test_exponential_think_times_have_their_mean_and_shape() -> None:
    think = ThinkTime(3.0, exponential=True)
    times_s = [think.draw_s(7, conversation, turn) for conversation in range(200) for turn in range(20)]
    assert statistics.fmean(times_s) == pytest.approx(3.0, rel=0.05)
    assert statistics.stdev(times_s) == pytest.approx(3.0, rel=0.08)  # an exponential's deviation is its mean
    assert statistics.median(times_s) == pytest.approx(3.0 * math.log(2), rel=0.08)
    assert think.draw_s(7, 3, 4) == think.draw_s(7, 3, 4) != think.draw_s(8, 3, 4)


def test_starts_are_spread_evenly() -> None:
    assert even_starts(4, 2.0) == [0.0, 0.5, 1.0, 1.5]
    assert even_starts(3, 0.0) == [0.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="at least 0"):
        even_starts(3, -1.0)


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("2", (2.0,)),
        ("0.5,1,2", (0.5, 1.0, 2.0)),
        ("0.5:2:0.5", (0.5, 1.0, 1.5, 2.0)),
        ("0.1:1:0.3", (0.1, 0.4, 0.7, 1.0)),
        ("1:1:1", (1.0,)),
        ("1:3", (1.0, 2.0, 3.0)),
    ],
)
def test_rates_are_a_number_some_numbers_or_a_range(text: str, rates: tuple[float, ...]) -> None:
    assert parse_rates(text) == rates


@pytest.mark.parametrize(
    "text", ["", "fast", "0", "-1", "1,0", "2:1", "1:2:0", "2:1:1", "1:1e9:1", "nan", "1,,2", "0:1:0.5"]
)
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="rate"):
        parse_rates(text)
