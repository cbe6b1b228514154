"""The tiered cache: which chunks exist, who shares them, who needs them. Knows counts, hashes and slots; never bytes, text or requests.

Sole writer of chunk places, pools, leases, keeps and the prefix index (slots through `Places`). Everyone else asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass

from pensieve.config import CacheConfig
from pensieve.core.checks import check_cache
from pensieve.core.chunk import Chunk
from pensieve.core.eviction import PolicyFactory, PolicyFamily
from pensieve.core.history import History
from pensieve.core.places import Places
from pensieve.core.plan import Copy
from pensieve.core.recovery import Range, missing_ranges
from pensieve.core.room import Room
from pensieve.core.sequence import IDLE_S, Key, Namespaces, Sequence, Sharers, root_digest
from pensieve.core.wipes import Erasure
from pensieve.errors import KeepRefused


@dataclass(frozen=True, slots=True)
class Need:
    """What running a sequence up to some length asks of the first tier."""

    slots: int  # to be taken: chunks to compute and chunks to swap in
    own_clean: int  # reclaimable chunks that are its own, hence not room for it
    own_sole: int  # evictable chunks that are its own
    blocked: bool  # a chunk of it is being computed for another request, or moved between lower tiers: wait
    missing: int  # tokens to compute


@dataclass(frozen=True, slots=True)
class Admission:
    """What admitting a sequence found and began."""

    gpu_tokens: int  # found in the first tier
    cpu_tokens: int  # being swapped in
    lower: tuple[Range, ...]  # token ranges of those, one a chunk
    missing: tuple[Range, ...]  # token ranges to compute, ascending, the last one ends at the sequence's end
    num_swapped_in: int  # chunks


@dataclass(frozen=True, slots=True)
class Moves:
    """Copies begun, slots reclaimed and slots to wipe since they were last collected, for the next plan."""

    swap_in: tuple[Copy, ...]
    swap_out: tuple[Copy, ...]
    reclaimed: tuple[tuple[int, int], ...]
    wiped: tuple[tuple[int, int], ...]


class TieredCache:
    """Every conversation's chunks over an ordered list of tiers. Time is told, never asked, and never runs backwards."""

    def __init__(self, config: CacheConfig, policy: PolicyFactory) -> None:
        """`policy()` makes one eviction policy; each tier and kind of victim has its own. A `PolicyFamily` hears of returns, too."""
        self.config = config
        self._family = policy if isinstance(policy, PolicyFamily) else None
        self.chunk_tokens = config.chunk_tokens
        self.places = Places(config, policy, self._on_vanish)
        self.history = History()  # of chunks that are gone
        self.room = Room(self.places, self.history)
        self.index: dict[bytes, Chunk] = {}  # chain hash -> the one chunk found by it
        self.sequences: dict[Key, Sequence] = {}
        self.namespaces = Namespaces()
        self.keep_takes_first_tier = len(config.tiers) == 1  # nowhere else for kept chunks to go
        self.keep_limit = math.floor(config.keep_share * config.tiers[-1].num_slots)
        self.num_kept = 0
        self._kept: dict[Sequence, set[Chunk]] = {}

    # -- sequences

    def find(self, namespace: str, sequence_id: str) -> Sequence | None:
        """The sequence kept under this id, if any."""
        return self.sequences.get((namespace, sequence_id))

    def open(self, namespace: str, sequence_id: str, now_s: float) -> Sequence:
        """The sequence of this id, made if need be, counted active once more until `close`."""
        key = (namespace, sequence_id)
        sequence = self.sequences.get(key)
        if sequence is None:
            sequence = self.sequences[key] = Sequence(key, now_s)
            self.namespaces.add(namespace)
        self._set_activity(sequence, +1, now_s)
        return sequence

    def close(self, sequence: Sequence, now_s: float, num_answered: int = 0) -> None:
        """One request of the sequence has ended, with an answer of so many tokens."""
        self._set_activity(sequence, -1, now_s, num_answered)
        self._forget_if_empty(sequence)

    def forget(self, sequence: Sequence) -> int:
        """Let go of every chunk of a sequence that nobody leases; a keep on it ends too. Returns how many slots it had for itself."""
        assert not sequence.leased, f"{sequence!r} forgotten while leased"
        own = [chunk for chunk in sequence.chunks if chunk is not None and chunk.owner is sequence]
        num_slots = sum(
            sum(slot is not None for slot in chunk.slots) + (chunk.copy is not None) for chunk in own
        )
        self.set_keep(sequence, False)
        for chunk in sequence.chunks:
            if chunk is not None:
                self._detach(sequence, chunk)
        sequence.chunks.clear()
        sequence.tail = ()
        self._forget_if_empty(sequence)
        return num_slots

    def erase(self, sequence: Sequence | None) -> Erasure:
        """Forget a sequence that nobody leases, and begin to zero what it leaves, in every tier, then and earlier.

        A chunk shared with others stays theirs; its slots are wiped whenever it gives one back. None: nothing is cached of it any more,
        but its bytes may still lie in slots that were given back.
        """
        num_slots = 0
        if sequence is not None:
            self.places.marked.update(chunk for chunk in sequence.chunks if chunk is not None)
            num_slots = self.forget(sequence)
        return self.places.wipes.erase(num_slots, self.places.copies)

    def attach(self, sequence: Sequence, tokens: Tokens[int], digests: Tokens[bytes]) -> None:
        """Make a sequence hold every chunk that its `tokens` can reuse, its own or a shared one, and no other.

        At most len(tokens) - 1 tokens are matched: one must be left to compute. `digests` are the chain hashes of the full chunks of
        `tokens`. What a changed or shortened history no longer agrees with is let go. Attaching again changes nothing.
        """
        assert not sequence.leased, f"{sequence!r} re-attached while leased"
        size = self.chunk_tokens
        limit = (len(tokens) - 1) // size
        old = sequence.chunks
        new: list[Chunk | None] = []
        for position in range(limit):
            own = old[position] if position < len(old) else None
            if own is not None and own.digest != digests[position]:
                own = None
            if own is None or (own.place is None and not own.computing):
                own = self.index.get(digests[position], own)
            new.append(own)
        partial = self._matching_tail(sequence, tokens, digests)
        if partial is not None and (partial.index == limit or new[partial.index] is None):
            del new[partial.index :]
            new.append(partial)
        while new and new[-1] is None:
            new.pop()
        for position, chunk in enumerate(old):
            if chunk is not None and (position >= len(new) or new[position] is not chunk):
                self._detach(sequence, chunk)
        for position, chunk in enumerate(new):
            if chunk is not None and (position >= len(old) or old[position] is not chunk):
                self._share(sequence, chunk)
        sequence.chunks = new
        sequence.tail = sequence.tail[: partial.num_tokens] if partial is not None else ()

    def survey(self, sequence: Sequence, num_tokens: int) -> Need:
        """What admitting an attached sequence of `num_tokens` would take. A question: nothing changes."""
        slots = own_clean = own_sole = 0
        clean, sole = self.places.clean[0].bit, self.places.sole[0].bit
        blocked = False
        num_chunks, missing = -(-num_tokens // self.chunk_tokens), num_tokens
        for chunk in sequence.chunks:
            if chunk is None:
                continue
            num_chunks -= 1
            missing -= chunk.num_tokens
            if chunk.computing or (
                chunk.copy is not None and chunk.copy.src_tier > 0 and chunk.copy.dst_tier > 0
            ):
                blocked = True
            elif chunk.slots[0] is not None:
                own_clean += bool(chunk.queues & clean)
                own_sole += bool(chunk.queues & sole)
            elif chunk.copy is None:  # (with a copy it is on its way up for another request)
                slots += 1
        return Need(slots + num_chunks, own_clean, own_sole, blocked, missing)

    @contextmanager
    def protected(self, sequence: Sequence) -> Iterator[None]:
        """While room is made for a sequence: its own chunks are leased, for they are not room for itself."""
        chunks = [chunk for chunk in sequence.chunks if chunk is not None and not chunk.computing]
        for chunk in reversed(
            chunks
        ):  # so that the leading one, which a victim queue offers, leaves last: no other is offered meanwhile
            self.places.lease(chunk, +1)
        try:
            yield
        finally:
            for chunk in chunks:
                self.places.lease(chunk, -1)

    def admit(self, sequence: Sequence, num_tokens: int, digests: Tokens[bytes], now_s: float) -> Admission:
        """Lease everything a sequence of `num_tokens` needs, begin its swap-ins and take slots for what must be computed.

        The caller has seen by `survey` and `room.available` that there is room; all of it is taken here.
        """
        size = self.chunk_tokens
        sequence.leased, sequence.tail = True, ()
        gpu_tokens = cpu_tokens = num_swapped_in = 0
        lower: list[Range] = []
        for chunk in reversed(sequence.chunks):  # (as in `protected`)
            if chunk is not None:
                self.places.lease(chunk, +1)
        valid: list[int] = []
        for position in range(-(-num_tokens // size)):
            if position == len(sequence.chunks):
                sequence.chunks.append(None)
            chunk = sequence.chunks[position]
            if chunk is None:
                self._begin_compute(
                    sequence, position, digests[position] if position < len(digests) else None, now_s
                )
                valid.append(0)
                continue
            valid.append(chunk.num_tokens)
            if chunk.slots[0] is not None:
                gpu_tokens += chunk.num_tokens
            else:
                cpu_tokens += chunk.num_tokens
                lower.append((position * size, position * size + chunk.num_tokens))
                if chunk.copy is None:
                    self._begin_swap_in(chunk, now_s)
                    num_swapped_in += 1
        return Admission(
            gpu_tokens,
            cpu_tokens,
            tuple(lower),
            tuple(missing_ranges(valid, num_tokens, size)),
            num_swapped_in,
        )

    def grow(self, sequence: Sequence, now_s: float) -> int | None:
        """A first-tier slot for the next chunk of a leased sequence, or None, with nothing changed, when there is none."""
        if self.room.available(0) == 0:
            return None
        sequence.chunks.append(None)
        return self._begin_compute(sequence, len(sequence.chunks) - 1, None, now_s)

    def commit(self, sequence: Sequence, start: int, stop: int, digests: Tokens[bytes]) -> None:
        """Tokens [start, stop) of a leased sequence have their KV; full chunks can be found from now on."""
        size = self.chunk_tokens
        if (
            stop - start == 1 and (valid := stop % size) > 1
        ):  # nearly every decoded token: one more in a chunk that is neither new nor full
            chunk = sequence.chunks[start // size]
            assert chunk is not None
            if not chunk.computing:
                assert chunk.owner is sequence and chunk.digest is None, (
                    f"{chunk!r} is shared or full: no append"
                )
                self.places.append(chunk, valid)
                return
        for position in range(start // size, -(-stop // size)):
            chunk = sequence.chunks[position]
            assert chunk is not None
            valid = min(size, stop - position * size)
            if chunk.computing:
                self.places.finish_compute(chunk, valid)
            else:
                assert chunk.owner is sequence and chunk.digest is None, (
                    f"{chunk!r} is shared or full: no append"
                )
                self.places.append(chunk, valid)
            if valid == size and position < len(digests):
                chunk.digest = digests[position]
                self.index.setdefault(chunk.digest, chunk)
                self.history.found_again(chunk.digest)

    def release(
        self, sequence: Sequence, tokens: Tokens[int], digests: Tokens[bytes], failed_s: float | None = None
    ) -> None:
        """Give the leases of a sequence back; what of it is not computed yet, will not be (because of a failure, at `failed_s`, if any).

        `tokens` is its path, `digests` the chain hashes of its full chunks. A sequence longer than that (the answer was cut at a stop
        string) is shortened; the last, partial chunk's tokens are remembered, to match it by at the next turn.
        """
        for chunk in list(sequence.chunks):
            if chunk is not None and chunk.computing:
                if failed_s is not None:
                    self.history.note(chunk, "failed", failed_s)
                self.places.fail_compute(chunk)
        sequence.leased = False
        for chunk in sequence.chunks:
            if chunk is not None:
                self.places.lease(chunk, -1)
        self._shorten(sequence, len(tokens))
        last = sequence.chunks[-1] if sequence.chunks else None
        if last is not None and last.num_tokens < self.chunk_tokens:
            start = last.index * self.chunk_tokens
            sequence.tail = tuple(tokens[start : start + last.num_tokens])
            sequence.tail_parent = digests[last.index - 1] if last.index else root_digest(sequence.key[0])
        self._extend_keep(sequence)

    def slots_of(self, sequence: Sequence, first: int = 0) -> tuple[int, ...]:
        """First-tier slots of a leased sequence's chunks from position `first` on (where a swap-in is under way, its target)."""
        slots = []
        for chunk in sequence.chunks[first:]:
            assert chunk is not None
            slot = chunk.slots[0] if chunk.slots[0] is not None or chunk.copy is None else chunk.copy.dst_slot
            assert slot is not None
            slots.append(slot)
        return tuple(slots)

    # -- hints

    def warm(self, sequence: Sequence, most: int, reserve: int, now_s: float) -> tuple[int, int]:
        """Begin swap-ins of an idle sequence's lower chunks, leading ones first, into slots that are free or worth less than they.

        At most `most`, and `reserve` slots of the first tier stay available. Returns how many were begun, and how many are left below.
        """
        below = [
            c
            for c in sequence.chunks
            if c is not None
            and not c.computing
            and c.slots[0] is None
            and (c.copy is None or c.copy.dst_tier)
        ]
        ready = [chunk for chunk in below if chunk.copy is None]
        places, begun = self.places, 0
        with self.protected(sequence):
            for chunk in ready[:most]:
                if self.room.available(0) <= reserve:
                    break
                if not places.pools[0].num_free:
                    victim = places.clean[0].worst(now_s)
                    assert victim is not None
                    if places.clean[0].worth(victim, now_s) >= places.clean[0].worth(chunk, now_s):
                        break
                self._begin_swap_in(chunk, now_s)
                begun += 1
        return begun, len(below) - begun

    def touch(self, sequence: Sequence, now_s: float) -> None:
        """Count as active now."""
        self._set_activity(sequence, 0, now_s)

    def idle(self, sequence: Sequence) -> int:
        """Until its next activity, a sequence's chunks are the first to go; those it shares, once all their sequences are idle.

        Returns how many chunks it has.
        """
        self._withdraw(sequence)
        sequence.last_active_s = IDLE_S
        self._offer(sequence)
        for chunk in sequence.chunks:
            if (
                chunk is not None
                and isinstance(chunk.owner, Sharers)
                and all(m.last_active_s == IDLE_S for m in chunk.owner.members)
            ):
                self.places.leave_queues(chunk)
                chunk.owner.last_active_s = IDLE_S
                self.places.reindex(chunk)
        return sum(chunk is not None for chunk in sequence.chunks)

    # -- copies

    def finish_copy(self, copy_id: int) -> None:
        """A copy settled well."""
        self.places.finish_copy(copy_id)

    def fail_copy(self, copy_id: int, source_lost: bool, now_s: float) -> tuple[Sequence, ...]:
        """A copy raised. Returns the leased sequences that counted on it: what they computed over it is void."""
        record = self.places.copies[copy_id]
        chunk, upward = record.chunk, record.dst_tier < record.src_tier
        counting = (
            tuple(s for s in chunk.owner.sequences() if s.leased) if upward and not record.orphan else ()
        )
        if upward and source_lost and not record.orphan:
            self.history.note(chunk, "failed", now_s)
        self.places.fail_copy(copy_id, source_lost)
        return counting

    def drop_unread(self, sequence: Sequence, now_s: float) -> None:
        """Drop what a released sequence has below the first tier, so that it is recomputed rather than read once more."""
        for chunk in list(sequence.chunks):
            if chunk is None or chunk.place in (None, 0) or chunk.leases or chunk.copy:
                continue
            for (
                held
            ) in self._kept.values():  # a keep is a wish about eviction; what cannot be read cannot be kept
                if chunk in held:
                    held.remove(chunk)
                    self._change_keeps(chunk, -1)
            for tier in range(self.places.num_tiers - 1, (chunk.place or 0), -1):
                if chunk.slots[tier] is not None:
                    self.places.release_lower(chunk, tier)
            self.history.note(chunk, "failed", now_s)
            self.places.drop(chunk)

    def collect_moves(self) -> Moves:
        """The copies begun and slots reclaimed since the last call, and slots to wipe."""
        places = self.places
        moves = Moves(
            tuple(places.begun_in), tuple(places.begun_out), tuple(places.reclaimed), places.wipes.collect()
        )
        places.begun_in.clear()
        places.begun_out.clear()
        places.reclaimed.clear()
        return moves

    # -- keeps

    def set_keep(self, sequence: Sequence, keep: bool) -> None:
        """Set or lift a user's keep: kept chunks may change tier but are never dropped.

        Raises:
            KeepRefused: the conversation's chunks would exceed the share of slots that keeps may hold. Nothing changes.
        """
        held = self._kept.get(sequence)
        if not keep:
            if held is not None:
                del self._kept[sequence]
                sequence.kept = False
                for chunk in held:
                    self._change_keeps(chunk, -1)
            return
        if held is not None:
            return
        chunks = {chunk for chunk in sequence.chunks if chunk is not None}
        new = sum(1 for chunk in chunks if not chunk.keeps)
        if self.num_kept + new > self.keep_limit:
            raise KeepRefused(
                f"keeping {sequence.key[1]!r} takes {new} chunks; {self.num_kept} of at most {self.keep_limit} are kept already: "
                "lift another keep, or start with larger tiers"
            )
        self._kept[sequence] = chunks
        sequence.kept = True
        for chunk in chunks:
            self._change_keeps(chunk, +1)

    def num_own_kept(self, sequence: Sequence, digests: Tokens[bytes]) -> int:
        """Kept chunks that do not stand in the way of a path with these chain hashes: those it would run through, and those nobody else keeps.

        What another conversation keeps and this one shares is its own only while their paths agree.
        """
        held = self._kept.get(sequence, set())
        count = 0
        for chunk in sequence.chunks:
            if chunk is not None and chunk.keeps:
                only_here = chunk.keeps == 1 and chunk in held
                count += only_here or (chunk.index < len(digests) and chunk.digest == digests[chunk.index])
        return count

    def _extend_keep(self, sequence: Sequence) -> None:
        """A kept conversation grew: its new chunks are kept as far as the budget goes, leading ones first.

        Not where keeps hold first-tier slots: there a keep is weighed against the queued requests when it is set, and only then.
        """
        held = self._kept.get(sequence)
        if held is None or self.keep_takes_first_tier:
            return
        for chunk in sequence.chunks:
            if chunk is not None and chunk not in held and (chunk.keeps or self.num_kept < self.keep_limit):
                held.add(chunk)
                self._change_keeps(chunk, +1)

    def _change_keeps(self, chunk: Chunk, change: int) -> None:
        before = bool(chunk.keeps)
        chunk.keeps += change
        self.num_kept += bool(chunk.keeps) - before
        self.places.version += before and not chunk.keeps
        self.places.reindex(chunk)

    # -- inside

    def check(self) -> None:
        """Verify every invariant from scratch.

        Raises:
            AssertionError: naming what disagrees.
        """
        check_cache(self, self._kept)

    def _matching_tail(self, sequence: Sequence, tokens: Tokens[int], digests: Tokens[bytes]) -> Chunk | None:
        """The sequence's partial last chunk, shortened to what agrees with `tokens`; None if nothing of it can be used."""
        chunk = sequence.chunks[-1] if sequence.chunks else None
        if chunk is None or not sequence.tail or chunk.digest is not None or chunk.computing:
            return None
        start = chunk.index * self.chunk_tokens
        limit = min(len(sequence.tail), len(tokens) - 1 - start)
        if limit <= 0:
            return None
        if sequence.tail_parent != (
            digests[chunk.index - 1] if chunk.index else root_digest(sequence.key[0])
        ):
            return None  # the same tokens after another prefix have other KV
        agree = 0
        while agree < limit and sequence.tail[agree] == tokens[start + agree]:
            agree += 1
        if agree == 0:
            return None
        chunk.num_tokens = agree  # bytes beyond stay where they are: the length says what is valid
        return chunk

    def _shorten(self, sequence: Sequence, num_tokens: int) -> None:
        """Cut a sequence to `num_tokens`, and holes off its end; a chunk cut in its middle stays only if it is private."""
        chunks = sequence.chunks
        while chunks:
            last, start = chunks[-1], (len(chunks) - 1) * self.chunk_tokens
            if last is not None:
                if start + last.num_tokens <= num_tokens:
                    return
                if start < num_tokens and last.owner is sequence:
                    self._unindex(last)
                    last.digest, last.num_tokens = None, num_tokens - start
                    return
            chunks.pop()
            if last is not None:
                self._detach(sequence, last)

    def _begin_compute(self, sequence: Sequence, position: int, digest: bytes | None, now_s: float) -> int:
        chunk = Chunk(position, self.places.num_tiers, sequence, digest)
        slot = self.room.take(0, now_s)
        self.places.begin_compute(chunk, slot)
        sequence.chunks[position] = chunk
        if digest is not None:
            self.index.setdefault(digest, chunk)  # who needs the same chunk attaches to it, and waits
        return slot

    def _begin_swap_in(self, chunk: Chunk, now_s: float) -> None:
        place = chunk.place
        assert place is not None
        self.places.begin_copy(chunk, place, 0, self.room.take(0, now_s))

    def _set_activity(self, sequence: Sequence, change: int, now_s: float, num_answered: int = 0) -> None:
        self._withdraw(sequence)
        if self._family is not None:
            if change > 0 and not sequence.num_active:
                self._family.came_back(sequence, now_s)
            elif change < 0 and sequence.num_active == 1:
                self._family.went_idle(sequence, now_s, num_answered)
        sequence.num_active += change
        sequence.seen_s = max(sequence.seen_s, now_s)  # (a request may say that it was submitted earlier)
        sequence.last_active_s = max(sequence.last_active_s, now_s)
        self._offer(sequence)
        for chunk in sequence.chunks:
            if chunk is not None and isinstance(chunk.owner, Sharers):
                self.places.leave_queues(chunk)
                chunk.owner.num_active += change
                chunk.owner.last_active_s = max(chunk.owner.last_active_s, now_s)
                self.places.reindex(chunk)

    def _withdraw(self, sequence: Sequence) -> None:
        for queue in (*self.places.clean, *self.places.sole):
            queue.withdraw(sequence)

    def _offer(self, sequence: Sequence) -> None:
        for queue in (*self.places.clean, *self.places.sole):
            queue.offer(sequence)

    def _share(self, sequence: Sequence, chunk: Chunk) -> None:
        """One more sequence runs through a chunk."""
        self.places.leave_queues(chunk)
        if isinstance(chunk.owner, Sharers):
            chunk.owner.add(sequence)
        else:
            chunk.owner = Sharers({*chunk.owner.sequences(), sequence})
        self.places.reindex(chunk)

    def _detach(self, sequence: Sequence, chunk: Chunk) -> None:
        """One sequence fewer runs through a chunk; after the last one it is gone."""
        held = self._kept.get(sequence)
        if held is not None and chunk in held:
            held.remove(chunk)
            self._change_keeps(chunk, -1)
        owner = chunk.owner
        if isinstance(owner, Sharers):
            self.places.leave_queues(chunk)
            owner.discard(sequence)
            if len(owner.members) == 1:
                (chunk.owner,) = owner.members
            self.places.reindex(chunk)
            return
        self._unindex(chunk)
        self.places.discard(chunk)

    def _unindex(self, chunk: Chunk) -> None:
        if chunk.digest is not None and self.index.get(chunk.digest) is chunk:
            del self.index[chunk.digest]

    def _on_vanish(self, chunk: Chunk) -> None:
        """A chunk was dropped, lost or failed: its record goes, its sequences have a hole."""
        self._unindex(chunk)
        for sequence in chunk.owner.sequences():
            held = self._kept.get(sequence)
            if held is not None and chunk in held:
                held.remove(chunk)
                self._change_keeps(chunk, -1)
            sequence.chunks[chunk.index] = None
            while sequence.chunks and sequence.chunks[-1] is None and not sequence.leased:
                sequence.chunks.pop()
            if chunk.digest is None:
                sequence.tail = ()
            self._forget_if_empty(sequence)

    def _forget_if_empty(self, sequence: Sequence) -> None:
        if not sequence.chunks and not sequence.num_active:
            self.set_keep(sequence, False)
            if self.sequences.pop(sequence.key, None) is not None:
                self.namespaces.discard(sequence.key[0])
