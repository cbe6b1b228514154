"""The map: one character a chunk, latest active first, never many rows at a time."""

from __future__ import annotations

import pytest

from pensieve.core import overview
from pensieve.core.cost import CostProfile, ResumeQuote
from pensieve.core.overview import MapRow, Overview, latest_first
from pensieve.errors import ConfigError
from worlds import CHUNK, World


def rows(world: World, quote: ResumeQuote | None = None, **which: object) -> dict[str, MapRow]:
    found = Overview(world.cache, latest_first(world.cache, **which), quote)  # type: ignore[arg-type]
    while not found.done:
        found.build_some(world.now_s)
    return {row.sequence_id: row for row in found.rows}


def drop_first_tier_copy(world: World) -> None:
    """Take the second chunk of conversation `a` out of the first tier."""
    places, sequence = world.cache.places, world.cache.find("n", "a")
    assert sequence is not None
    chunk = sequence.chunks[1]
    assert chunk is not None
    slot = places.reclaim(chunk, 0)
    places.pools[0].release(slot)
    places.wipes.released(0, slot, erase=False)


def test_every_letter() -> None:
    world = World(8, 8, copy_ahead_share=0.6)
    log = world.turn("a", list(range(22)), 1).tokens
    world.settle(1)
    assert rows(world)["a"].cells == "bbbggg"
    world.drop("a", 0, 4)
    drop_first_tier_copy(world)
    assert rows(world)["a"].cells == ".cbg.g"
    world.submit("a2", [*log, 1], conversation="a")
    world.scheduler.schedule(world.now_s)
    assert rows(world)["a"].cells == "*>bg*g"
    row = rows(world)["a"]
    assert (row.idle_s, row.active, row.tokens) == (0.0, True, 14)


@pytest.mark.parametrize(("names", "letter"), [("gpu cpu", "c"), ("gpu disk", "d"), ("gpu other", "c")])
def test_a_lower_tier_is_told_by_its_name(names: str, letter: str) -> None:
    world = World(6, 20, names=names)
    world.turn("a", list(range(20)), 1)
    world.settle()
    world.turn("b", list(range(100, 120)), 1)
    assert letter in rows(world)["a"].cells


def test_upper_case_is_shared() -> None:
    world = World(30, 0)
    world.turn("a", [*range(8), 20, 21, 22], 1)
    world.turn("b", [*range(8), 30, 31, 32], 1)
    assert {name: row.cells for name, row in rows(world).items()} == {"a": "GGg", "b": "GGg"}
    world.scheduler.forget("n", "a", world.now_s)
    assert rows(world)["b"].cells == "ggg"


def test_latest_first_and_only_who_is_asked_for() -> None:
    world = World(60, 0)
    for number, namespace in enumerate(["alice", "alice\x1fs", "bob", "alicette"]):
        world.turn(f"c{number}", [number, 1, 2], 1, namespace=namespace)
        world.now_s += 10.0
    world.submit("busy", [9, 9, 9], 30, conversation="c0b", namespace="alice")
    world.step()
    world.turn("c5", [5, 5], 1, namespace="bob")
    assert list(rows(world)) == ["c0b", "c5", "c3", "c2", "c1", "c0"]
    assert list(rows(world, tenant="alice")) == ["c0b", "c1", "c0"]
    assert list(rows(world, namespaces=["bob"])) == ["c5", "c2"]
    assert list(rows(world, namespaces=["bob", "alice"], tenant="alice")) == ["c0b", "c0"]
    world.cache.idle(world.cache.sequences["bob", "c5"])
    assert rows(world)["c5"].idle_s < 100.0, "a conversation that is evicted first was active all the same"


def test_never_many_rows_or_cells_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(100, 0)
    for number in range(6):
        world.turn(f"c{number}", [number + i for i in range(10)], 1)
    monkeypatch.setattr(overview, "MAX_ROWS", 2)
    found = Overview(world.cache, latest_first(world.cache), None)
    counts = []
    while not found.done:
        found.build_some(world.now_s)
        counts.append(len(found.rows))
        world.scheduler.forget("n", "c0", world.now_s)  # gone before its turn comes
    assert counts == [2, 4, 5]
    monkeypatch.setattr(overview, "MAX_CELLS", 3)
    found = Overview(world.cache, latest_first(world.cache), None)
    found.build_some(world.now_s)
    assert len(found.rows) == 1


def test_what_resuming_takes() -> None:
    cost = CostProfile([(4, 1.0), (8, 2.0), (16, 4.0)], CHUNK)
    quote = ResumeQuote(cost, chunk_bytes=100, copy_bytes_per_s=1000.0)
    world = World(8, 8, copy_ahead_share=0.6)
    world.turn("a", list(range(22)), 1)
    world.settle(1)
    assert rows(world)["a"].resume_s is None
    assert rows(world, quote)["a"].resume_s == 0.0
    world.drop("a", 0, 3)
    drop_first_tier_copy(world)
    assert rows(world, quote)["a"].resume_s == pytest.approx(1.0 + 4.0 + 0.1)
    with pytest.raises(ConfigError, match="must be positive, got 0"):
        ResumeQuote(cost, 100, 0.0)
