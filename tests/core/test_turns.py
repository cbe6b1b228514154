"""Requests get their turn: short turns beside long prompts, tenants beside each other, steps that have a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pensieve.config import SchedulerConfig
from pensieve.core.cost import CostProfile
from pensieve.core.pace import LEAST_PREFILL, Load, Pace, StepTime
from pensieve.core.plan import Span
from pensieve.core.request import Request, RequestState
from pensieve.core.waiting import MAX_OVERTAKINGS
from pensieve.errors import ConfigError
from worlds import CHUNK, TimedWorld, World

STEP_S = 0.1


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(position * 31 + seed * 7919) % 50 for position in range(length)]


def first_token_s(world: World, request: Request) -> float:
    while request.receipt.first_token_s is None:
        world.step()
    return request.receipt.first_token_s


def admitted_s(request: Request) -> float:
    assert request.started
    return request.submitted_s + request.receipt.queue_s


# --- a short turn beside a long prompt ------------------------------------------------------------------------------


def test_a_short_turn_does_not_wait_for_a_backlog_of_tokens() -> None:
    world = World(9000, max_context=20_000, max_batch_tokens=64)
    world.submit("long", prompt(16_000))
    world.step()
    world.submit("short", [5, 6, 7])
    assert world.step().spans[0].request_id == "short"


def test_of_a_long_backlog_only_what_is_computed_before_it_holds_a_request_up() -> None:
    world = World(9000, max_context=20_000, max_batch_tokens=64, max_running=32)
    for index in range(12):
        world.submit(f"middle {index}", prompt(150, index))
    world.submit("long", prompt(9000, 99))
    world.step()
    running = {request.request_id for request in world.scheduler.running}
    assert running == {f"middle {index}" for index in range(4)}, (
        "eight steps' worth: the rest need not hold their slots yet"
    )
    world.submit("chat", [5, 6, 7])
    assert world.step().spans[0].request_id == "chat"
    world.run()
    order = list(world.done)
    assert (order[0], order[-1]) == ("chat", "long")


def test_a_dropped_history_counts_as_work() -> None:
    world = World(3000, max_context=20_000, max_batch_tokens=16)
    log = world.turn("old", prompt(200), 1).tokens
    world.drop("old", *range(50))
    for index in range(3):
        world.submit(f"other {index}", prompt(100, index + 1))
    world.step()
    again = world.submit("again", [*log, 3], conversation="old", history=len(log))
    assert again.work == 1, "the cache was not looked at yet"
    world.step()
    assert again.work == 202 and again.state is RequestState.WAITING
    world.run()


@pytest.mark.parametrize("slowness", [1.0, 8.0])
def test_a_short_turns_first_token_takes_a_step_or_two_whatever_is_being_computed(slowness: float) -> None:
    world = TimedWorld(12_000, step_s=STEP_S * slowness, slowness=slowness)
    history = world.submit("chat", prompt(400), 1)
    world.run()
    long = world.submit("long", prompt(20_000, 1), 2)
    for _ in range(8):
        world.step()
    waits = []
    log = history.tokens
    for turn in range(12):
        request = world.submit(
            f"turn {turn}", [*log, *prompt(60, turn + 2)], 3, conversation="chat", history=len(log)
        )
        waits.append(first_token_s(world, request))
        while request.state is not RequestState.FINISHED:
            world.step()
        log = request.tokens
        for _ in range(turn % 3):
            world.step()
    assert long.state is RequestState.RUNNING, "all of it beside the long one"
    assert max(waits) <= 3 * STEP_S * slowness


def test_two_long_prompts_and_a_flood_of_short_ones_all_end() -> None:
    world = TimedWorld(30_000, max_running=16)
    longs = [world.submit(f"long {index}", prompt(12_000, index), 2) for index in range(2)]
    waits, count = [], 0
    while any(request.state is not RequestState.FINISHED for request in longs):
        short = world.submit(f"short {count}", prompt(300, count + 5), 1)
        waits.append(first_token_s(world, short))
        count += 1
        assert count < 2000, f"the long ones starve: {[request.num_missing for request in longs]}"
    assert count > 20
    assert sorted(waits)[len(waits) * 9 // 10] <= 4 * STEP_S


# --- a step has a time ----------------------------------------------------------------------------------------------


def beside(
    decoding: Callable[[TimedWorld], Request], long_tokens: int, **config: Any
) -> tuple[float, float, TimedWorld]:
    """Seconds a token of a request that decodes while a long prompt is computed, and seconds of that prompt."""
    world = TimedWorld(14_000, **config)
    request = decoding(world)
    while request.receipt.first_token_s is None:
        world.step()
    long = world.submit("long", prompt(long_tokens, 1), 1)
    begin_s, begin_tokens = world.now_s, request.num_output
    while long.receipt.first_token_s is None:
        world.step()
    return (world.now_s - begin_s) / (request.num_output - begin_tokens), world.now_s - begin_s, world


def alone_s(long_tokens: int, **config: Any) -> float:
    world = TimedWorld(14_000, **config)
    world.submit("warm", prompt(600, 3), 1)
    world.run()
    return first_token_s(world, world.submit("long", prompt(long_tokens, 1), 1))


@pytest.mark.parametrize("step_s", [0.05, 0.1, 0.2, 0.4])
def test_a_request_decodes_a_token_a_step_time_beside_a_prefill(step_s: float) -> None:
    per_token_s, prefill_s, _ = beside(
        lambda world: world.submit("chat", prompt(100), 2000), 20_000, step_s=step_s
    )
    assert per_token_s <= 1.15 * step_s
    assert prefill_s <= 1.6 * alone_s(20_000, step_s=step_s)


def test_where_a_chunk_takes_longer_than_a_step_decodes_go_between() -> None:
    world = TimedWorld(14_000, step_s=0.03)
    world.TOKEN_S = 0.01  # a chunk takes 0.04 s, a decode 0.015
    chat = world.submit("chat", prompt(100), 2000)
    while chat.num_output < 5:
        world.step()
    world.submit("long", prompt(20_000, 1), 1)
    for _ in range(30):
        world.step()
    begin_s, kinds = world.now_s, ""
    for _ in range(60):
        kinds += {1: "d", 2: "p"}[len(world.step().spans)]
    assert "pp" not in kinds and "dddd" not in kinds, kinds
    assert (world.now_s - begin_s) / 60 == pytest.approx(0.03, rel=0.1)


def test_spans_are_still_cut_at_chunk_boundaries() -> None:
    world = TimedWorld(14_000)
    world.submit("chat", prompt(100), 500)
    world.submit("long", prompt(9_001, 1), 1)
    for _ in range(100):
        for span in world.step().spans:
            if span.request_id == "long":
                assert span.start % CHUNK == 0 and (span.stop % CHUNK == 0 or span.stop == 9_001)


def test_while_nothing_decodes_steps_are_as_large_as_tokens_allow() -> None:
    world = TimedWorld(14_000, step_s=10.0)
    world.submit("long", prompt(9_001, 1), 1)
    assert [sum(span.stop - span.start for span in world.step().spans) for _ in range(10)] == [512] * 10


def test_a_pace_is_needed_for_steps_with_a_time() -> None:
    world = World(8)
    with pytest.raises(ConfigError, match="takes a pace"):
        type(world.scheduler)(
            SchedulerConfig(max_batch_tokens=64, max_running=8, step_s=0.1), world.cache, 100
        )
    with pytest.raises(ConfigError, match=r"step_s must be positive, got 0"):
        SchedulerConfig(step_s=0.0)
    with pytest.raises(ConfigError, match="admission must be 'work' or 'fcfs', got 'lifo'"):
        SchedulerConfig(admission="lifo")  # type: ignore[arg-type]


# --- what steps take ------------------------------------------------------------------------------------------------


def loads(rng: random.Random) -> Load:
    """A step as a server has them: some decodes, a piece of a prompt, or both."""
    start = rng.randrange(0, 20_000)
    positions = [rng.randrange(1, 8000) for _ in range(rng.choice([0, 1, 4, 16]))]
    decodes = [Span(str(position), position, position + 1, None, True) for position in positions]
    length = rng.choice([0, 32, 128, 512]) if decodes else rng.choice([32, 128, 512])
    prefill = [Span("p", start, start + length, None, False)] if length else []
    return Load.of([*decodes, *prefill])


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    token_s=st.floats(1e-5, 2e-2),
    ratios=st.tuples(
        st.floats(1.0, 200.0), st.floats(0.1, 10.0), st.floats(1.0, 30.0), st.floats(1e-6, 1e-3)
    ),
    noise=st.sampled_from([0.0, 0.1]),
)
def test_a_pace_comes_near_any_machine(
    seed: int, token_s: float, ratios: tuple[float, float, float, float], noise: float
) -> None:
    rng = random.Random(seed)
    fixed, row, read, pair = ratios

    def truth(load: Load) -> float:
        return token_s * (
            fixed + row * load.rows + read * pair * load.reads + load.tokens + pair * load.pairs
        )

    pace = Pace(CostProfile([(32, 1.0), (16_384, 3.0)], 32))
    for _ in range(300):
        load = loads(rng)
        pace.observe(load, truth(load) * (1.0 + rng.uniform(-noise, noise)))
    errors = sorted(abs(pace.seconds(load) / truth(load) - 1.0) for load in (loads(rng) for _ in range(200)))
    assert errors[100] < 0.25 + noise, errors[100]
    assert errors[180] < 0.8 + noise, errors[180]


def test_a_step_that_a_neighbour_slowed_down_does_not_become_the_rule() -> None:
    pace = Pace(CostProfile([(32, 1.0)], 32))
    load = Load(1, 100, 0, 0)
    for _ in range(20):
        pace.observe(load, 0.01)
    pace.observe(load, 1.0)
    assert pace.seconds(load) < 0.015


def test_a_day_of_decoding_forgets_no_prefill() -> None:
    pace = Pace(CostProfile([(32, 1.0), (16_384, 3.0)], 32))
    steps = [
        (Load(0, 0, 512, 512 * 300), 0.15),
        (Load(1, 500, 64, 6400), 0.03),
        (Load(1, 500, 0, 0), 0.01),
        (Load(0, 0, 64, 64 * 9000), 0.05),
    ]
    for load, seconds in steps * 30:
        pace.observe(load, seconds)
    before = pace.seconds(steps[0][0])
    for _ in range(50_000):
        pace.observe(Load(1, 500, 0, 0), 0.01)
    assert pace.seconds(steps[0][0]) == pytest.approx(before, rel=0.1)
    pace.observe(*steps[0])
    assert pace.seconds(steps[0][0]) == pytest.approx(0.15, rel=0.2)


def test_tokens_within_is_the_inverse_of_prefill_s() -> None:
    pace = Pace(CostProfile([(32, 0.032), (16_384, 0.5)], 32), measured=True)
    for start in (0, 500, 20_000):
        for seconds in (0.01, 0.1, 5.0):
            count = pace.tokens_within(seconds, start)
            assert pace.prefill_s([(start, start + count)]) <= seconds * 1.01 + 1e-9
            assert pace.prefill_s([(start, start + count + 2)]) >= seconds * 0.99


def test_a_slow_decode_leaves_prefill_half_of_the_time() -> None:
    """Decodes slower than a step has time for would otherwise never let a prefill begin."""
    pace = Pace(CostProfile([(32, 0.032)], 32), measured=True)
    time, decodes = StepTime(0.001, pace), Load(4, 4000, 0, 0)
    chunk_s, computed_s, decoded_s = 3.5 * pace.seconds(decodes), 0.0, 0.0
    for _ in range(200):
        decoded_s += pace.seconds(decodes)
        if time.for_prefill(decodes) > 0.0:
            time.spend(chunk_s)
            computed_s += chunk_s
    assert computed_s == pytest.approx(LEAST_PREFILL * decoded_s, rel=0.05)


# --- overtaking is bounded ------------------------------------------------------------------------------------------


def test_a_request_that_does_not_fit_is_overtaken_a_bounded_number_of_times() -> None:
    world = World(200, 0, max_running=4, max_context=1000)
    world.submit("running", prompt(100), answer=300)
    world.step()
    large = world.submit("large", prompt(700, 1))  # 175 of the 200 slots
    overtook = 0
    while large.state is RequestState.WAITING and "running" not in world.done:
        small = world.submit(f"small {overtook}", prompt(3, overtook + 2))
        world.step()
        if small.state is RequestState.WAITING:
            break
        overtook += 1
        while small.state is not RequestState.FINISHED:
            world.step()
    assert overtook == MAX_OVERTAKINGS == large.num_overtaken
    world.scheduler.abort("running", world.now_s)
    world.run()
    assert admitted_s(large) <= admitted_s(small), "slots that came free were held for it"


def test_a_suspended_request_is_not_overtaken() -> None:
    world = World(20, 20, max_running=4, reserve_share=0.0)
    first, second = world.submit("first", prompt(24), 50), world.submit("second", prompt(24, 1), 50)
    while second.state is not RequestState.SUSPENDED:
        world.step()
    small = world.submit("small", [3])
    world.run()
    assert second.receipt.suspensions and second.num_overtaken == 0 and first.num_output == 50
    assert small.started and first.receipt.first_token_s is not None
    assert next(iter(world.done)) == "first"


def test_first_come_first_served_overtakes_no_request() -> None:
    world = World(20, 0, max_running=4, admission="fcfs")
    world.submit("running", prompt(40), answer=30)
    world.step()
    large, small = world.submit("large", prompt(61, 1)), world.submit("small", [3])
    world.step()
    assert world.scheduler.num_waiting == 2
    world.run()
    assert admitted_s(large) <= admitted_s(small)
    assert large.num_overtaken == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), slots=st.integers(10, 40), timed=st.booleans())
def test_everything_ends_under_a_stream_that_never_stops(seed: int, slots: int, timed: bool) -> None:
    rng = random.Random(seed)
    world = (
        TimedWorld(slots, max_running=4, max_batch_tokens=16, max_context=400, step_s=0.03)
        if timed
        else World(slots, 8, max_running=4, max_batch_tokens=16)
    )
    watched = [
        world.submit(f"long {index}", prompt(rng.randint(20, 4 * slots - 8), index), rng.randint(1, 9))
        for index in range(3)
    ]
    count = 0
    for _ in range(3000):
        if all(request.state is RequestState.FINISHED for request in watched):
            return
        if world.scheduler.num_waiting < 6:
            world.submit(
                f"short {count}",
                prompt(rng.randint(1, 12), count + 9),
                rng.randint(1, 4),
                namespace=rng.choice(["a", "b\x1fsalt"]),
            )
            count += 1
        world.step()
    raise AssertionError(
        f"never ended: {[(r.request_id, r.state, r.num_overtaken, r.num_missing) for r in watched]}"
    )


# --- tenants --------------------------------------------------------------------------------------------------------


def served(world: World, names: Callable[[str], str]) -> list[str]:
    """Tenants of requests in the order in which they were admitted, one a step."""
    before = set(world.done)
    world.run()
    requests = [request for name, request in world.done.items() if name not in before]
    return [names(request.request_id) for request in sorted(requests, key=admitted_s)]


def test_a_tenants_flood_does_not_hold_another_up() -> None:
    world = World(200, 0, max_running=1, max_batch_tokens=16)
    for index in range(30):
        world.submit(f"flood {index}", prompt(16, index), namespace="a")
    world.step()
    for index in range(3):
        world.submit(f"other {index}", prompt(16, 100 + index), namespace="b")
    order = served(world, lambda name: name.split()[0])
    assert order.index("other") <= 2 and [name for name in order[:9] if name == "other"] == ["other"] * 3, (
        order
    )


def test_tenants_share_by_tokens_and_not_by_requests() -> None:
    world = World(400, 0, max_running=1, max_batch_tokens=16)
    for index in range(8):
        world.submit(f"large {index}", prompt(64, index), namespace="a")
    for index in range(32):
        world.submit(f"small {index}", prompt(16, 100 + index), namespace="b")
    order = served(world, lambda name: name.split()[0])
    first_half = order[: len(order) // 2]
    assert 3 <= first_half.count("large") <= 5, order


def test_a_tenants_salts_are_one_tenant() -> None:
    world = World(200, 0, max_running=1, max_batch_tokens=16)
    for index in range(20):
        world.submit(f"flood {index}", prompt(16, index), namespace=f"a\x1f{index}")
    world.step()
    world.submit("other", prompt(16, 100), namespace="b")
    order = served(world, lambda name: name.split()[0])
    assert order.index("other") <= 2, order


def test_a_tenant_saves_nothing_up_while_it_asks_for_nothing() -> None:
    world = World(400, 0, max_running=1, max_batch_tokens=16)
    for index in range(10):
        world.submit(f"first {index}", prompt(16, index), namespace="a")
    served(world, str)
    for index in range(12):
        world.submit(f"a {index}", prompt(16, 20 + index), namespace="a")
        world.submit(f"b {index}", prompt(16, 100 + index), namespace="b")
    order = served(world, lambda name: name[0])
    assert 4 <= order[:12].count("a") <= 8, order
