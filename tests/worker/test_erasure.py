"""With a real model: after an erasure, no byte of a conversation's keys and values is found in any tier."""

from __future__ import annotations

import random

import pytest

from oracle import Lab, assert_answer_is_stateless, pair
from pensieve.core.plan import Copy
from pensieve.worker.kv_store import KVStore
from pensieve.worker.worker import Hooks

SECRET = [150 + i % 49 for i in range(45)]  # ids that no other conversation uses
OTHER = [i % 140 for i in range(45)]
PATTERN_BYTES = 32


def patterns(lab: Lab, conversation: str) -> list[bytes]:
    """Pieces of what lies in a conversation's slots, all over them.

    None that is found in the others' as well.

    The first layer is left out: a value there follows from its token alone, and another conversation may
    sample the same one.
    """
    sequence = lab.cache.find("n", conversation)
    assert sequence is not None
    rows = [
        lab.worker._stores[tier].data[slot, 1:].numpy().tobytes()
        for chunk in sequence.chunks
        if chunk is not None
        for tier, slot in enumerate(chunk.slots)
        if slot is not None
    ]
    return [
        row[start : start + PATTERN_BYTES]
        for row in rows
        for start in range(0, len(row), PATTERN_BYTES)
        if any(row[start : start + PATTERN_BYTES])
    ]


def count(lab: Lab, wanted: list[bytes]) -> int:
    """How many of the patterns are found, at any offset of any tier."""
    tiers = [store.data.numpy().tobytes() for store in lab.worker._stores]
    return sum(any(pattern in tier for tier in tiers) for pattern in set(wanted))


def free_slots_are_zero(lab: Lab) -> bool:
    pools = lab.cache.places.pools
    return all(
        not store.data[sorted(pool.free_slots())].any()
        for store, pool in zip(lab.worker._stores, pools, strict=True)
    )


def used(**settings: object) -> Lab:
    """Two conversations, the secret one in both tiers and in slots that it had and gave back."""
    model, _ = pair("llama")
    lab = Lab(model, (14, 20), **settings)  # type: ignore[arg-type]
    lab.submit("a", "a", SECRET, 6)
    lab.run()
    lab.submit("b", "b", OTHER, 6)
    lab.run()
    log = lab.done["a"].tokens
    lab.submit("a2", "a", [*log, 150, 151], 6, len(log))
    lab.run()
    for _ in range(5):
        lab.step()
    return lab


def test_no_byte_is_found_in_any_tier_and_free_slots_are_zero() -> None:
    lab = used()
    secret = patterns(lab, "a")
    assert len(secret) > 100 and count(lab, secret) == len(set(secret))
    others = patterns(lab, "b")
    lab.erase("a")
    assert count(lab, secret) == 0
    assert free_slots_are_zero(lab)
    assert count(lab, others) == len(set(others)), "the others' are all there"
    lab.close()


def test_it_works_while_another_request_runs_and_leaves_its_answer_alone() -> None:
    _, reference = pair("llama")
    lab = used()
    secret = patterns(lab, "a")
    lab.submit("running", "c", [3, 1, 4, 1, 5], 40)
    lab.submit("a3", "a", [*lab.done["a2"].tokens, 152], 30)
    for _ in range(5):
        lab.step()
    lab.erase("a")
    assert count(lab, secret) == 0
    assert "running" in lab.scheduler.requests
    lab.run()
    assert_answer_is_stateless(reference, lab.done["running"])
    lab.close()


def test_copies_that_fail_half_way_leave_nothing_either() -> None:
    rng = random.Random(5)

    def maybe(copy: Copy) -> None:
        if rng.random() < 0.4:
            raise OSError("injected")

    lab = used(hooks=Hooks(before_copy=maybe))
    secret = patterns(lab, "a")
    lab.erase("a")
    assert count(lab, secret) == 0
    assert free_slots_are_zero(lab)
    lab.close()


def test_a_partial_chunk_has_no_foreign_bytes_behind_it() -> None:
    lab = used()
    secret = patterns(lab, "a")
    lab.scheduler.forget("n", "a", lab.now_s)  # the bytes stay until another request computes
    assert count(lab, secret) > 0
    taken: set[int] = set()
    for number in range(14):
        lab.submit(f"s{number}", f"s{number}", [number, 1, 2], 1)
        lab.run()
        sequence = lab.cache.find("n", f"s{number}")
        if (
            sequence is not None
            and sequence.chunks
            and (chunk := sequence.chunks[0]) is not None
            and chunk.slots[0] is not None
        ):
            taken.add(chunk.slots[0])
            row = lab.worker._stores[0].data[chunk.slots[0]].numpy().tobytes()
            assert not any(pattern in row for pattern in set(secret))
    assert len(taken) > 5
    lab.close()


def test_a_planted_bug_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = used()
    secret = patterns(lab, "a")
    monkeypatch.setattr(KVStore, "wipe", lambda self, slots: None)
    lab.erase("a")
    assert count(lab, secret) > 0
    assert not free_slots_are_zero(lab)
    lab.close()
