"""Whose missing tokens are computed first."""

from __future__ import annotations

from pensieve.core.budget import PATIENCE
from worlds import World


def test_a_short_turn_does_not_wait_behind_a_long_one() -> None:
    world = World(60, 0, max_batch_tokens=16)
    world.submit("long", list(range(48)))
    world.step()
    world.submit("short", [5, 6, 7])
    assert [(span.request_id, span.stop) for span in world.step().spans] == [("short", 3), ("long", 28)]
    world.run()
    assert list(world.done) == ["short", "long"]


def test_short_turns_put_a_long_one_off_by_a_bounded_number_of_steps() -> None:
    world = World(200, 0, max_batch_tokens=16)
    world.submit("long", list(range(64)))  # 4 steps' worth
    steps = 0
    while "long" not in world.done:
        world.submit(f"short {steps}", [steps % 50] * 15 + [steps // 50])  # a whole step's worth, every step
        world.step()
        steps += 1
        assert steps < 4 * PATIENCE + 8
    assert steps > 8, "the short ones went first"


def test_what_is_admitted_to_wait_for_its_turn_is_bounded() -> None:
    world = World(400, 0, max_batch_tokens=16, max_running=8)
    for name in "abcdefgh":
        world.submit(name, [ord(name) % 50] * 80)
    world.step()
    assert len(world.scheduler.running) == 2, "eight steps' worth"
    world.run()
