"""Memory safety, shown: where every chunk's bytes are is accounted for at every step, and answers stay right.

    python scripts/test_memory_safety.py

Runs a tiny real model (seconds). Prints a line a check and a summary; exits non-zero if any fails.
"""

from __future__ import annotations

import sys

from lab import CHUNK, Lab, prompt, run_checks

from pensieve.core.request import FinishReason


def no_chunk_in_two_places_unaccounted() -> str:
    """Under heavy pressure, each slot of each tier is free or one chunk's, after every one of hundreds of steps."""
    lab = Lab(gpu=14, cpu=10)
    logs = {f"c{i}": prompt(i, 20) for i in range(6)}
    for turn in range(4):
        for name, log in logs.items():
            lab.submit(f"{name}-{turn}", name, log + prompt(turn + 50, 7), 5, len(log))
        lab.run()
        logs = {name: lab.done[f"{name}-{turn}"].tokens for name in logs}
    both = sum(
        chunk is not None and None not in chunk.slots
        for s in lab.cache.sequences.values()
        for chunk in s.chunks
    )
    for tier, pool in enumerate(lab.cache.places.pools):
        owned = [
            c.slots[tier]
            for s in lab.cache.sequences.values()
            for c in s.chunks
            if c is not None and c.slots[tier] is not None
        ]
        coming = [r.dst_slot for r in lab.cache.places.copies.values() if r.dst_tier == tier]
        assert len({*owned, *coming}) == len(owned) + len(coming) == pool.num_used, (
            f"tier {tier}: slots owned twice or not at all"
        )
    moved = sum(len(plan.swap_in) + len(plan.swap_out) for plan in lab.plans)
    assert moved > 0 and lab.cache.places.num_dropped > 0, "no pressure: the check would prove nothing"
    lab.close()
    return f"{len(lab.plans)} steps verified, {moved} copies, {lab.cache.places.num_dropped} drops; {both} chunks lie in both tiers, as one record each"


def replacement_frees_the_old_bytes() -> str:
    """A changed history replaces chunks at the same place of the same conversation; the old ones' slots come back."""
    lab = Lab(gpu=20, cpu=20)
    lab.turn("a", "c", prompt(1, 50))
    lab.settle()
    used = [pool.num_used for pool in lab.cache.places.pools]
    for round_ in range(5):
        lab.turn(f"b{round_}", "c", prompt(1, 16) + prompt(9 + round_, 34))
        lab.settle()
        assert lab.cache.places.pools[0].num_used <= used[0], "replaced chunks kept their slots"
        assert sum(c is not None for c in lab.sequence("c").chunks) <= used[0]
    assert lab.done["b0"].receipt.gpu_tokens == 16, (
        f"the common beginning of 16 tokens was not reused: {lab.done['b0'].receipt.gpu_tokens}"
    )
    lab.scheduler.forget("lab", "c", lab.now_s)
    lab.settle()
    left = [pool.num_used for pool in lab.cache.places.pools]
    assert left == [0, 0], f"slots in use after the conversation was deleted: {left}"
    lab.close()
    return f"{used[0]} slots in use before and after 5 replacements, 0 after deletion"


def recovery_mixed_with_generation() -> str:
    """A dropped prefix is recomputed in the same step in which another conversation decodes; both answers are right."""
    lab = Lab(gpu=30, cpu=8)
    first = lab.turn("first", "old", prompt(3, 60))
    lab.settle()
    for position in (0, 1, 2, 5):
        chunk = lab.sequence("old").chunks[position]
        assert chunk is not None
        if chunk.slots[1] is not None:
            lab.cache.places.release_lower(chunk, 1)
        lab.cache.places.drop(chunk)
    lab.submit("decoding", "new", prompt(4, 10), 30)
    for _ in range(3):
        lab.step()
    lab.submit("again", "old", first.tokens + prompt(5, 6), 10, len(first.tokens))
    lab.run()
    mixed = [
        plan
        for plan in lab.plans
        if {s.request_id for s in plan.spans} == {"decoding", "again"}
        and any(not s.emits_token for s in plan.spans)
    ]
    assert mixed, "no step mixed recovery and generation: the check would prove nothing"
    again, decoding = lab.done["again"], lab.done["decoding"]
    wrong = lab.wrong_tokens(again) + lab.wrong_tokens(decoding)
    assert wrong == 0, f"{wrong} tokens differ from a stateless run"
    assert again.receipt.recomputed_tokens == 4 * CHUNK + 1, (
        f"{again.receipt.recomputed_tokens} tokens recomputed"
    )
    lab.close()
    return f"{again.receipt.recomputed_tokens} tokens in two holes recomputed beside a running decode; {again.num_output + decoding.num_output} tokens right"


def tracking_matches_the_tiers() -> str:
    """What a conversation says it has is what the tiers hold, and what the next turn finds."""
    lab = Lab(gpu=16, cpu=20)
    logs: dict[str, list[int]] = {}
    for i in range(5):
        logs[f"c{i}"] = lab.turn(f"t{i}", f"c{i}", prompt(i + 20, 40)).tokens
        lab.settle()
    places = [0, 0]
    for name, log in reversed(logs.items()):
        sequence = lab.cache.find("lab", name)
        chunks = sequence.chunks if sequence is not None else []
        on_gpu = sum(c.num_tokens for c in chunks if c is not None and c.place == 0)
        on_cpu = sum(c.num_tokens for c in chunks if c is not None and c.place == 1)
        request = lab.turn(f"again-{name}", name, log + prompt(1, 3), 3, len(log))
        assert (request.receipt.gpu_tokens, request.receipt.cpu_tokens) == (on_gpu, on_cpu), (
            f"{name}: tracked {on_gpu} gpu + {on_cpu} cpu tokens, the turn found {request.receipt.gpu_tokens} + {request.receipt.cpu_tokens}"
        )
        total = (
            request.receipt.gpu_tokens
            + request.receipt.cpu_tokens
            + request.receipt.recomputed_tokens
            + request.receipt.new_tokens
        )
        assert total == request.num_prompt, f"{name}: {total} tokens accounted for of {request.num_prompt}"
        places[0] += on_gpu
        places[1] += on_cpu
        lab.settle()
    assert min(places) > 0, f"tokens found by tier: {places}: the check would prove little"
    lab.close()
    return f"{len(logs)} conversations: {places[0]} tokens tracked on the gpu and {places[1]} on the cpu tier, all found there by the next turn"


def positions_are_right() -> str:
    """Tokens keep their absolute positions through swap, drop and recompute: six turns equal a stateless run."""
    lab = Lab(gpu=14, cpu=14)
    log: list[int] = []
    right = 0
    for turn in range(6):
        request = lab.turn(f"t{turn}", "c", log + prompt(turn + 70, 9), 6, len(log))
        lab.turn(f"other{turn}", f"other{turn}", prompt(turn + 90, 60), 2)  # pressure
        wrong = lab.wrong_tokens(request)
        assert wrong == 0, f"turn {turn}: {wrong} tokens differ from a stateless run"
        assert request.ending is FinishReason.LENGTH
        right += request.num_output
        log = request.tokens
    requests = [lab.done[f"t{turn}"] for turn in range(6)]
    swapped, recomputed = (
        sum(r.receipt.cpu_tokens for r in requests),
        sum(r.receipt.recomputed_tokens for r in requests),
    )
    assert swapped > 0, "nothing was swapped: the check would prove nothing"
    lab.close()
    return f"{right} tokens right over 6 turns with {swapped} tokens swapped in and {recomputed} recomputed"


CHECKS = [
    ("no chunk in two places unaccounted", no_chunk_in_two_places_unaccounted),
    ("replacement in the same place frees the old bytes", replacement_frees_the_old_bytes),
    ("recovery and generation mixed stay safe", recovery_mixed_with_generation),
    ("tracking of a conversation's chunks matches the tiers", tracking_matches_the_tiers),
    ("positions are right", positions_are_right),
]


def main() -> int:
    """Run all checks; the exit status."""
    print("memory safety")
    return run_checks("memory safety", CHECKS)


if __name__ == "__main__":
    sys.exit(main())
