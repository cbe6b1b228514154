"""What the scheduler and the cache do, told on tiers of a few slots, with the expected victims written out."""

from __future__ import annotations

import pytest

from fake_worker import expected_answer
from pensieve.core.checks import check
from pensieve.core.request import FinishReason, RequestState
from pensieve.errors import ContextLengthExceeded, KeepRefused, Overloaded
from worlds import CHUNK, World

SYSTEM = [40, 41, 42, 43, 44, 45, 46, 47]


def test_another_conversation_with_the_same_system_prompt_hits() -> None:
    world = World(20)
    world.turn("a", [*SYSTEM, 1, 2, 3])
    second = world.turn("b", [*SYSTEM, 4, 5, 6])
    assert (second.receipt.gpu_tokens, second.receipt.new_tokens) == (8, 3)


def test_another_namespace_never_hits() -> None:
    world = World(20)
    world.turn("a", [*SYSTEM, 1, 2, 3])
    assert world.turn("b", [*SYSTEM, 4, 5, 6], namespace="other").receipt.gpu_tokens == 0


def test_of_two_that_miss_the_same_chunks_one_computes_and_the_other_waits() -> None:
    world = World(20)
    world.submit("a", [*SYSTEM, 1, 2, 3])
    world.submit("b", [*SYSTEM, 4, 5, 6])
    first = world.step()
    assert {span.request_id for span in first.spans} == {"a"}
    world.run()
    assert world.done["b"].receipt.gpu_tokens == 8


def test_at_least_one_token_is_left_to_compute() -> None:
    world = World(20)
    world.turn("a", SYSTEM)
    again = world.turn("b", SYSTEM)
    assert again.receipt.gpu_tokens == 4
    assert again.receipt.new_tokens == 4


def test_a_branch_reuses_everything_before_the_point_of_divergence() -> None:
    world = World(20)
    log = world.turn("a", [*SYSTEM, 1, 2, 3, 4, 5, 6], answer=3, conversation="c").tokens
    branch = world.turn("b", [*log[:12], 30, 31, 32], conversation="c")
    assert branch.receipt.gpu_tokens == 12


def test_leading_chunks_leave_first_and_lazily() -> None:
    world = World(8, 8, copy_ahead_share=0.5)
    world.turn("old", list(range(20)), answer=1)  # 5 chunks
    world.step()
    assert world.places("old") == "bgggg", "one copy makes half of the slots free or reclaimable"
    world.turn("next", [30 + i for i in range(14)], answer=1)  # 4 chunks: the 3 free slots and the clean one
    assert world.places("old")[0] == "c"
    assert "c" not in world.places("old")[1:]


def test_a_hit_before_the_slot_is_reclaimed_costs_nothing() -> None:
    world = World(8, 8, copy_ahead_share=0.9)
    log = world.turn("old", list(range(20)), answer=1).tokens
    for _ in range(3):
        world.step()
    assert world.places("old") == "bbbbb"
    again = world.turn("again", [*log, 7], conversation="old")
    assert again.receipt.gpu_tokens == 20
    assert world.worker.num_swapped_in == 0


def test_room_for_the_whole_queue_is_made_in_one_step() -> None:
    world = World(12, 40, copy_ahead_share=0.0)
    world.turn("old", list(range(45)))
    for name in ("a", "b"):
        world.submit(name, [ord(name) % 9 + i for i in range(13)])
    assert world.step().spans == ()
    assert {span.request_id for span in world.step().spans} == {"a", "b"}, (
        "none of them waits for a copy that began a step later"
    )


def test_first_come_first_served_and_all_or_nothing() -> None:
    world = World(10, admission="fcfs")
    world.submit("running", [1, 2, 3], answer=30)
    world.step()
    world.submit("large", list(range(33)))  # 9 chunks: with the reserve they do not fit beside it
    world.submit("small", [5])
    plan = world.step()
    assert {span.request_id for span in plan.spans} == {"running"}
    assert world.scheduler.requests["large"].state is RequestState.WAITING
    sequence = world.scheduler.requests["large"].sequence
    assert sequence is not None
    assert all(chunk is None or not chunk.leases for chunk in sequence.chunks)
    world.run()
    assert list(world.done) == ["running", "large", "small"]


def test_new_requests_leave_a_reserve_to_the_running_ones() -> None:
    world = World(10, reserve_share=0.3)
    world.submit("a", [1, 2, 3], answer=20)
    world.step()
    world.submit("b", list(range(25)))  # 7 of the 9 free slots: 3 must stay
    assert {span.request_id for span in world.step().spans} == {"a"}
    world.scheduler.abort("a", world.now_s)
    assert {span.request_id for span in world.step().spans} == {"b"}, (
        "the reserve does not apply when nothing runs"
    )


def test_the_latest_arrival_is_suspended_and_comes_back() -> None:
    world = World(6, 6, reserve_share=0.0, copy_ahead_share=0.0)
    first, second = world.submit("first", [1, 2, 3], answer=14), world.submit("second", [4, 5, 6], answer=14)
    states = set()
    while world.scheduler.requests:
        world.step()
        states.add((first.state, second.state))
    assert (RequestState.RUNNING, RequestState.SUSPENDED) in states
    assert (RequestState.SUSPENDED, RequestState.RUNNING) not in states
    assert first.receipt.suspensions == 0
    assert second.receipt.suspensions >= 1
    for request in (first, second):
        assert request.output == expected_answer(request.tokens[: request.num_prompt], 14)


def test_the_last_running_request_that_cannot_grow_ends_with_length() -> None:
    world = World(4)
    request = world.submit("r", [1, 2, 3], answer=50)
    world.run()
    assert request.ending is FinishReason.LENGTH
    assert len(request.tokens) == 4 * CHUNK + 1, "four full chunks, and one token that has no KV"


def test_a_long_prompt_is_cut_at_chunk_boundaries() -> None:
    world = World(20, max_batch_tokens=13, max_running=2)
    world.submit("r", list(range(30)))
    spans = [span for _ in range(4) for span in world.step().spans]
    assert [(span.start, span.stop, span.emits_token) for span in spans] == [
        (0, 12, False),
        (12, 24, False),
        (24, 30, True),
    ]


def test_a_turn_waits_for_the_earlier_one_of_its_conversation() -> None:
    world = World(20)
    world.submit("one", [1, 2, 3], answer=5, conversation="c")
    world.submit("two", [1, 2, 3, 9], answer=1, conversation="c")
    world.submit("other", [7, 7], answer=1)
    assert {span.request_id for span in world.step().spans} == {"one", "other"}
    world.run()
    assert set(world.done) == {"one", "two", "other"}


def test_refusals_name_the_numbers() -> None:
    world = World(40, max_waiting=1, max_context=100)
    with pytest.raises(
        ContextLengthExceeded, match="has 100 tokens, but at most 99 fit in the context of 100"
    ):
        world.submit("r", list(range(100)))
    world.submit("a", [1])
    with pytest.raises(Overloaded, match="1 requests wait already, at most 1 may"):
        world.submit("b", [1])


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_frees_its_leases_within_one_step(steps: int) -> None:
    """In the queue, with swap-ins under way, in the middle of a prompt that takes several steps, while decoding."""
    world = World(14, 40, max_batch_tokens=12, max_running=2, copy_ahead_share=0.5)
    log = world.turn("first", list(range(32)), conversation="c").tokens
    world.turn("other", [50 + i for i in range(40)])
    assert "c" in world.places("c")
    world.submit("long", [*log, *range(16)], answer=9, conversation="c")
    for _ in range(steps):
        world.step()
    world.scheduler.abort("long", world.now_s)
    world.step()
    chunks = [
        chunk for sequence in world.cache.sequences.values() for chunk in sequence.chunks if chunk is not None
    ]
    assert all(chunk.leases == 0 and not chunk.computing for chunk in chunks)
    assert world.done["long"].ending is FinishReason.ABORT
    assert not world.scheduler.requests
    world.turn("again", [*log, 1], conversation="c")


def test_aborted_while_swap_ins_are_planned_and_not_settled() -> None:
    world = World(14, 40, copy_ahead_share=0.5)
    log = world.turn("first", list(range(32)), conversation="c").tokens
    world.turn("other", [50 + i for i in range(40)])
    world.submit("long", [*log, *range(16)], answer=9, conversation="c")
    while not (plan := world.scheduler.schedule(world.now_s)).swap_in:
        world.scheduler.commit(plan, world.worker.run(plan), world.now_s)
    world.scheduler.abort("long", world.now_s)
    world.scheduler.commit(plan, world.worker.run(plan), world.now_s)
    check(world.cache)
    chunks = [
        chunk for sequence in world.cache.sequences.values() for chunk in sequence.chunks if chunk is not None
    ]
    assert chunks and all(chunk.leases == 0 for chunk in chunks)


def test_keeps_in_a_single_tier_leave_room_to_who_waits() -> None:
    world = World(10)
    world.turn("kept", [i % 5 for i in range(19)])
    world.submit("large", [i % 7 for i in range(33)])
    with pytest.raises(KeepRefused, match="a queued request that needs 9"):
        world.scheduler.set_keep("n", "kept", True)
    world.run()


def test_a_request_that_must_drop_chunks_of_its_own_for_a_keep_does_not_wait_for_ever() -> None:
    """Its own chunks and kept ones fill the lower tier. What is dropped of its own, it needs at once: nothing else would wake it."""
    world = World(10, 8, policy="lru", reserve_share=0.0, copy_ahead_share=0.0)
    kept_log = world.turn("first", [1 + i for i in range(16)], conversation="kept").tokens
    world.scheduler.set_keep("n", "kept", True)
    log = world.turn("other", [100 + i for i in range(24)], conversation="c").tokens
    places, kept, own = world.cache.places, world.cache.find("n", "kept"), world.cache.find("n", "c")
    assert kept is not None and own is not None
    for chunk in [*kept.chunks[:3], *own.chunks[:5]]:
        slot = places.pools[1].take()
        assert chunk is not None and slot is not None
        places.begin_copy(chunk, 0, 1, slot)
    world.settle(2)
    for chunk in own.chunks[:5]:
        assert chunk is not None
        slot = places.reclaim(chunk, 0)
        places.pools[0].release(slot)
        places.wipes.released(0, slot, erase=False)
    assert (world.places("kept"), world.places("c")) == ("bbbg", "cccccg")
    world.submit("long", [*log, *range(15)], conversation="c")
    world.now_s += 1.0
    world.submit("later", [*kept_log, 1], conversation="kept")
    world.run()
    assert world.done["long"].ending is FinishReason.LENGTH
