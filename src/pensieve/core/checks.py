"""Every invariant of the cache, verified from scratch. Slow on purpose: it trusts no counter and no index."""

from __future__ import annotations

from collections import Counter

from pensieve.core.cache import TieredCache
from pensieve.core.chunk import Chunk
from pensieve.core.sequence import Sequence, Sharers, sequences_of


def check(cache: TieredCache) -> None:
    """Verify every invariant of a cache.

    Raises:
        AssertionError: naming what disagrees.
    """
    chunks = _reachable(cache)
    _check_slots(cache, chunks)
    _check_sequences(cache, chunks)
    _check_queues(cache, chunks)
    _check_keeps(cache, chunks)


def _reachable(cache: TieredCache) -> set[Chunk]:
    chunks = {
        chunk for sequence in cache.sequences.values() for chunk in sequence.chunks if chunk is not None
    }
    for copy_id, record in cache.places.copies.items():
        assert record.copy_id == copy_id and record.chunk.copy is record, (
            f"copy {copy_id} and its chunk disagree"
        )
        assert record.orphan == (record.chunk not in chunks), (
            f"copy {copy_id}: orphan is {record.orphan}, {record.chunk!r}"
        )
        chunks.add(record.chunk)
    assert cache.places.num_chunks == len(chunks), (
        f"{cache.places.num_chunks} chunks counted, {len(chunks)} found"
    )
    return chunks


def _check_slots(cache: TieredCache, chunks: set[Chunk]) -> None:
    places = cache.places
    for tier, pool in enumerate(places.pools):
        taken: Counter[int] = Counter(slot for chunk in chunks if (slot := chunk.slots[tier]) is not None)
        taken.update(record.dst_slot for record in places.copies.values() if record.dst_tier == tier)
        twice = [slot for slot, times in taken.items() if times > 1]
        assert not twice, f"tier {tier}: slots {twice} belong to two chunks"
        free = pool.free_slots()
        both = free & taken.keys()
        assert not both, f"tier {tier}: slots {sorted(both)} are free and taken"
        assert len(free) == pool.num_free, f"tier {tier}: {len(free)} free slots, {pool.num_free} counted"
        assert len(free) + len(taken) == pool.num_slots, (
            f"tier {tier}: {pool.num_slots - len(free) - len(taken)} slots leaked"
        )
        places.wipes.check(tier, free)
    places.wipes.check_erasures(places.copies)
    assert places.marked <= chunks, f"marked chunks {places.marked - chunks} are gone"
    down = [0] * places.num_tiers
    for record in places.copies.values():
        down[record.src_tier] += record.src_tier < record.dst_tier
    assert down == places.copies_down, f"copies down {places.copies_down} counted, {down} found"


def _check_sequences(cache: TieredCache, chunks: set[Chunk]) -> None:
    size = cache.chunk_tokens
    owners: dict[Chunk, set[Sequence]] = {}
    leases: Counter[Chunk] = Counter()
    for key, sequence in cache.sequences.items():
        assert sequence.key == key
        assert sequence.chunks or sequence.num_active, f"{sequence!r} is empty and idle but still known"
        assert sequence.leased or not sequence.chunks or sequence.chunks[-1] is not None, (
            f"{sequence!r} ends in a hole"
        )
        for position, chunk in enumerate(sequence.chunks):
            if chunk is None:
                continue
            owners.setdefault(chunk, set()).add(sequence)
            leases[chunk] += sequence.leased
            assert chunk.index == position, f"{chunk!r} lies at position {position} of {sequence!r}"
            if not chunk.computing and chunk.num_tokens < size:
                later = sequence.chunks[position + 1 :]
                assert all(c is not None and c.computing for c in later), (
                    f"{chunk!r} is partial and not the last of {sequence!r}"
                )
    for chunk in chunks:
        assert 0 <= chunk.num_tokens <= size and (chunk.computing or chunk.num_tokens), (
            f"{chunk!r}: tokens out of range"
        )
        assert chunk.computing or any(slot is not None for slot in chunk.slots), f"{chunk!r} has no copy"
        assert not chunk.computing or (chunk.leases and chunk.copy is None), (
            f"{chunk!r} computes without a lease or with a copy"
        )
        assert chunk.leases == leases[chunk], f"{chunk!r}: {leases[chunk]} leased sequences"
        if chunk.leases and not chunk.computing:
            on_its_way = chunk.copy is not None and chunk.copy.dst_tier == 0
            unread = chunk.slots[0] is None
            assert not unread or on_its_way or chunk.copy is None, f"{chunk!r} leased, not in the first tier"
        if chunk.copy is not None and chunk.copy.orphan:
            continue
        assert set(sequences_of(chunk)) == owners[chunk], f"{chunk!r}: owner and sequences disagree"
        if isinstance(chunk.owner, Sharers):
            members = chunk.owner.members
            assert len(members) > 1, f"{chunk!r} is shared by one"
            assert chunk.digest is not None, f"{chunk!r} is shared but has no hash"
            assert chunk.computing or chunk.num_tokens == size, f"{chunk!r} is shared and partial"
            assert chunk.owner.num_active == sum(m.num_active for m in members), (
                f"{chunk!r}: sharers' activity"
            )
            assert chunk.owner.last_active_s >= max(m.last_active_s for m in members), (
                f"{chunk!r}: sharers' last activity"
            )
    namespaces = Counter(namespace for namespace, _ in cache.sequences)
    assert cache.namespaces.counts() == namespaces, (
        f"namespaces {cache.namespaces.counts()} counted, {dict(namespaces)} found"
    )
    for digest, chunk in cache.index.items():
        assert chunk in chunks and chunk.digest == digest, (
            f"the index finds {chunk!r} by a hash that is not its own"
        )
        assert chunk.computing or chunk.num_tokens == size, f"the index finds partial {chunk!r}"


def _check_queues(cache: TieredCache, chunks: set[Chunk]) -> None:
    places = cache.places
    for chunk in chunks:
        orphan = chunk.copy is not None and chunk.copy.orphan
        wanted = 0 if orphan else places.wanted_queues(chunk)
        assert chunk.queues == wanted, f"{chunk!r} is in queues {chunk.queues:b}, belongs in {wanted:b}"
    for tier in range(places.num_tiers):
        for queue in (places.has_lower_copy[tier], places.only_copy[tier]):
            members = [chunk for chunk in chunks if chunk.queues & queue.bit]
            assert queue.count == len(members), (
                f"queue {queue.bit:b}: {queue.count} counted, {len(members)} found"
            )
            for chunk in members:
                queue.check(chunk)
        assert places.duplicates[tier].count == sum(
            1 for c in chunks if c.queues & places.duplicates[tier].bit
        )


def _check_keeps(cache: TieredCache, chunks: set[Chunk]) -> None:
    keeps = cache.keeps
    counts: Counter[Chunk] = Counter()
    for sequence, held in keeps.held.items():
        assert sequence.kept and cache.sequences.get(sequence.key) is sequence, (
            f"a keep on the forgotten {sequence!r}"
        )
        for chunk in held:
            assert chunk in sequence.chunks, f"{chunk!r} is kept for {sequence!r} but not of it"
            counts[chunk] += 1
    for chunk in chunks:
        assert chunk.keeps == counts[chunk], f"{chunk!r}: {counts[chunk]} keeps"
    assert keeps.num_kept == len(counts), f"{keeps.num_kept} kept chunks counted, {len(counts)} found"
    assert keeps.num_kept <= keeps.limit, f"{keeps.num_kept} chunks kept, at most {keeps.limit} may be"
