"""Victims against brute force, and what the paper says of them."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pensieve.config import ModelShape
from pensieve.core.chunk import Chunk
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import LRU, MIN_IDLE_S, KineticTournament, RetentionValue
from pensieve.core.sequence import Sequence
from pensieve.errors import ConfigError

COST = CostProfile([(32, 1.0), (64, 1.1), (4096, 5.0), (16384, 30.0)])


def idle_chunk(index: int, last_active_s: float, *, active: bool = False) -> Chunk:
    sequence = Sequence(("n", f"c{index}-{last_active_s}"), last_active_s)
    sequence.num_active = int(active)
    return Chunk(index, 2, sequence, None)


def retention_value(chunk: Chunk, now_s: float) -> float:
    """The paper's formula, spelled out."""
    idle_s = 0.0 if chunk.owner.num_active else now_s - chunk.owner.last_active_s
    return COST.of_chunk(chunk.index) / (idle_s + MIN_IDLE_S)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32))
def test_retention_value_finds_what_brute_force_finds(seed: int) -> None:
    rng = random.Random(seed)
    policy = RetentionValue(COST.of_chunk)
    present: list[Chunk] = []
    now_s = rng.choice([0.0, 1e6])
    for _ in range(rng.randint(1, 150)):
        now_s += rng.choice([0.0, 1e-4, 0.3, 60.0, 5000.0])
        action = rng.random()
        if action < 0.6 or not present:
            age_s = rng.choice([0.0, 0.001, 1.0, 77.0, 3600.0])
            chunk = idle_chunk(rng.choice([0, 1, 2, 5, 60, 500]), now_s - age_s, active=rng.random() < 0.1)
            policy.add(chunk)
            present.append(chunk)
        elif action < 0.7:
            policy.remove(present.pop(rng.randrange(len(present))))
        else:
            victim = policy.worst(now_s)
            assert victim in present
            lowest = min(retention_value(chunk, now_s) for chunk in present)
            assert retention_value(victim, now_s) == pytest.approx(lowest, rel=1e-6)
            assert policy.worth(victim, now_s) == pytest.approx(lowest, rel=1e-6)
            if rng.random() < 0.7:
                policy.remove(victim)
                present.remove(victim)
    while present:
        victim = policy.worst(now_s)
        assert victim is not None
        policy.remove(victim)
        present.remove(victim)
    assert policy.worst(now_s) is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(-1e4, 1e4)), min_size=1, max_size=40),
    st.lists(st.floats(0, 1e5), min_size=1, max_size=20),
)
def test_the_tournament_finds_the_highest_line_at_every_later_time(
    lines: list[tuple[float, float]], times: list[float]
) -> None:
    tournament = KineticTournament()
    for leaf, (slope, offset) in enumerate(lines):
        tournament.set(leaf, slope, offset)
    for now_s in sorted(times):
        winner = tournament.highest(now_s)
        assert winner is not None
        heights = [slope * now_s + offset for slope, offset in lines]
        assert heights[winner] == pytest.approx(max(heights), rel=1e-9, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 20),
            st.floats(0, 10),
            st.floats(-1e4, 1e4) | st.just(-math.inf),
            st.sampled_from([0.0, 0.0, 1.0, 1e3]),
        )
    )
)
def test_the_tournament_follows_lines_that_change_between_questions(
    changes: list[tuple[int, float, float, float]],
) -> None:
    tournament = KineticTournament()
    lines: dict[int, tuple[float, float]] = {}
    now_s = 0.0
    for leaf, slope, offset, passed_s in changes:
        tournament.set(leaf, slope, offset)
        lines[leaf] = slope, offset
        if not passed_s:
            continue  # several are set before the next question
        now_s += passed_s
        heights = {at: slope * now_s + offset for at, (slope, offset) in lines.items() if offset > -math.inf}
        winner = tournament.highest(now_s)
        assert (winner is None) == (not heights)
        if winner is not None:
            assert heights[winner] == pytest.approx(max(heights.values()), rel=1e-9, abs=1e-6)


def test_the_leading_chunk_goes_first_at_equal_idle_time() -> None:
    policy = RetentionValue(COST.of_chunk)
    chunks = [idle_chunk(index, 0.0) for index in (7, 3, 500, 5)]
    for chunk in chunks:
        policy.add(chunk)
    assert policy.worst(10.0) is chunks[1]


def test_a_long_context_outlives_a_short_one_that_is_somewhat_fresher() -> None:
    policy = RetentionValue(COST.of_chunk)
    short, long = idle_chunk(0, 60.0), idle_chunk(500, 0.0)  # costs 1.0 and about 29
    policy.add(short)
    policy.add(long)
    assert policy.worst(100.0) is short  # 1/40 s < 29/100 s
    assert LRU().worst(100.0) is None
    lru = LRU()
    lru.add(short)
    lru.add(long)
    assert lru.worst(100.0) is long


def test_active_conversations_go_last_under_both_policies() -> None:
    for policy in (RetentionValue(COST.of_chunk), LRU()):
        waiting, idle = idle_chunk(0, 0.0, active=True), idle_chunk(500, 99.9)
        policy.add(waiting)
        policy.add(idle)
        assert policy.worst(100.0) is idle


def test_cost_is_interpolated_and_monotone() -> None:
    noisy = CostProfile([(64, 2.0), (32, 1.0), (128, 1.5), (256, 4.0)])
    assert noisy.at(48) == 1.5
    assert noisy.at(128) == 2.0  # the dip is noise
    assert noisy.at(192) == 3.0
    assert noisy.at(512) == 8.0  # along the last segment
    costs = [noisy.of_chunk(index) for index in range(40)]
    assert costs == sorted(costs)


def test_a_cost_profile_refuses_what_cannot_be_a_measurement() -> None:
    for points in ([], [(0, 1.0)], [(32, 0.0)], [(32, float("nan"))]):
        with pytest.raises(ConfigError):
            CostProfile(points)


def test_the_cost_from_arithmetic_grows_with_context() -> None:
    shape = ModelShape(30, 576, 9, 3, 64, 1536, 49152, 8192)
    profile = CostProfile.from_shape(shape)
    assert profile.at(32) < profile.at(1024) < profile.at(16384)
