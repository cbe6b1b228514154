"""The tiered cache: which chunks exist, which sequences share them, which need them.

Knows counts, hashes and slots; never bytes, text or requests.

Sole writer of chunk places, pools, leases, keeps and the prefix index (slots through `Places`). All other
code asks it.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView
from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass

from pensieve.config import CacheConfig
from pensieve.core.activity import Activity
from pensieve.core.chunk import Chunk
from pensieve.core.eviction import PolicyFactory, PolicyFamily
from pensieve.core.history import History
from pensieve.core.keeps import Keeps
from pensieve.core.places import Places
from pensieve.core.plan import Copy
from pensieve.core.recovery import Range, missing_ranges
from pensieve.core.room import Room
from pensieve.core.sequence import Key, Namespaces, Sequence, root_digest, sequences_of
from pensieve.core.sharing import Sharing
from pensieve.core.wipes import Erasure


@dataclass(frozen=True, slots=True)
class Need:
    """What running a sequence up to some length takes from the first tier."""

    slots: int  # to be taken: for chunks to compute and chunks to swap in
    own_reclaimable: int  # of its own chunks, reclaimable ones: they make no room for itself
    own_evictable: int  # of its own chunks, evictable ones
    blocked: bool  # a chunk of it is being computed for another request, or copied between lower tiers
    missing: int  # tokens to compute


@dataclass(frozen=True, slots=True)
class Admission:
    """What admitting a sequence found in the cache and began."""

    gpu_tokens: int  # found in the first tier
    cpu_tokens: int  # being swapped in
    lower: tuple[Range, ...]  # token ranges being swapped in, one a chunk
    missing: tuple[Range, ...]  # token ranges to compute, ascending; the last one ends at the sequence's end
    num_swapped_in: int  # chunks


@dataclass(frozen=True, slots=True)
class Moves:
    """Copies begun, slots reclaimed and slots to wipe since they were last collected, for the next plan."""

    swap_in: tuple[Copy, ...]
    swap_out: tuple[Copy, ...]
    reclaimed: tuple[tuple[int, int], ...]
    wiped: tuple[tuple[int, int], ...]


class TieredCache:
    """Every conversation's chunks over an ordered list of tiers.

    Time is told, never asked, and never runs backwards.
    """

    def __init__(self, config: CacheConfig, policy: PolicyFactory) -> None:
        """`policy()` makes one eviction policy; each victim queue has its own.

        A `PolicyFamily` also hears of returns.
        """
        self.config = config
        self.chunk_tokens = config.chunk_tokens
        self.places = Places(config, policy, self._on_loss)
        self.history = History()  # of chunks that were lost
        self.room = Room(self.places, self.history)
        self.keeps = Keeps(config, self.places)
        self._activity = Activity(self.places, policy if isinstance(policy, PolicyFamily) else None)
        self.sharing = Sharing(config.chunk_tokens, self.places, self.keeps)
        self.index = self.sharing.index  # chain hash -> the one chunk found by it
        self.sequences: dict[Key, Sequence] = {}
        self.namespaces = Namespaces()

    # -- room (questions change nothing)

    @property
    def num_slots(self) -> int:
        """Slots of the first tier."""
        return self.places.pools[0].num_slots

    @property
    def version(self) -> int:
        """Grows whenever a slot or a chunk may have become available."""
        return self.places.version

    @property
    def has_wipes(self) -> bool:
        """Slots wait to be wiped."""
        return self.places.wipes.has_work

    def available(self) -> int:
        """First-tier slots that can be had now at no cost."""
        return self.room.available(0)

    def coming(self) -> int:
        """First-tier slots that copies under way make reclaimable, unless a chunk is leased meanwhile."""
        return self.room.coming(0)

    def evictable(self) -> int:
        """First-tier slots whose chunk would have to be copied down or dropped first."""
        return self.room.evictable(0)

    def retries_due(self, now_s: float) -> int:
        """Tiers left alone because copies into them failed, which may be tried again now."""
        return self.room.retries_due(now_s)

    def slots_for_one(self, sequence: Sequence | None, digests: Tokens[bytes]) -> int:
        """First-tier slots that one request of `sequence` can have, its path having these chain hashes."""
        return self.num_slots - self.keeps.num_against(sequence, digests)

    def make_room(self, num_slots: int, now_s: float, for_key: Key | None = None) -> None:
        """Evict from the first tier until `num_slots` are available or on their way, as far as possible."""
        self.room.make(0, num_slots, now_s, for_key)

    # -- sequences

    def find(self, namespace: str, sequence_id: str) -> Sequence | None:
        """The sequence of this id; None if nothing is cached for it."""
        return self.sequences.get((namespace, sequence_id))

    def open(self, namespace: str, sequence_id: str, now_s: float) -> Sequence:
        """The sequence of this id, made if need be, with one more open request until `close`."""
        key = (namespace, sequence_id)
        sequence = self.sequences.get(key)
        if sequence is None:
            sequence = self.sequences[key] = Sequence(key, now_s)
            self.namespaces.add(namespace)
        self._activity.change(sequence, +1, now_s)
        return sequence

    def close(self, sequence: Sequence, now_s: float, num_answered: int = 0) -> None:
        """One request of the sequence has ended; its answer has `num_answered` tokens."""
        self._activity.change(sequence, -1, now_s, num_answered)
        self._forget_if_empty(sequence)

    def forget(self, sequence: Sequence) -> int:
        """Let go of every chunk of an unleased sequence and end its keep.

        Returns how many slots only it used.
        """
        assert not sequence.leased, f"{sequence!r} forgotten while leased"
        own = [chunk for chunk in sequence.chunks if chunk is not None and chunk.owner is sequence]
        num_slots = sum(
            sum(slot is not None for slot in chunk.slots) + (chunk.copy is not None) for chunk in own
        )
        self.keeps.lift(sequence)
        for chunk in sequence.chunks:
            if chunk is not None:
                self.sharing.detach(sequence, chunk)
        sequence.chunks.clear()
        sequence.tail = ()
        self._forget_if_empty(sequence)
        return num_slots

    def erase(self, sequence: Sequence | None) -> Erasure:
        """Forget an unleased sequence and begin to zero every byte that it left in any tier, now or earlier.

        A chunk shared with other sequences stays theirs; its slots are wiped when it gives them back. Pass
        None if nothing of the sequence is cached any more: its bytes may still lie in slots that were given
        back.
        """
        num_slots = 0
        if sequence is not None:
            self.places.marked.update(chunk for chunk in sequence.chunks if chunk is not None)
            num_slots = self.forget(sequence)
        return self.places.wipes.erase(num_slots, self.places.copies)

    def attach(self, sequence: Sequence, tokens: Tokens[int], digests: Tokens[bytes]) -> None:
        """Give a sequence every chunk that its `tokens` can reuse (`Sharing.attach`)."""
        self.sharing.attach(sequence, tokens, digests)

    def survey(self, sequence: Sequence, num_tokens: int) -> Need:
        """What admitting an attached sequence of `num_tokens` would take. Changes nothing."""
        slots = own_reclaimable = own_evictable = 0
        reclaimable, evictable = self.places.has_lower_copy[0].bit, self.places.only_copy[0].bit
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
                own_reclaimable += bool(chunk.queues & reclaimable)
                own_evictable += bool(chunk.queues & evictable)
            elif chunk.copy is None:  # (with a copy it is on its way up for another request)
                slots += 1
        return Need(slots + num_chunks, own_reclaimable, own_evictable, blocked, missing)

    @contextmanager
    def protected(self, sequence: Sequence) -> Iterator[None]:
        """Lease a sequence's own chunks while room is made for it: they are not room for itself."""
        chunks = [chunk for chunk in sequence.chunks if chunk is not None and not chunk.computing]
        # The leading chunk is the one that a victim queue offers. It leaves last, so no other is offered
        # meanwhile.
        for chunk in reversed(chunks):
            self.places.lease(chunk, +1)
        try:
            yield
        finally:
            for chunk in chunks:
                self.places.lease(chunk, -1)

    def admit(self, sequence: Sequence, num_tokens: int, digests: Tokens[bytes], now_s: float) -> Admission:
        """Lease every chunk of a sequence of `num_tokens`: swap in what lies below, take slots for the rest.

        The caller has seen by `survey` and `available` that there is room; all of it is taken here.
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
                digest = digests[position] if position < len(digests) else None
                self._begin_compute(sequence, position, digest, now_s)
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
        missing = tuple(missing_ranges(valid, num_tokens, size))
        return Admission(gpu_tokens, cpu_tokens, tuple(lower), missing, num_swapped_in)

    def grow(self, sequence: Sequence, now_s: float) -> int | None:
        """A first-tier slot for a leased sequence's next chunk; None (and no change) if there is none."""
        if self.room.available(0) == 0:
            return None
        sequence.chunks.append(None)
        return self._begin_compute(sequence, len(sequence.chunks) - 1, None, now_s)

    def commit(self, sequence: Sequence, start: int, stop: int, digests: Tokens[bytes]) -> None:
        """Tokens [start, stop) of a leased sequence have their KV; full chunks can be found from now on."""
        size = self.chunk_tokens
        # Nearly every decoded token: one more in a chunk that is neither new nor full.
        if stop - start == 1 and (valid := stop % size) > 1:
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
        """Give the leases of a sequence back. Chunks that are not computed yet are given up.

        Args:
            sequence: leased until now.
            tokens: its path. A longer sequence (the answer was cut at a stop string) is shortened to it. The
                tokens of a partial last chunk are remembered, to match it by at the next turn.
            digests: chain hashes of the path's full chunks.
            failed_s: when a failure ended it; None if none did.
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
        self.sharing.shorten(sequence, len(tokens))
        last = sequence.chunks[-1] if sequence.chunks else None
        if last is not None and last.num_tokens < self.chunk_tokens:
            start = last.index * self.chunk_tokens
            sequence.tail = tuple(tokens[start : start + last.num_tokens])
            sequence.tail_parent = digests[last.index - 1] if last.index else root_digest(sequence.key[0])
        self.keeps.extend(sequence)

    def slots_of(self, sequence: Sequence, first: int = 0) -> tuple[int, ...]:
        """First-tier slots of a leased sequence's chunks from position `first` on.

        For a chunk being swapped in: the slot that it is copied to.
        """
        slots = []
        for chunk in sequence.chunks[first:]:
            assert chunk is not None
            slot = chunk.slots[0] if chunk.slots[0] is not None or chunk.copy is None else chunk.copy.dst_slot
            assert slot is not None
            slots.append(slot)
        return tuple(slots)

    # -- hints

    def warm(self, sequence: Sequence, most: int, reserve: int, now_s: float) -> tuple[int, int]:
        """Swap an idle sequence's lower chunks in, leading ones first, into slots free or worth less.

        Begins at most `most` copies and leaves `reserve` slots of the first tier available. Returns how many
        copies it began, and how many chunks are left below.
        """
        below = [
            chunk
            for chunk in sequence.chunks
            if chunk is not None
            and not chunk.computing
            and chunk.slots[0] is None
            and (chunk.copy is None or chunk.copy.dst_tier)
        ]
        ready = [chunk for chunk in below if chunk.copy is None]
        places, begun = self.places, 0
        with self.protected(sequence):
            for chunk in ready[:most]:
                if self.room.available(0) <= reserve:
                    break
                if not places.pools[0].num_free:
                    queue = places.has_lower_copy[0]
                    victim = queue.worst(now_s)
                    assert victim is not None
                    if queue.worth(victim, now_s) >= queue.worth(chunk, now_s):
                        break
                self._begin_swap_in(chunk, now_s)
                begun += 1
        return begun, len(below) - begun

    def touch(self, sequence: Sequence, now_s: float) -> None:
        """The sequence counts as active now."""
        self._activity.change(sequence, 0, now_s)

    def idle(self, sequence: Sequence) -> int:
        """Evict a sequence's chunks first until its next activity. Returns how many chunks it has."""
        self._activity.set_idle(sequence)
        return sum(chunk is not None for chunk in sequence.chunks)

    # -- copies

    @property
    def copies(self) -> KeysView[int]:
        """Ids of the copies under way."""
        return self.places.copies.keys()

    def copy_ahead(self, share: float, max_in_flight: int, now_s: float, asked_for: int) -> None:
        """Copy chunks down before room is needed (`Room.copy_ahead`)."""
        self.room.copy_ahead(share, max_in_flight, now_s, asked_for)

    def has_copies_to_begin(self, share: float, max_in_flight: int) -> bool:
        """Whether `copy_ahead` would look for victims (`Room.has_copies_to_begin`)."""
        return self.room.has_copies_to_begin(share, max_in_flight)

    def finish_copy(self, copy_id: int) -> None:
        """A copy succeeded."""
        self.places.finish_copy(copy_id)

    def fail_copy(self, copy_id: int, source_lost: bool, now_s: float) -> tuple[Sequence, ...]:
        """A copy failed.

        Returns the leased sequences that needed it: the KV they computed over it is void.
        """
        record = self.places.copies[copy_id]
        chunk, upward = record.chunk, record.dst_tier < record.src_tier
        affected: tuple[Sequence, ...] = ()
        if upward and not record.orphan:
            affected = tuple(sequence for sequence in sequences_of(chunk) if sequence.leased)
            if source_lost:
                self.history.note(chunk, "failed", now_s)
        self.places.fail_copy(copy_id, source_lost)
        return affected

    def drop_unread(self, sequence: Sequence, now_s: float) -> None:
        """Drop a released sequence's chunks below the first tier: they are recomputed, not read again."""
        for chunk in list(sequence.chunks):
            if chunk is None or chunk.place in (None, 0) or chunk.leases or chunk.copy:
                continue
            self.keeps.lift_all(chunk)
            for tier in range(self.places.num_tiers - 1, (chunk.place or 0), -1):
                if chunk.slots[tier] is not None:
                    self.places.release_lower(chunk, tier)
            self.history.note(chunk, "failed", now_s)
            self.places.drop(chunk)

    def collect_moves(self) -> Moves:
        """The copies begun and slots reclaimed since the last call, and slots to wipe."""
        places = self.places
        begun_in, begun_out, reclaimed = places.collect()
        return Moves(begun_in, begun_out, reclaimed, places.wipes.collect())

    def settle_wipes(self, wiped: tuple[tuple[int, int], ...], error: str | None) -> str | None:
        """A plan's wipes are done, or failed with `error`. Returns why the engine must stop, or None."""
        return self.places.wipes.settle(wiped, error)

    # -- keeps

    def set_keep(self, sequence: Sequence, keep: bool) -> None:
        """Set or lift a keep: kept chunks may change tier but are never dropped.

        Raises:
            KeepRefused: the sequence's chunks would exceed the share of slots that keeps may hold.
        """
        if keep:
            self.keeps.set(sequence)
        else:
            self.keeps.lift(sequence)

    # -- inside

    def _begin_compute(self, sequence: Sequence, position: int, digest: bytes | None, now_s: float) -> int:
        chunk = Chunk(position, self.places.num_tiers, sequence, digest)
        slot = self.room.take(0, now_s)
        self.places.begin_compute(chunk, slot)
        sequence.chunks[position] = chunk
        if digest is not None:
            self.index.setdefault(
                digest, chunk
            )  # a request that needs the same chunk attaches to it and waits
        return slot

    def _begin_swap_in(self, chunk: Chunk, now_s: float) -> None:
        place = chunk.place
        assert place is not None
        self.places.begin_copy(chunk, place, 0, self.room.take(0, now_s))

    def _on_loss(self, chunk: Chunk) -> None:
        """A chunk was dropped or failed: its record goes, its sequences have a hole."""
        for sequence in self.sharing.lose(chunk):
            self._forget_if_empty(sequence)

    def _forget_if_empty(self, sequence: Sequence) -> None:
        if not sequence.chunks and not sequence.num_active:
            self.keeps.lift(sequence)
            if self.sequences.pop(sequence.key, None) is not None:
                self.namespaces.discard(sequence.key[0])
