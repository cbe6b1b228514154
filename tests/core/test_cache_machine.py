"""The cache as a state machine: any order of turns, copies, failures, keeps and deletions; `check()` after every step."""

from __future__ import annotations

import contextlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pensieve.config import CacheConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.checks import check
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import PolicyFactory, RetentionValue
from pensieve.core.sequence import Sequence, extend_digests
from pensieve.core.wipes import Erasure
from pensieve.errors import KeepRefused

SIZE = 4
NAMES = ["a", "b", "c", "d"]
COST = CostProfile([(4, 1.0), (64, 4.0)], SIZE)


def digests_of(namespace: str, tokens: list[int]) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, namespace, tokens, SIZE)
    return digests


class CacheMachine(RuleBasedStateMachine):
    offered = True  # by a server, which promises to evict an idle conversation first

    def __init__(self) -> None:
        super().__init__()
        config = CacheConfig((TierConfig("gpu", 9), TierConfig("cpu", 6)), SIZE, keep_share=0.5)
        self.cache = TieredCache(config, self.policy())
        self.now_s = 0.0
        self.logs: dict[str, list[int]] = {name: [1, 2, 3, 4, 5] for name in NAMES}
        self.running: dict[str, tuple[Sequence, list[int]]] = {}
        self.uncomputed: dict[str, list[tuple[int, int]]] = {}
        self.plans: list[tuple[tuple[int, int], ...]] = []  # wipes of plans not committed yet
        self.erasures: list[Erasure] = []

    def policy(self) -> PolicyFactory:
        return lambda: RetentionValue(COST.of_chunk)

    @rule(
        name=st.sampled_from(NAMES),
        new=st.lists(st.integers(0, 3), min_size=1, max_size=9),
        cut=st.integers(0, 12),
    )
    def begin_turn(self, name: str, new: list[int], cut: int) -> None:
        if name in self.running:
            return
        log = self.logs[name]
        tokens = (log[: len(log) - cut] if cut > 8 else log) + new
        if len(tokens) > 9 * SIZE:
            tokens = tokens[: SIZE + 1]
        digests = digests_of("n", tokens)
        sequence = self.cache.open("n", name, self.now_s)
        self.cache.attach(sequence, tokens, digests)
        need = self.cache.survey(sequence, len(tokens))
        fits = not need.blocked and self.cache.room.available(0) - need.own_reclaimable >= need.slots
        if not fits:
            with self.cache.protected(sequence):
                self.cache.room.make(0, need.slots, self.now_s)
                fits = not need.blocked and self.cache.room.available(0) >= need.slots
        if not fits:
            self.cache.close(sequence, self.now_s)
            return
        admission = self.cache.admit(sequence, len(tokens), digests, self.now_s)
        computed = sum(stop - start for start, stop in admission.missing)
        assert admission.gpu_tokens + admission.cpu_tokens + computed == len(tokens)
        assert admission.missing[-1][1] == len(tokens)
        self.running[name] = (sequence, tokens)
        self.uncomputed[name] = list(admission.missing)
        for copy in list(self.cache.places.copies.values()):  # a worker settles swap-ins within the step
            if copy.dst_tier == 0:
                self.cache.finish_copy(copy.copy_id)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), extra=st.integers(0, 6))
    def compute_and_decode(self, data: st.DataObject, extra: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        sequence, tokens = self.running[name]
        for start, stop in self.uncomputed.pop(name, []):
            self.cache.commit(sequence, start, stop, digests_of("n", tokens))
        for _ in range(extra):
            if (
                len(tokens) % SIZE == 0
                and len(tokens) // SIZE == len(sequence.chunks)
                and self.cache.grow(sequence, self.now_s) is None
            ):
                return
            tokens.append(data.draw(st.integers(0, 3)))
            self.cache.commit(sequence, len(tokens) - 1, len(tokens), digests_of("n", tokens))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), stop=st.booleans())
    def end_turn(self, data: st.DataObject, stop: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        sequence, tokens = self.running.pop(name)
        self.uncomputed.pop(name, None)
        if stop:
            del tokens[max(1, len(tokens) - 3) :]
        self.cache.release(sequence, tokens, digests_of("n", tokens))
        self.cache.close(sequence, self.now_s)
        self.logs[name] = tokens

    @rule(data=st.data(), fails=st.booleans(), lost=st.booleans())
    def settle_a_copy(self, data: st.DataObject, fails: bool, lost: bool) -> None:
        if self.cache.places.copies:
            copy_id = data.draw(st.sampled_from(sorted(self.cache.places.copies)))
            if fails:
                self.cache.fail_copy(copy_id, lost, self.now_s)
            else:
                self.cache.finish_copy(copy_id)

    @rule(seconds=st.sampled_from([0.0, 0.5, 60.0]))
    def copy_ahead(self, seconds: float) -> None:
        self.now_s += seconds
        self.cache.room.copy_ahead(0.5, 8, self.now_s)

    @rule(slots=st.integers(1, 9))
    def make_room(self, slots: int) -> None:
        self.cache.room.make(0, slots, self.now_s)

    @rule(name=st.sampled_from(NAMES), keep=st.booleans())
    def keep(self, name: str, keep: bool) -> None:
        sequence = self.cache.find("n", name)
        if sequence is not None:
            with contextlib.suppress(KeepRefused):
                self.cache.set_keep(sequence, keep)

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: str) -> None:
        sequence = self.cache.find("n", name)
        if sequence is not None and name not in self.running:
            self.cache.forget(sequence)

    @rule(name=st.sampled_from(NAMES), most=st.integers(1, 4), reserve=st.integers(0, 3))
    def warm(self, name: str, most: int, reserve: int) -> None:
        sequence = self.cache.find("n", name)
        if sequence is None:
            return
        self.cache.touch(sequence, self.now_s)
        before = self.cache.room.available(0)
        dropped = self.cache.places.num_dropped
        begun, left = self.cache.warm(sequence, most, reserve, self.now_s)
        assert begun <= most
        assert self.cache.places.num_dropped == dropped, "a hint evicted a chunk"
        assert begun == 0 or self.cache.room.available(0) >= min(before, reserve)
        assert left >= 0
        assert name not in self.running or begun == 0

    @rule(name=st.sampled_from(NAMES))
    def idle(self, name: str) -> None:
        sequence = self.cache.find("n", name)
        if sequence is not None and name not in self.running:
            self.cache.idle(sequence)
            chunks = [
                c
                for c in sequence.chunks
                if c is not None and c.owner is sequence and c.queues & self.cache.places.only_copy[0].bit
            ]
            worst = self.cache.places.only_copy[0].worst(self.now_s)
            assert (
                not self.offered
                or not chunks
                or (worst is not None and worst.owner.last_active_s == sequence.last_active_s)
            ), "others would go before it"

    @rule(name=st.sampled_from(NAMES))
    def erase(self, name: str) -> None:
        if name not in self.running:
            self.erasures.append(self.cache.erase(self.cache.find("n", name)))

    @rule()
    def make_a_plan(self) -> None:
        self.plans.append(self.cache.collect_moves().wiped)

    @precondition(lambda self: self.plans)
    @rule(fails=st.booleans())
    def commit_a_plan(self, fails: bool) -> None:
        self.cache.places.wipes.settle(self.plans.pop(0), "injected" if fails else None)

    @invariant()
    def everything_agrees(self) -> None:
        check(self.cache)

    @invariant()
    def every_queue_offers_what_brute_force_over_all_its_chunks_finds(self) -> None:
        places = self.cache.places
        chunks = {
            chunk
            for sequence in self.cache.sequences.values()
            for chunk in sequence.chunks
            if chunk is not None
        }
        for queue in (*places.has_lower_copy, *places.only_copy):
            members = [chunk for chunk in chunks if chunk.queues & queue.bit]
            worst = queue.worst(self.now_s)
            assert (worst is None) == (not members)
            if worst is not None:
                lowest = min(queue.worth(chunk, self.now_s) for chunk in members)
                assert worst in members
                worth = queue.worth(worst, self.now_s)
                assert worth == lowest or abs(worth - lowest) <= 1e-9 * abs(lowest)

    def teardown(self) -> None:
        for name in list(self.running):
            sequence, tokens = self.running.pop(name)
            self.cache.release(sequence, tokens, digests_of("n", tokens))
            self.cache.close(sequence, self.now_s)
        for sequence in list(self.cache.sequences.values()):
            self.cache.forget(sequence)
        for copy_id in list(self.cache.places.copies):
            self.cache.finish_copy(copy_id)
        for _ in range(4):
            self.plans.append(self.cache.collect_moves().wiped)
            for wiped in self.plans:
                self.cache.places.wipes.settle(wiped, None)
            self.plans.clear()
        assert all(erasure.done for erasure in self.erasures)
        check(self.cache)
        assert [pool.num_used for pool in self.cache.places.pools] == [0, 0], "slots leaked"
        assert not self.cache.sequences and not self.cache.index


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
