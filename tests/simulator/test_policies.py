"""Each policy as a story on a tiny cache, its victims written out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pensieve.core.checks import check
from pensieve.errors import ConfigError
from pensieve.simulator.policies import Setting, make_policy
from policy_worlds import ALL_POLICIES, COST, TinyCache, policy_of


def three(policy: str, *slots: int, **setting: Any) -> TinyCache:
    """a was active at 10 s, b at 20 s, c at 30 s, four chunks each, in twelve slots."""
    world = TinyCache(policy_of(policy, **setting), *(slots or (12,)))
    for number, name in enumerate("abc"):
        world.turn(name, 4, 10.0 * (number + 1))
    return world


def test_lru_takes_leading_chunks_of_the_least_recently_active() -> None:
    world = three("lru")
    world.turn("d", 5, 40.0)
    assert [world.places(name) for name in "abc"] == ["", ".ggg", "gggg"]


def test_tail_lru_takes_trailing_chunks_of_the_least_recently_active() -> None:
    world = three("tail-lru")
    world.turn("d", 5, 40.0)
    assert [world.places(name) for name in "abc"] == ["", "ggg", "gggg"]
    world.turn("a", 2, 50.0)
    assert [world.places(name) for name in "abc"] == ["gg", "g", "gggg"]


def test_a_conversation_goes_as_a_whole_even_if_one_slot_is_wanted() -> None:
    world = three("conversation")
    world.turn("d", 1, 40.0)
    assert [world.places(name) for name in "abcd"] == ["", "gggg", "gggg", "g"]
    world.turn("e", 4, 50.0)
    assert [world.places(name) for name in "bcde"] == ["", "gggg", "g", "gggg"], (
        "three slots were left, one was wanted"
    )


def test_a_conversation_goes_down_as_a_whole_and_is_dropped_as_a_whole() -> None:
    world = three("conversation", 12, 5)
    world.turn("d", 1, 40.0)
    assert [world.places(name) for name in "abcd"] == ["cccc", "gggg", "gggg", "g"]
    world.turn("e", 4, 50.0)
    assert [world.places(name) for name in "abcde"] == ["", "cccc", "gggg", "g", "gggg"]


def test_t_lru_takes_first_what_the_next_turn_can_do_without() -> None:
    world = three("t-lru", uncached_tokens=12, prompt_tokens=4)  # two chunks of each may be missing
    world.turn("d", 3, 40.0)
    assert [world.places(name) for name in "abc"] == ["gg", "ggg", "gggg"]
    world.turn("e", 6, 50.0)
    assert [world.places(name) for name in "abcd"] == ["g", "gg", "gg", "g"], (
        "5 spare chunks went, oldest first; then LRU"
    )


def test_lfu_takes_who_had_the_fewest_turns_until_the_cache_has_aged() -> None:
    world = TinyCache(policy_of("lfu"), 12)
    for second in (1.0, 2.0, 3.0):
        world.turn("often", 4, second)
    world.turn("b", 4, 20.0)
    world.turn("c", 4, 30.0)
    world.turn("d", 5, 40.0)
    assert [world.places(name) for name in ("often", "b", "c")] == ["gggg", "", ".ggg"]
    world.turn("e", 8, 50.0)  # d entered at 2, above what had gone; e enters at 3
    assert [world.places(name) for name in ("often", "c", "d", "e")] == ["gggg", "", "", "g" * 8]
    world.turn("f", 8, 60.0)
    assert [world.places(name) for name in ("often", "e", "f")] == ["", "....gggg", "g" * 8], (
        "3 turns of long ago weigh as 1 of now"
    )


def test_arc_spares_who_came_back_and_learns_from_ghosts() -> None:
    world = TinyCache(policy_of("arc", num_slots=12), 12)
    world.turn("twice", 4, 1.0)
    world.turn("twice", 4, 2.0)
    world.turn("b", 4, 20.0)
    world.turn("c", 4, 30.0)
    world.turn("d", 4, 40.0)
    assert [world.places(name) for name in ("twice", "b", "c")] == ["gggg", "", "gggg"], (
        "the oldest, but it came back"
    )
    world.turn("b", 4, 50.0)  # 4 ghost hits: the list of those used once may have 4 chunks
    assert [world.places(name) for name in ("twice", "b", "c", "d")] == ["gggg", "gggg", "", "gggg"]
    world.turn("e", 1, 60.0)
    assert [world.places(name) for name in ("twice", "b", "d")] == [".ggg", "gggg", "gggg"], (
        "as many as it may: the other list gives"
    )


def test_sharers_spare_what_many_run_through() -> None:
    for policy, expected in (("retention", "."), ("sharers", "g")):
        world = TinyCache(policy_of(policy), 8)
        for number, name in enumerate("abc"):
            world.turn(name, 2, 10.0 * number, system=1)  # chunk 0 costs 1.0 and is everybody's
        world.turn("x", 2, 90.0)
        assert world.places("c") == "gg"
        world.turn("y", 5, 100.0)  # three of a, b, c's four chunks go, or two and one of x
        assert world.places("c")[:1] == expected, policy


def test_the_clairvoyant_lets_go_what_never_comes_back_then_by_cost_over_time() -> None:
    known = {"a": 45.0, "b": 1000.0}
    world = TinyCache(policy_of("clairvoyant", known), 12)
    for number, name in enumerate("abc"):
        world.turn(name, 4, 10.0 * (number + 1))
    world.turn("d", 6, 40.0)
    assert [world.places(name) for name in "abc"] == ["gggg", "..gg", ""]


def test_the_clairvoyant_prefers_a_dear_chunk_of_late_to_a_cheap_one_of_soon() -> None:
    for policy, expected in (("clairvoyant", ("." * 3 + "g" * 9, "")), ("belady", ("." * 4 + "g" * 8, "g"))):
        world = TinyCache(policy_of(policy, {"long": 200.0, "short": 160.0}), 13)
        world.turn("long", 12, 10.0)
        world.turn("short", 1, 20.0)
        world.turn(
            "x", 4, 40.0
        )  # in 160 s 1.0, 1.2, 1.4 for the long one's next chunks, in 120 s 1.0 for the short one
        assert (world.places("long"), world.places("short")) == expected, policy


def test_belady_takes_the_farthest_whatever_it_costs() -> None:
    known = {"a": 200.0, "b": 150.0, "c": 100.0}
    world = TinyCache(policy_of("belady", known), 12)
    for number, name in enumerate("abc"):
        world.turn(name, 4, 10.0 * (number + 1))
    world.turn("d", 5, 40.0)
    assert [world.places(name) for name in "abc"] == ["", ".ggg", "gggg"]


def test_nobody_knows_the_future_unless_told() -> None:
    with pytest.raises(ConfigError, match="only a simulation can"):
        make_policy("clairvoyant", Setting(COST.of_chunk))
    with pytest.raises(ConfigError, match=r"no policy is called 'fifo': take one of .*belady.*retention"):
        make_policy("fifo", Setting(COST.of_chunk))


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_no_policy_takes_a_chunk_of_who_is_active_while_another_can_go(policy: str) -> None:
    world = TinyCache(policy_of(policy, {"a": math.inf, "b": 41.0}), 8)
    world.turn("a", 4, 10.0)
    world.turn("b", 4, 20.0)
    a = world.cache.open("n", "a", 30.0)  # queued
    world.turn("c", 4, 40.0)
    assert (world.places("a"), world.places("b"), world.places("c")) == ("gggg", "", "gggg")
    world.cache.close(a, 50.0)
    check(world.cache)
