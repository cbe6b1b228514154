"""Where every chunk lies: slots, copies under way, leases.

Knows chunks and tiers; never tokens, policies' reasons or time.

Sole writer of `Chunk.slots`, `.copy`, `.computing`, `.leases`, `.queues` and of the pools. Part of
`TieredCache`.
"""

from __future__ import annotations

from collections.abc import Callable

from pensieve.config import CacheConfig
from pensieve.core.chunk import Chunk, ChunkEvent, CopyRecord
from pensieve.core.eviction import PolicyFactory
from pensieve.core.plan import Copy
from pensieve.core.pool import SlotPool
from pensieve.core.sequence import Sequence
from pensieve.core.victims import Duplicates, VictimQueue
from pensieve.core.wipes import Wipes


class Places:
    """The table of moves, carried out on slots. Every move is checked before anything changes."""

    def __init__(self, config: CacheConfig, policy: PolicyFactory, on_loss: Callable[[Chunk], None]) -> None:
        """`on_loss(chunk)` is called when a chunk that sequences still run through lost its last copy."""
        tiers = range(len(config.tiers))
        self.num_tiers = len(config.tiers)
        self.pools = [SlotPool(tier.num_slots) for tier in config.tiers]
        # By tier: chunks that also lie lower, reclaimed at no cost; and chunks to be copied down, released or
        # dropped.
        self.has_lower_copy = [VictimQueue(1 << (3 * tier), policy()) for tier in tiers]
        self.only_copy = [VictimQueue(2 << (3 * tier), policy()) for tier in tiers]
        self.duplicates = [Duplicates(4 << (3 * tier)) for tier in tiers]  # lower copies of leased chunks
        self.victim_queues = (*self.has_lower_copy, *self.only_copy)
        self._queue_of: dict[int, VictimQueue | Duplicates] = {q.bit: q for q in self.victim_queues}
        self._queue_of.update((queue.bit, queue) for queue in self.duplicates)
        combinations = range(1 << self.num_tiers)
        self._bits_idle = [self._bits_of(lies_in) for lies_in in combinations]
        self._bits_leased = [self._bits_of(lies_in, leased=True) for lies_in in combinations]
        self._bits_kept = [self._bits_of(lies_in, kept=True) for lies_in in combinations]
        self.copies: dict[int, CopyRecord] = {}  # under way, by copy id
        self.copies_down = [0] * self.num_tiers  # downward copies under way, by source tier
        self.failed_down = [0] * self.num_tiers  # downward copies that failed in a row, by target tier
        self._begun_in: list[Copy] = []  # since the last plan
        self._begun_out: list[Copy] = []
        self._reclaimed: list[tuple[int, int]] = []
        self.wipes = Wipes(tier.num_slots for tier in config.tiers)
        # Chunks that an erased conversation ran through: their slots are wiped when given back.
        self.marked: set[Chunk] = set()
        self.num_reclaimed = 0  # chunks since the start, as the next two
        self.num_dropped = 0
        self.num_copied_down = 0
        self.num_chunks = 0  # that exist now
        self.version = 0  # grows whenever a slot or a chunk may have become available
        self._on_loss = on_loss
        self._next_copy_id = 0

    # -- computing

    def begin_compute(self, chunk: Chunk, slot: int) -> None:
        """DROPPED -> COMPUTING in a first-tier slot already taken; leased once."""
        chunk.require(ChunkEvent.BEGIN_COMPUTE, 0, self._next_copy_below(chunk, 0))
        chunk.computing, chunk.slots[0], chunk.leases = True, slot, chunk.leases + 1
        self.wipes.taken(0, slot, to_compute=True)
        self.num_chunks += 1

    def finish_compute(self, chunk: Chunk, num_tokens: int) -> None:
        """COMPUTING -> first tier, with `num_tokens` valid."""
        chunk.require(ChunkEvent.FINISH_COMPUTE, 0, self._next_copy_below(chunk, 0))
        chunk.computing, chunk.num_tokens = False, num_tokens
        self.version += 1
        self.reindex(chunk)

    def fail_compute(self, chunk: Chunk) -> None:
        """COMPUTING -> DROPPED; the slot is free."""
        chunk.require(ChunkEvent.FAIL_COMPUTE, 0, self._next_copy_below(chunk, 0))
        self._lose(chunk)

    def append(self, chunk: Chunk, num_tokens: int) -> None:
        """More tokens became valid in the first tier; lower copies are stale and freed in the same move."""
        slots = chunk.slots
        if (
            chunk.copy is None
            and not chunk.computing
            and slots[0] is not None
            and slots.count(None) == self.num_tiers - 1
        ):
            # First tier -> first tier, nothing to free, no queue to change: nearly every decoded token.
            chunk.num_tokens = num_tokens
            return
        chunk.require(ChunkEvent.APPEND, 0, self._next_copy_below(chunk, 0))
        if chunk.copy is not None:
            chunk.copy.stale = True
        for tier in range(1, self.num_tiers):
            self._free_slot(chunk, tier)
        chunk.num_tokens = num_tokens
        self.reindex(chunk)

    # -- copies

    def begin_copy(self, chunk: Chunk, src_tier: int, dst_tier: int, dst_slot: int) -> Copy:
        """Start a copy into a slot already taken: down (a swap-out) or up to the first tier (a swap-in)."""
        if src_tier < dst_tier:
            chunk.require(ChunkEvent.BEGIN_SWAP_OUT, src_tier, dst_tier)
        else:
            chunk.require(ChunkEvent.BEGIN_SWAP_IN, dst_tier, src_tier)
        src_slot = chunk.slots[src_tier]
        assert src_slot is not None
        record = CopyRecord(self._next_copy_id, chunk, src_tier, dst_tier, dst_slot)
        self._next_copy_id += 1
        chunk.copy = record
        self.wipes.taken(dst_tier, dst_slot, to_compute=False)
        self.copies[record.copy_id] = record
        copy = Copy(record.copy_id, src_tier, src_slot, dst_tier, dst_slot)
        if src_tier < dst_tier:
            self.copies_down[src_tier] += 1
            if src_tier == 0 and isinstance(chunk.owner, Sequence):
                chunk.owner.num_copied_out += 1
            self._begun_out.append(copy)
        else:
            self._begun_in.append(copy)
        self.reindex(chunk)
        return copy

    def finish_copy(self, copy_id: int) -> CopyRecord:
        """A copy is done: its target is valid unless an append made it stale or the chunk is an orphan."""
        record = self._settle(copy_id, ChunkEvent.FINISH_SWAP_OUT, ChunkEvent.FINISH_SWAP_IN)
        chunk = record.chunk
        down = record.src_tier < record.dst_tier
        if record.orphan:
            self._forget_orphan(record)
        elif record.stale:
            self._release(chunk, record.dst_tier, record.dst_slot, copy_id)
            self.reindex(chunk)
        else:
            chunk.slots[record.dst_tier] = record.dst_slot
            self.num_copied_down += down
            self.reindex(chunk)
        if down:
            self.failed_down[record.dst_tier] = 0
        self.wipes.copy_settled(copy_id)
        return record

    def fail_copy(self, copy_id: int, source_lost: bool) -> CopyRecord:
        """A copy failed: its target slot is free. A swap-in whose source cannot be read loses the chunk."""
        record = self._settle(
            copy_id, ChunkEvent.FAIL_SWAP_OUT, ChunkEvent.LOSE if source_lost else ChunkEvent.FAIL_SWAP_IN
        )
        chunk = record.chunk
        self.failed_down[record.dst_tier] += record.src_tier < record.dst_tier
        if record.orphan:
            self._forget_orphan(record)
        else:
            self._release(chunk, record.dst_tier, record.dst_slot, copy_id)
            if record.dst_tier < record.src_tier and source_lost:
                self._lose(chunk)
            else:
                self.reindex(chunk)
        self.wipes.copy_settled(copy_id)
        return record

    def collect(self) -> tuple[tuple[Copy, ...], tuple[Copy, ...], tuple[tuple[int, int], ...]]:
        """Swap-ins and swap-outs begun, and slots reclaimed, since the last call."""
        begun = tuple(self._begun_in), tuple(self._begun_out), tuple(self._reclaimed)
        self._begun_in.clear()
        self._begun_out.clear()
        self._reclaimed.clear()
        return begun

    # -- giving slots away

    def reclaim(self, chunk: Chunk, tier: int) -> int:
        """Take a chunk's slot in `tier`; a lower copy of it stays. Returns the slot, still taken."""
        chunk.require(ChunkEvent.RECLAIM, tier, self._next_copy_below(chunk, tier))
        slot = chunk.slots[tier]
        assert slot is not None
        chunk.slots[tier] = None
        if chunk in self.marked:
            self.wipes.handed_over(tier, slot)
        self.num_reclaimed += 1
        self._reclaimed.append((tier, slot))
        self.reindex(chunk)
        return slot

    def release_upper(self, chunk: Chunk, tier: int) -> None:
        """Free a chunk's slot in `tier`; a lower copy of it stays."""
        chunk.require(ChunkEvent.RECLAIM, tier, self._next_copy_below(chunk, tier))
        self._free_slot(chunk, tier)
        self.num_reclaimed += 1
        self.reindex(chunk)

    def release_lower(self, chunk: Chunk, tier: int) -> None:
        """Free the copy in `tier` of a chunk that also lies in a faster one."""
        upper = tier - 1
        while upper > 0 and chunk.slots[upper] is None:
            upper -= 1
        chunk.require(ChunkEvent.RELEASE_LOWER, upper, tier)
        self._free_slot(chunk, tier)
        self.reindex(chunk)

    def drop(self, chunk: Chunk) -> None:
        """Free every copy of a chunk: its KV is lost."""
        place = chunk.place or 0
        chunk.require(ChunkEvent.DROP, place, self._next_copy_below(chunk, place))
        self.num_dropped += 1
        self._lose(chunk)

    def discard(self, chunk: Chunk) -> None:
        """No sequence runs through the chunk any more: free its slots now, or when its copy settles."""
        assert not chunk.leases, f"{chunk!r} discarded while leased"
        if chunk.copy is not None:
            chunk.copy.orphan = True
            self.leave_queues(chunk)
        else:
            self._free_all(chunk)

    # -- leases and queues

    def lease(self, chunk: Chunk, change: int) -> None:
        """Count one more or one fewer request that needs the chunk."""
        assert chunk.leases + change >= 0, f"{chunk!r}: a lease given back twice"
        chunk.leases += change
        self.version += change < 0
        self.reindex(chunk)

    def reindex(self, chunk: Chunk) -> None:
        """Put a chunk into exactly the queues that its state demands."""
        wanted = self.wanted_queues(chunk)
        changed = wanted ^ chunk.queues
        while changed:
            bit = changed & -changed
            changed ^= bit
            if wanted & bit:
                self._queue_of[bit].add(chunk)
            else:
                self._queue_of[bit].discard(chunk)

    def wanted_queues(self, chunk: Chunk) -> int:
        """The bits of the queues a chunk belongs to."""
        if chunk.computing or chunk.copy is not None:
            return 0
        lies_in, tier_bit = 0, 1
        for slot in chunk.slots:
            if slot is not None:
                lies_in |= tier_bit
            tier_bit += tier_bit
        return (self._bits_leased if chunk.leases else self._bits_kept if chunk.keeps else self._bits_idle)[
            lies_in
        ]

    def _bits_of(self, lies_in: int, *, leased: bool = False, kept: bool = False) -> int:
        """The bits of the queues for a chunk that lies in the tiers whose bits are set in `lies_in`."""
        tiers = [tier for tier in range(self.num_tiers) if lies_in & (1 << tier)]
        if not tiers:
            return 0
        if leased:
            return sum(self.duplicates[tier].bit for tier in tiers[1:]) if tiers[0] == 0 else 0
        *upper, lowest = tiers
        bits = sum(self.has_lower_copy[tier].bit for tier in upper)
        if lowest < self.num_tiers - 1 or not kept:
            bits |= self.only_copy[lowest].bit  # (a kept chunk stays in the last tier)
        return bits

    def leave_queues(self, chunk: Chunk) -> None:
        """Take a chunk out of its queues while its owner changes; `reindex` puts it back."""
        while chunk.queues:
            self._queue_of[chunk.queues & -chunk.queues].discard(chunk)

    # -- inside

    def _next_copy_below(self, chunk: Chunk, tier: int) -> int:
        last = self.num_tiers - 1
        if tier + 1 >= last:
            return last
        slots = chunk.slots
        for lower in range(tier + 1, last):
            if slots[lower] is not None:
                return lower
        return last if slots[last] is not None else tier + 1

    def _settle(self, copy_id: int, if_down: ChunkEvent, if_up: ChunkEvent) -> CopyRecord:
        record = self.copies[copy_id]
        if record.src_tier < record.dst_tier:
            record.chunk.require(if_down, record.src_tier, record.dst_tier)
            self.copies_down[record.src_tier] -= 1
        else:
            record.chunk.require(if_up, record.dst_tier, record.src_tier)
        del self.copies[copy_id]
        self.version += 1
        record.chunk.copy = None
        return record

    def _forget_orphan(self, record: CopyRecord) -> None:
        self._release(record.chunk, record.dst_tier, record.dst_slot, record.copy_id)
        self._free_all(record.chunk, record.copy_id)

    def _release(self, chunk: Chunk, tier: int, slot: int, copy_id: int | None = None) -> None:
        self.pools[tier].release(slot)
        self.wipes.released(tier, slot, erase=chunk in self.marked, copy_id=copy_id)
        self.version += 1

    def _free_slot(self, chunk: Chunk, tier: int, copy_id: int | None = None) -> None:
        slot = chunk.slots[tier]
        if slot is not None:
            chunk.slots[tier] = None
            self._release(chunk, tier, slot, copy_id)

    def _free_all(self, chunk: Chunk, copy_id: int | None = None) -> None:
        self.leave_queues(chunk)
        for tier in range(self.num_tiers):
            self._free_slot(chunk, tier, copy_id)
        chunk.computing, chunk.num_tokens = False, 0
        self.marked.discard(chunk)
        self.num_chunks -= 1

    def _lose(self, chunk: Chunk) -> None:
        self._free_all(chunk)
        chunk.leases = 0
        self._on_loss(chunk)
