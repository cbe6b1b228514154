"""What the hazard policy learns from returns, and which chunks it evicts."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.chunk import Chunk
from pensieve.core.eviction import LRU, Hazard, PolicyFamily
from pensieve.core.eviction.habits import NUM_CONTEXTS, Habits
from pensieve.core.eviction.returns import (
    NUM_PERIODS,
    PRIOR,
    STARTS_S,
    WIDTHS_S,
    ReturnContext,
    ReturnTimes,
    period_of,
    saving_rates,
)
from pensieve.core.plan import SampledToken, StepResult
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.core.sequence import Sequence, Sharers, sequences_of
from policy_worlds import COST, TinyCache, policy_of


def test_periods_hold_every_idle_time() -> None:
    for period, start_s in enumerate(STARTS_S):
        assert period_of(start_s) == period
        assert period == 0 or period_of(start_s * 0.999) == period - 1
    assert period_of(1e12) == NUM_PERIODS - 1
    assert period_of(-1.0) == 0


def test_with_nothing_learned_the_rate_falls_as_the_papers_does() -> None:
    times = ReturnTimes()
    assert times.chances(times.contexts(Habits().went_idle(5.0, 4, 60))) == pytest.approx(list(PRIOR))
    for start_s, rate in list(zip(STARTS_S, saving_rates(PRIOR), strict=True))[1:-2]:
        assert 0.2 < rate * start_s < 0.5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 0.99), min_size=NUM_PERIODS, max_size=NUM_PERIODS))
def test_saving_rates_are_the_best_ratio(chances: list[float]) -> None:
    rates = saving_rates(chances)
    widths = [*(stop - start for start, stop in itertools.pairwise(STARTS_S)), STARTS_S[-1]]
    assert list(WIDTHS_S) == widths
    for start in range(NUM_PERIODS):
        best = 0.0
        for stop in range(start + 1, NUM_PERIODS + 1):  # hold on until the end of period stop - 1
            alive, back, held_s = 1.0, 0.0, 0.0
            for k in range(start, stop):
                held_s += alive * (1.0 - chances[k] / 2.0) * widths[k]
                back += alive * chances[k]
                alive *= 1.0 - chances[k]
            best = max(best, back / held_s)
        assert rates[start] == pytest.approx(best)


def test_who_never_comes_back_at_once_is_worth_more_a_while_later() -> None:
    chances = [0.001] * NUM_PERIODS
    chances[period_of(70.0)] = 0.9
    rates = saving_rates(chances)
    assert rates[period_of(50.0)] > 2.0 * rates[period_of(4.0)]


def test_a_period_that_few_have_reached_is_like_the_one_before() -> None:
    """No conversation returned within half a minute, and none was seen idle for an hour: long periods must not look better."""
    times = ReturnTimes()
    for number in range(500):
        contexts = times.contexts(Habits().went_idle(5.0, 4, number))
        for period in range(period_of(30.0)):
            times.learn(contexts, period, returned=False)
    chances = times.chances(times.contexts([]))
    assert all(chance < 0.1 * prior for chance, prior in zip(chances[:20], PRIOR[:20], strict=True))
    assert saving_rates(chances)[period_of(30.0)] < 3.0 * saving_rates(chances)[0]
    for _ in range(500):
        times.learn([], period_of(3000.0), returned=True)
    chances = times.chances([])
    assert chances[period_of(3000.0)] > 0.9 and chances[period_of(30.0)] < 0.1 * PRIOR[period_of(30.0)]
    assert chances[period_of(10_000.0)] > 0.9, "as far as was observed"


def test_contexts_trust_those_that_tell_and_not_those_that_do_not() -> None:
    """Of two kinds of context one says all, the other nothing."""
    times, rng = ReturnTimes(), random.Random(0)
    for _ in range(4000):
        told, idle = rng.randrange(2), rng.randrange(50)
        times.learn(times.contexts([(0, told), (1, idle)]), 3, returned=rng.random() < (0.9 if told else 0.1))
    for told, chance in ((0, 0.1), (1, 0.9)):
        for idle in range(5):
            assert times.chances(times.contexts([(0, told), (1, idle)]))[3] == pytest.approx(chance, abs=0.05)


def test_no_chance_is_ever_nothing_or_certain() -> None:
    times = ReturnTimes()
    for number in range(60_000):
        told = number % 2
        times.learn(times.contexts([(kind, told) for kind in range(NUM_CONTEXTS)]), 3, returned=bool(told))
    for told in range(2):
        chances = times.chances(times.contexts([(kind, told) for kind in range(NUM_CONTEXTS)]))
        assert 0.0 < chances[3] < 1.0 and (chances[3] > 0.99) == bool(told)
        assert min(saving_rates(chances)) > 0.0
    times._trust = [[9.0] * 8 for _ in range(NUM_CONTEXTS)]
    for told in range(2):
        assert 0.0 < times.chances(times.contexts([(kind, told) for kind in range(NUM_CONTEXTS)]))[3] < 1.0


def test_counts_of_a_context_that_changes_are_forgotten() -> None:
    times = ReturnTimes()
    for returned in (True, False):
        for _ in range(3000):
            times.learn(times.contexts([(0, 1)]), 2, returned)
    context: ReturnContext = times.contexts([(0, 1)])[0]
    assert context.seen[2] <= 1000.0 and context.back[2] < 0.1 * context.seen[2]
    assert times.chances([context])[2] < 0.1


def test_who_does_not_come_back_counts_for_as_long_as_it_was_waited_for() -> None:
    family = Hazard(COST.of_chunk)
    for number in range(300):
        sequence = Sequence(("n", f"{number}"), 0.0)
        family.came_back(sequence, 1000.0 * number)
        family.went_idle(sequence, 1000.0 * number, 0)
        if number % 4 == 0:
            family.came_back(
                sequence, 1000.0 * number + 20.0
            )  # of four, one comes back, after 20 s; then it stays idle, too
            family.went_idle(sequence, 1000.0 * number + 20.0, 0)
    chances = family.times.chances(family.times.contexts(Habits().went_idle(0.0, 0, 0)))
    twenty, two_hundred = period_of(20.0), period_of(200.0)
    assert 0.12 < chances[twenty] < 0.4
    assert max(chances[:twenty]) < 0.1 and max(chances[twenty + 1 : two_hundred]) < 0.1, (
        "no conversation came back sooner or later"
    )
    assert chances[-1] < 0.1 < PRIOR[-1], "and those of the first day were waited for that long"


def test_gaps_of_its_own_tell_the_quick_from_the_slow() -> None:
    """Quick users come back after 5 s, or are gone for good after 10 turns; slow ones come back after 10 minutes."""
    times = ReturnTimes()
    rng = random.Random(0)
    for _ in range(150):
        for gap_s in (5.0, 600.0):
            habits = Habits()
            for turn in range(10):
                contexts = times.contexts(habits.went_idle(1.0, 4, 0))
                gap = gap_s * rng.uniform(0.8, 1.25)
                last = period_of(gap) if turn < 9 else NUM_PERIODS
                for period in range(last):
                    times.learn(contexts, period, returned=False)
                if last < NUM_PERIODS:
                    times.learn(contexts, last, returned=True)
                habits.came_back(gap)
    family = Hazard(COST.of_chunk, times)
    world = TinyCache(family, 9)
    for turn in range(6):
        world.turn("quick", 4, 3000.0 + 6.0 * turn, 3001.0 + 6.0 * turn)
        world.turn("slow", 4, 601.0 * turn, 601.0 * turn + 1.0) if turn < 5 else None
    world.turn("slow", 4, 3005.0, 3032.0)
    world.turn("new", 3, 3100.0)  # both were active 69 s ago: the one that returns after 5 s will not return
    assert (world.places("quick"), world.places("slow")) == ("..gg", "gggg")
    paper = TinyCache(policy_of("retention"), 9)
    paper.turn("slow", 4, 3031.0)
    paper.turn("quick", 4, 3032.0)
    paper.turn("new", 3, 3100.0)
    assert (paper.places("quick"), paper.places("slow")) == (".ggg", ".ggg"), "V sees no difference"


def test_the_length_of_an_answer_tells_a_tools_call_from_words_to_read() -> None:
    """Everybody's answers of 60 tokens are followed after 4 s, those of 800 after an hour; gaps and turns say nothing."""
    family = Hazard(COST.of_chunk)
    rng = random.Random(0)
    for number in range(400):
        sequence = Sequence(("n", f"{number}"), 0.0)
        calls = rng.random() < 0.5
        begun_s = 10_000.0 * number
        family.came_back(sequence, begun_s)
        family.went_idle(sequence, begun_s + 5.0, 60 if calls else 800)
        family.came_back(sequence, begun_s + (9.0 if calls else 3605.0))
    call, words = (
        family.times.chances(family.times.contexts(Habits().went_idle(5.0, 0, answered)))
        for answered in (60, 800)
    )
    assert call[period_of(4.0)] > 0.5 > 0.1 > words[period_of(4.0)]


def test_a_policy_hears_how_long_an_answer_was() -> None:
    heard: list[int] = []

    class Listening(PolicyFamily):
        def went_idle(self, sequence: Sequence, now_s: float, num_answered: int) -> None:
            heard.append(num_answered)

    cache = TieredCache(CacheConfig((TierConfig("gpu", 64),), 32), Listening(LRU))
    scheduler = Scheduler(SchedulerConfig(), cache, 4096)
    scheduler.submit("r", "n", "s", (1, 2, 3), 0, SamplingParams(max_new_tokens=7), 0.0)
    step = 0
    while scheduler.requests:
        plan = scheduler.schedule(float(step))
        tokens = tuple(SampledToken(span.request_id, 5) for span in plan.spans if span.emits_token)
        scheduler.commit(plan, StepResult(plan.step_id, tokens), float(step))
        step += 1
    assert heard == [7]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32))
def test_the_worst_is_what_brute_force_finds(seed: int) -> None:
    rng = random.Random(seed)
    family = Hazard(COST.of_chunk)
    policy = family()
    present: list[Chunk] = []
    now_s = rng.choice([0.0, 1e6])
    for number in range(rng.randint(1, 80)):
        now_s += rng.choice([0.0, 1e-4, 0.3, 60.0, 5000.0, 2e5])
        action = rng.random()
        if action < 0.6 or not present:
            members = {Sequence(("n", f"{number}.{k}"), now_s) for k in range(rng.choice([1, 1, 1, 2, 5]))}
            for sequence in members:
                family.came_back(sequence, now_s)
                family.went_idle(sequence, now_s + rng.choice([0.0, 3.0]), rng.choice([0, 50, 2000]))
                sequence.last_active_s = now_s - rng.choice([0.0, 1.0, 77.0, 1e6])
                sequence.num_active = int(rng.random() < 0.1)
            chunk = Chunk(
                rng.choice([0, 1, 2, 5, 15]),
                1,
                Sharers(members) if len(members) > 1 else next(iter(members)),
                None,
            )
            policy.add(chunk)
            present.append(chunk)
        elif action < 0.7:
            policy.remove(present.pop(rng.randrange(len(present))))
        else:
            victim = policy.worst(now_s)
            assert victim in present
            lowest = min(by_formula(family, chunk, now_s) for chunk in present)
            assert by_formula(family, victim, now_s) == pytest.approx(lowest, rel=1e-6)
            assert policy.worth(victim, now_s) == pytest.approx(lowest, rel=1e-6)
            policy.remove(victim)
            present.remove(victim)


def by_formula(family: Hazard, chunk: Chunk, now_s: float) -> float:
    """n * Cost * r, with 1 / r interpolated between the starts of periods."""
    num_members = len(sequences_of(chunk))
    if chunk.owner.num_active:
        return num_members * COST.of_chunk(chunk.index) / 1e-6
    idle_s = max(0.0, now_s - chunk.owner.last_active_s)
    curve = (*family.curve_of(chunk), 2.0 * family.curve_of(chunk)[-1])
    starts = (*STARTS_S, 2.0 * STARTS_S[-1])
    period = max(k for k in range(NUM_PERIODS) if starts[k] <= idle_s)
    share = (idle_s - starts[period]) / (starts[period + 1] - starts[period])
    return (
        num_members
        * COST.of_chunk(chunk.index)
        / (curve[period] + share * (curve[period + 1] - curve[period]))
    )


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pensieve.core.eviction.hazard.MAX_KNOWN", 10)
    family = Hazard(COST.of_chunk)
    for number in range(50):
        sequence = Sequence(("n", f"{number}"), 0.0)
        family.came_back(sequence, float(number))
        family.went_idle(sequence, float(number), 0)
    assert len(family._known) == 10


def test_contexts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pensieve.core.eviction.returns.MAX_CONTEXTS", 3)
    times = ReturnTimes()
    first = times.contexts([(0, 0)])[0]
    times.contexts([(0, 1), (0, 2), (0, 0), (0, 3)])
    assert list(times._contexts) == [(0, 2), (0, 0), (0, 3)], "the one met longest ago has gone"
    assert times.contexts([(0, 0)]) == [first]


def test_every_context_has_a_kind_of_its_own() -> None:
    habits = Habits()
    for gap_s in (0.0, 3.0, 40.0, 500.0, 4000.0, 1e6, 2.0):
        assert [key[0] for key in habits.went_idle(2.0, 3, 100)] == list(range(NUM_CONTEXTS))
        habits.came_back(gap_s)
