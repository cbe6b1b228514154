"""Pinning, shown: what a running request needs stays, what a user keeps is never dropped, and nothing stays pinned for ever.

    python scripts/test_chunk_pinning.py

Runs a tiny real model (seconds). Prints a line a check and a summary; exits non-zero if any fails.
"""

from __future__ import annotations

import sys

from lab import CHUNK, Lab, prompt, run_checks

from pensieve.core.chunk import Chunk, IllegalMove
from pensieve.core.plan import StepPlan
from pensieve.core.request import FinishReason, RequestState
from pensieve.errors import KeepRefused
from pensieve.worker.worker import Hooks


def held(lab: Lab, conversation: str) -> list[Chunk]:
    """A conversation's chunks; there must be no hole."""
    chunks = lab.sequence(conversation).chunks
    assert all(chunk is not None for chunk in chunks), f"{conversation} has a hole"
    return [chunk for chunk in chunks if chunk is not None]


def leased_chunks_survive_pressure() -> str:
    """While one request decodes, others fill the cache many times over; no chunk of it moves, and its answer is right."""
    lab = Lab(gpu=16, cpu=6)
    lab.submit("long", "long", prompt(1, 30), 60)
    lab.step()
    before = {id(chunk): chunk.slots[0] for chunk in held(lab, "long")}
    dropped = lab.cache.places.num_dropped
    for i in range(8):
        lab.submit(f"p{i}", f"p{i}", prompt(i + 2, 40), 3)
    while "long" in lab.scheduler.requests:
        lab.step()
        if "long" in lab.scheduler.requests:
            now = {id(chunk): chunk.slots[0] for chunk in held(lab, "long")}
            assert all(now.get(key) == slot for key, slot in before.items()), "a leased chunk left its slot"
    lab.run()
    assert lab.cache.places.num_dropped > dropped, "no pressure: the check would prove nothing"
    wrong = lab.wrong_tokens(lab.done["long"])
    assert wrong == 0, f"{wrong} tokens differ from a stateless run"
    lab.close()
    return f"{len(before)} chunks stayed in their slots while {lab.cache.places.num_dropped - dropped} others were dropped; 60 tokens right"


def the_table_refuses_to_move_a_leased_chunk() -> str:
    """Asking for it outright is refused, and nothing changes."""
    lab = Lab(gpu=16, cpu=16)
    lab.submit("r", "c", prompt(1, 20), 40)
    lab.step()
    refused = 0
    for chunk in held(lab, "c"):
        assert chunk.leases == 1, f"{chunk!r} of a running request is not leased"
        slots = list(chunk.slots)
        try:
            lab.cache.places.drop(chunk)
        except IllegalMove:
            refused += 1
        assert chunk.slots == slots, "a refused move changed something"
    assert refused == len(held(lab, "c")), "a leased chunk could be dropped"
    lab.run()
    lab.close()
    return f"{refused} of {refused} refused"


def several_conversations_at_once() -> str:
    """A shared system prompt is leased once a conversation, and free only when the last of them has ended."""
    lab = Lab(gpu=30, cpu=10)
    system = prompt(9, 2 * CHUNK)
    lab.turn("seed", "seed", system + prompt(1, 4), 2)
    for i in range(3):
        lab.submit(f"r{i}", f"c{i}", system + prompt(i + 30, 5), 4 + 6 * i)
    lab.step()
    shared = held(lab, "c0")[0]
    counts = [shared.leases]
    assert shared.leases == 3, f"three running conversations share a chunk, it has {shared.leases} leases"
    while lab.scheduler.requests:
        lab.step()
        if shared.leases != counts[-1]:
            counts.append(shared.leases)
    assert counts == [3, 2, 1, 0], f"leases went {counts}"
    assert sum(lab.wrong_tokens(lab.done[f"r{i}"]) for i in range(3)) == 0, (
        "an answer over the shared chunk is wrong"
    )
    lab.close()
    return f"leases of the shared chunk: {' -> '.join(map(str, counts))}"


def released_on_success_failure_and_abort() -> str:
    """However a request ends, nothing of it stays leased, and its room can be had."""

    def break_one(plan: StepPlan) -> None:
        if any(span.request_id == "breaks" for span in plan.spans):
            raise RuntimeError("planted")

    lab = Lab(gpu=24, cpu=8, hooks=Hooks(before_forward=break_one))
    lab.submit("succeeds", "a", prompt(1, 20), 6)
    lab.submit("breaks", "b", prompt(2, 20), 6)
    lab.submit("aborted", "c", prompt(3, 20), 60)
    lab.submit("aborted while waiting", "c", prompt(3, 20), 6)
    while lab.scheduler.requests["aborted"].state is not RequestState.RUNNING:
        lab.step()
    lab.scheduler.abort("aborted while waiting", lab.now_s)
    lab.scheduler.abort("aborted", lab.now_s)
    lab.run()
    endings = {name: request.ending for name, request in lab.done.items()}
    assert endings == {
        "succeeds": FinishReason.LENGTH,
        "breaks": FinishReason.ERROR,
        "aborted": FinishReason.ABORT,
        "aborted while waiting": FinishReason.ABORT,
    }, f"{endings}"
    leased = [
        chunk
        for s in lab.cache.sequences.values()
        for chunk in s.chunks
        if chunk is not None and chunk.leases
    ]
    assert not leased, f"still leased: {leased}"
    lab.turn("whole tier", "d", prompt(5, 23 * CHUNK), 2)
    lab.close()
    return "success, failure, abort while running and abort while waiting leave no lease; the whole tier can be had again"


def user_keeps_are_respected() -> str:
    """A kept conversation may change tier but is never recomputed, however great the pressure; once lifted, it may go."""
    lab = Lab(gpu=12, cpu=16)
    log = lab.turn("t", "kept", prompt(1, 40)).tokens
    lab.scheduler.set_keep("lab", "kept", True)
    for i in range(10):
        lab.turn(f"p{i}", f"p{i}", prompt(i + 40, 70), 2)
    assert lab.cache.places.num_dropped > 0, "no pressure: the check would prove nothing"
    places = [chunk.place for chunk in held(lab, "kept")]
    again = lab.turn("again", "kept", log + prompt(2, 3), 3, len(log))
    assert again.receipt.recomputed_tokens == 1, (
        f"{again.receipt.recomputed_tokens} tokens of a kept conversation were recomputed (1 has no KV yet)"
    )
    assert lab.wrong_tokens(again) == 0, "the kept conversation's answer is wrong"
    lab.scheduler.set_keep("lab", "kept", False)
    for i in range(10, 20):
        lab.turn(f"p{i}", f"p{i}", prompt(i + 40, 70), 2)
    left = lab.cache.find("lab", "kept")
    assert left is None or None in left.chunks or len(left.chunks) < len(places), "a lifted keep still holds"
    lab.close()
    return f"{len(places)} chunks kept through {lab.cache.places.num_dropped} drops ({places.count(1)} of them swapped out); gone after it was lifted"


def user_keeps_are_bounded() -> str:
    """Keeps hold at most their share of the slots; one more is refused with the numbers, and nothing changes."""
    lab = Lab(gpu=20, cpu=12)
    for i in range(3):
        lab.turn(f"t{i}", f"c{i}", prompt(i, 30), 2)
    lab.scheduler.set_keep("lab", "c0", True)
    kept, limit = lab.cache.keeps.num_kept, lab.cache.keeps.limit
    try:
        lab.scheduler.set_keep("lab", "c1", True)
    except KeepRefused as error:
        message = str(error)
    else:
        raise AssertionError(f"{lab.cache.keeps.num_kept} chunks are kept, at most {limit} may be")
    assert str(limit) in message, f"the refusal does not name the limit: {message}"
    assert lab.cache.keeps.num_kept == kept, "a refused keep changed something"
    lab.turn("large", "large", prompt(8, 18 * CHUNK), 2)  # keeps do not stand in the way of progress
    lab.close()
    return f"{kept} of at most {limit} chunks kept, 4 more refused; a prompt of 18 of the 20 slots still runs"


CHECKS = [
    ("leased chunks survive pressure", leased_chunks_survive_pressure),
    ("a leased chunk cannot be moved", the_table_refuses_to_move_a_leased_chunk),
    ("several conversations at once", several_conversations_at_once),
    ("released on success, failure and abort", released_on_success_failure_and_abort),
    ("user keeps are respected", user_keeps_are_respected),
    ("user keeps are bounded", user_keeps_are_bounded),
]


def main() -> int:
    """Run all checks; the exit status."""
    print("chunk pinning")
    return run_checks("chunk pinning", CHECKS)


if __name__ == "__main__":
    sys.exit(main())
