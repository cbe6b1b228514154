"""Steps that only decode, taken many at a time: the same as one at a time, in everything that is written down."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_worker import FakeWorker, expected_answer
from pensieve.core.checks import check
from pensieve.core.chunk import Chunk
from pensieve.core.plan import StepResult
from pensieve.core.request import Request, SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.errors import RequestTooLarge
from worlds import CHUNK, World, below


def state(world: World) -> dict[str, Any]:
    """All that the scheduler and the cache know."""
    scheduler, cache = world.scheduler, world.cache
    places = cache.places
    return {
        "requests": [_fields(request) for request in (*scheduler.requests.values(), *world.done.values())],
        "running": [request.request_id for request in scheduler.running],
        "waiting": scheduler.num_waiting,
        "to forget": (scheduler._lifecycle.ended, sorted(world.worker.tables)),
        "next_step": (scheduler._next_step, scheduler._admission.copied_first),
        "sequences": {
            key: (
                sequence.leased,
                sequence.num_active,
                sequence.last_active_s,
                sequence.tail,
                [_chunk(chunk) for chunk in sequence.chunks],
            )
            for key, sequence in cache.sequences.items()
        },
        "found by": {digest: (chunk.index, chunk.slots) for digest, chunk in cache.index.items()},
        "copies": {copy_id: _chunk(record.chunk) for copy_id, record in places.copies.items()},
        "pools": [(pool.num_free, sorted(pool.free_slots())) for pool in places.pools],
        "counts": (
            places.version,
            places.num_reclaimed,
            places.num_dropped,
            places.num_copied_down,
            places.num_chunks,
        ),
        "cells": world.worker.tiers,
        "now": world.now_s,
    }


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__ if name != "sequence"}


def _chunk(chunk: Chunk | None) -> Any:
    if chunk is None:
        return None
    copy = chunk.copy and (chunk.copy.copy_id, chunk.copy.dst_slot, chunk.copy.stale)
    return (
        chunk.index,
        chunk.num_tokens,
        list(chunk.slots),
        chunk.digest,
        chunk.computing,
        copy,
        chunk.leases,
        chunk.keeps,
        chunk.queues,
    )


def steadily(world: World, most: int) -> int:
    """Take steps that only decode, if such are next; how many."""
    steady = world.scheduler.steady_steps()
    if steady is None:
        return 0
    results: list[StepResult] = []
    while len(results) < min(most, steady.count):
        world.now_s += 1.0
        results.append(world.worker.run(steady.plan(len(results))))
        if results[-1].copies_done:
            break
    world.scheduler.commit_steady(steady, results, world.now_s)
    check(world.cache)
    return len(results)


def play(
    world: World, script: list[tuple[int, int, int, int]], steps: Callable[[World, int], int]
) -> list[dict[str, Any]]:
    """Turns of three conversations, so many steps apart; what was known at each."""
    logs: dict[int, list[int]] = {}
    seen = []
    for number, (pause, conversation, message, answer) in enumerate(script):
        left = pause
        while left:
            left -= steps(world, left) or len([world.step()])
        seen.append(state(world))
        tokens = [*logs.get(conversation, []), *range(100 * conversation, 100 * conversation + message)]
        logs[conversation] = tokens
        with suppress(RequestTooLarge):
            world.submit(str(number), tokens, answer, conversation=str(conversation))
    for _ in range(2000):
        if not world.scheduler.requests:
            break
        steps(world, 8) or world.step()
    seen.append(state(world))
    return seen


@given(
    script=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 2), st.integers(1, 9), st.integers(1, 24)), min_size=1, max_size=8),
    slots=st.sampled_from([(30,), (16, 12), (14, 6, 8)]), delay=st.integers(0, 4), copies_first=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_many_steps_at_once_leave_everything_as_one_after_the_other_does(
    script: list[tuple[int, int, int, int]], slots: tuple[int, ...], delay: int, copies_first: bool
) -> None:
    taken = []

    def some(world: World, most: int) -> int:
        taken.append(steadily(world, most))
        return taken[-1]

    def world() -> World:
        worker = FakeWorker(list(slots), CHUNK, swap_out_delay=delay)
        return World(*slots, worker=worker, copies_first=copies_first, copy_ahead_share=0.5, max_running=4)

    one_by_one, at_once = play(world(), script, lambda world, most: 0), play(world(), script, some)
    for expected, got in zip(one_by_one[:-1], at_once[:-1], strict=True):
        assert got == expected
    assert (
        at_once[-1]["requests"] == one_by_one[-1]["requests"]
    )  # (by when all is done the one has taken more steps than the other)


def test_a_lone_answer_is_taken_chunk_by_chunk() -> None:
    world = World(40)
    request = world.submit("a", [1, 2, 3], answer=20)
    assert world.scheduler.steady_steps() is None, "it waits"
    world.step()
    sizes = []
    while world.scheduler.requests:
        sizes.append(steadily(world, 99))
        if not sizes[-1]:
            world.step()
    # 3 tokens are computed, the 4th was sampled: its chunk is filled at once; then each chunk begins with a step of its own, and so ends the answer
    assert sizes == [1, 0, 3, 0, 3, 0, 3, 0, 3, 0, 0]
    assert request.output == expected_answer([1, 2, 3], 20)


@pytest.mark.parametrize(
    "disturb",
    [
        lambda world: world.submit("b", [7, 8, 9]),
        lambda world: world.scheduler.abort("a", world.now_s),
        lambda world: setattr(world.scheduler.running[0], "suspect", True),
        lambda world: setattr(world.scheduler.running[0], "num_failures", 1),
        lambda world: world.scheduler.schedule(world.now_s),
        lambda world: world.scheduler.warm("n", "old", world.now_s),
        lambda world: world.scheduler.forget("n", "old", world.now_s, erase=True),
        lambda world: world.scheduler.forget("n", "a", world.now_s),
    ],
    ids=[
        "a request waits",
        "it ends",
        "a forward failed",
        "it failed",
        "a step is in flight",
        "a hint",
        "slots to wipe",
        "it is forgotten",
    ],
)
def test_what_else_is_to_be_done_is_done_step_by_step(disturb: Callable[[World], object]) -> None:
    world = World(40, 40, copy_ahead_share=0.0)
    below(world, "old", list(range(30, 42)))
    world.submit("a", [1, 2, 3, 4], answer=20)
    world.step()
    world.step()
    assert world.scheduler.steady_steps() is not None
    disturb(world)
    assert world.scheduler.steady_steps() is None


def test_an_answer_that_a_token_may_end_is_made_step_by_step() -> None:
    world = World(40)
    sampling = SamplingParams(max_new_tokens=20, stop_token_ids=frozenset({3}))
    world.scheduler.submit("a", "n", "a", (1, 2, 3, 4), 0, sampling, 0.0)
    world.step()
    world.step()
    assert world.scheduler.steady_steps() is None


def test_copies_that_could_begin_do() -> None:
    world = World(12, 40, copy_ahead_share=0.0)
    world.turn("old", list(range(21)))
    world.submit("a", [1, 2, 3, 4], answer=20)
    world.step()
    world.step()
    assert world.scheduler.steady_steps() is not None
    world.scheduler.config = type(world.scheduler.config)(
        max_batch_tokens=64, max_running=8, copy_ahead_share=0.9
    )
    assert world.scheduler.steady_steps() is None


@pytest.mark.parametrize("harm", ["late", "many"])
def test_results_of_other_steps_are_refused(harm: str) -> None:
    world = World(40)
    world.submit("a", [1, 2, 3, 4], answer=20)
    world.step()
    world.step()
    scheduler: Scheduler = world.scheduler
    steady = scheduler.steady_steps()
    assert steady is not None
    results = [world.worker.run(steady.plan(index)) for index in range(steady.count)]
    if harm == "late":
        world.step()
    else:
        results *= 2
    with pytest.raises(AssertionError, match="steady"):
        scheduler.commit_steady(steady, results, world.now_s)
