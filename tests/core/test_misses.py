"""A receipt says why tokens were not in the first tier: every cause told as a story."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pensieve.core.history import History
from pensieve.core.misses import ANOTHER_TENANT
from pensieve.core.plan import CopyFailure, StepPlan, StepResult
from pensieve.core.receipt import Miss
from pensieve.core.sequence import tenant_of
from worlds import World

PROMPT = list(range(100, 118))  # 4.5 chunks


def whys(misses: tuple[Miss, ...]) -> list[tuple[int, int, str]]:
    return [(miss.start, miss.stop, miss.why) for miss in misses]


def test_a_first_turn_is_new_and_the_next_misses_its_last_token_only() -> None:
    world = World(20, 0)
    first = world.turn("one", PROMPT, 3, conversation="c")
    assert whys(first.receipt.misses) == [(0, 18, "new")]
    log = first.tokens
    second = world.turn("two", [*log, 1, 2, 3], conversation="c", history=len(log))
    assert whys(second.receipt.misses) == [(20, 21, "unfinished"), (21, 24, "new")]
    assert (second.receipt.recomputed_tokens, second.receipt.new_tokens) == (1, 3)


def test_the_last_token_at_a_chunk_boundary_is_unfinished_too() -> None:
    world = World(20, 0)
    log = world.turn("one", PROMPT[:14], 3, conversation="c").tokens
    assert len(log) == 17
    second = world.turn("two", [*log, 1, 2], conversation="c", history=17)
    assert whys(second.receipt.misses) == [(16, 17, "unfinished"), (17, 19, "new")]


def test_the_same_prompt_again_leaves_its_last_chunk_to_compute() -> None:
    world = World(20, 0)
    world.turn("one", PROMPT[:16], conversation="c")
    assert whys(world.turn("two", PROMPT[:16], conversation="c", history=16).receipt.misses) == [
        (12, 16, "unfinished")
    ]


def test_history_without_a_trace_was_never_seen_here() -> None:
    """As after a restart of the engine: the store has the conversation, the cache does not."""
    world = World(20, 0)
    request = world.turn("one", PROMPT, conversation="c", history=13)
    assert whys(request.receipt.misses) == [(0, 13, "never_seen"), (13, 18, "new")]
    assert request.receipt.recomputed_tokens == 13


def test_what_lies_below_is_on_cpu() -> None:
    world = World(6, 20, copy_ahead_share=0.9)
    log = world.turn("one", PROMPT, 1, conversation="c").tokens
    world.settle()
    world.turn("other", list(range(20)), 1)
    below = 4 * world.places("c").count("c")
    assert below > 0
    again = world.turn("two", [*log, 7], conversation="c", history=len(log))
    assert again.receipt.cpu_tokens >= below
    assert (
        sum(miss.stop - miss.start for miss in again.receipt.misses if miss.why == "on_cpu")
        == again.receipt.cpu_tokens
    )


def test_a_dropped_prefix_names_the_time_and_the_conversation_that_took_its_room() -> None:
    world = World(8, 0)
    log = world.turn("one", PROMPT, 1, conversation="c").tokens
    world.turn("greedy", list(range(20)), 1)  # 5 chunks: 3 are free, 2 of c's leading ones go
    at_s = world.now_s
    assert world.places("c") == "..ggg"
    again = world.turn("two", [*log, 7], conversation="c", history=len(log))
    assert again.receipt.misses[0] == Miss(0, 8, "dropped", at_s, "greedy")
    assert whys(again.receipt.misses)[1:] == [(18, 19, "unfinished"), (19, 20, "new")]


def test_a_dropped_partial_chunk_is_known_by_its_conversation_and_its_tokens() -> None:
    world = World(5, 0)
    log = world.turn("one", PROMPT, 1, conversation="c").tokens
    world.turn("greedy", list(range(20)), 1)
    assert world.places("c") == ""
    again = world.turn("two", [*log, 7], conversation="c", history=len(log))
    assert whys(again.receipt.misses) == [(0, 18, "dropped"), (18, 19, "unfinished"), (19, 20, "new")]
    assert {miss.by for miss in again.receipt.misses[:1]} == {"greedy"}
    world.turn("greedy2", list(range(30, 50)), 1)
    edited = world.turn("three", [*log[:16], 8, 8, 8], conversation="c", history=19)
    assert whys(edited.receipt.misses) == [(0, 16, "dropped"), (16, 19, "never_seen")], (
        "other tokens than those that were dropped"
    )


def test_another_key_is_not_named() -> None:
    world = World(5, 0)
    log = world.turn("one", PROMPT, 1, conversation="c", namespace="alice").tokens
    world.turn("greedy", list(range(20)), 1, namespace="bob")
    again = world.turn("two", [*log, 7], conversation="c", history=len(log), namespace="alice")
    assert again.receipt.misses[0].why == "dropped"
    assert again.receipt.misses[0].by == ANOTHER_TENANT
    world.turn("own", list(range(30, 50)), 1, namespace="alice\x1fsalt")
    third = world.turn("three", [*log, 7], conversation="c", history=len(log), namespace="alice")
    assert third.receipt.misses[0].by == "own", "another cache of the same key may be named"


def test_a_chunk_dropped_to_copy_another_down_is_told_with_that_conversation() -> None:
    world = World(6, 5, copy_ahead_share=0.9)
    log = world.turn("old", PROMPT[:17], 1).tokens
    world.settle()
    world.turn("next", list(range(20)), 1)
    world.now_s += 1000.0
    world.turn("last", list(range(50, 70)), 1)
    world.settle(20)
    again = world.turn("again", [*log, 7], conversation="old", history=len(log))
    dropped = [miss for miss in again.receipt.misses if miss.why == "dropped"]
    assert dropped
    assert all(miss.by in ("next", "last") and miss.at_s is not None for miss in dropped)


def test_a_copy_that_cannot_be_read_is_told_as_failed() -> None:
    world = World(6, 20, copy_ahead_share=0.9)
    log = world.turn("one", PROMPT, 1, conversation="c").tokens
    world.settle()
    world.turn("other", list(range(20)), 1)
    assert "c" in world.places("c")

    def lose(plan: StepPlan, result: StepResult) -> StepResult:
        lost = tuple(CopyFailure(copy.copy_id, True, "unreadable") for copy in plan.swap_in)
        return replace(
            result, copies_done=tuple(set(result.copies_done) - {f.copy_id for f in lost}), copies_failed=lost
        )

    request = world.submit("two", [*log, 7], conversation="c", history=len(log))
    while request.in_flight or not request.chunks_in:
        world.step(lose)
        if request.chunks_in:
            break
    assert world.cache.history.num_failed > 0
    world.scheduler.abort("two", world.now_s)
    world.settle()
    again = world.turn("three", [*log, 7], conversation="c", history=len(log))
    failed = [miss for miss in again.receipt.misses if miss.why == "failed"]
    assert failed
    assert failed[0].by is None


def test_a_forward_that_fails_is_told_to_the_next_turn() -> None:
    world = World(20, 0)
    request = world.submit("one", PROMPT, conversation="c")
    for _ in range(10):
        if request.ending is None:
            world.step(lambda plan, result: StepResult(plan.step_id, forward_error="broken"))
    assert request.ending is not None
    again = world.turn("two", PROMPT, conversation="c")
    assert whys(again.receipt.misses) == [(0, 16, "failed"), (16, 18, "new")]


def test_what_another_cache_of_the_same_key_holds_is_reported_and_no_other_keys() -> None:
    world = World(40, 0)
    world.turn("a", PROMPT, 1, namespace="alice\x1fone")
    request = world.turn("b", [*PROMPT[:12], *range(10)], 1, namespace="alice\x1ftwo")
    assert whys(request.receipt.misses) == [(0, 12, "other_namespace"), (12, 22, "new")]
    assert whys(world.turn("c", PROMPT, 1, namespace="bob").receipt.misses) == [(0, 18, "new")]
    assert whys(world.turn("d", PROMPT, 1, namespace="alice").receipt.misses) == [
        (0, 16, "other_namespace"),
        (16, 18, "new"),
    ]
    history = world.turn("e", PROMPT, 1, namespace="alice\x1fthree", history=18)
    assert whys(history.receipt.misses) == [(0, 16, "other_namespace"), (16, 18, "never_seen")]


def test_a_chunk_computed_again_is_not_lost_any_more() -> None:
    world = World(5, 0)
    log = world.turn("one", PROMPT, 1, conversation="c").tokens
    world.turn("greedy", list(range(20)), 1)
    world.turn("two", [*log, 7], conversation="c", history=len(log))
    world.scheduler.forget("n", "c", world.now_s)
    again = world.turn("three", [*log, 7], conversation="c", history=len(log))
    assert again.receipt.misses[0].why == "never_seen", "forgotten on purpose, not dropped"


def test_losses_are_remembered_up_to_a_number() -> None:
    world = World(5, 0)
    world.cache.history = world.cache.room._history = History(limit=3)
    for turn in range(6):
        world.turn(f"r{turn}", list(range(20 * turn, 20 * turn + 20)), 1)
    assert len(world.cache.history) == 3


@pytest.mark.parametrize(
    ("namespace", "tenant"),
    [("", ""), ("alice", "alice"), ("alice\x1fsalt", "alice"), ("alice\x1fa\x1fb", "alice")],
)
def test_a_namespace_begins_with_its_tenant(namespace: str, tenant: str) -> None:
    assert tenant_of(namespace) == tenant
