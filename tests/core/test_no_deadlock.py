"""Random arrivals through tiny tiers: every request ends, every answer is what a fresh stateless run gives, nothing leaks."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fake_worker import FakeWorker, LateWorker, cells_of, expected_answer
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.checks import check
from pensieve.core.cost import CostProfile
from pensieve.core.pace import Pace
from pensieve.core.request import FinishReason, Request, SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.core.waiting import MAX_OVERTAKINGS
from pensieve.core.wipes import Erasure
from pensieve.errors import PensieveError, RequestTooLarge
from pensieve.simulator.policies import Setting, make_policy
from policy_worlds import ALL_POLICIES, some_time_later

CHUNK = 4
MAX_CONTEXT = 64


class World:
    """A scheduler, a fake worker, a virtual clock, and what each answer should be."""

    def __init__(
        self,
        rng: random.Random,
        tiers: list[int],
        policy: str,
        lag: int,
        *,
        failures: bool,
        retain: bool = True,
    ) -> None:
        config = CacheConfig(
            tuple(TierConfig(name, n) for name, n in zip(("gpu", "cpu", "disk"), tiers, strict=False)), CHUNK
        )
        cost = CostProfile([(CHUNK, 1.0), (MAX_CONTEXT, 3.0)], CHUNK)
        self.cache = TieredCache(
            config, make_policy(policy, Setting(cost.of_chunk, CHUNK, next_use_s=some_time_later))
        )
        budget = rng.choice([CHUNK + 4, 16, 64])
        in_ram = rng.random() < 0.5
        own = random.Random(rng.getstate()[1][0])  # (what it draws leaves the other's draws as they were)
        timed = own.random() < 0.5
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_batch_tokens=budget,
                max_running=rng.choice([1, 2, 4]),
                copies_first=in_ram,
                copy_ahead_share=0.0 if in_ram else 0.25,
                retain=retain,
                admission=own.choice(["work", "work", "fcfs"]),
                step_s=own.choice([0.01, 0.1, 3.0]) if timed else None,
            ),
            self.cache,
            MAX_CONTEXT,
            pace=Pace(cost) if timed else None,
        )
        worker = FakeWorker(
            tiers,
            CHUNK,
            rng=rng,
            swap_out_delay=rng.choice([0, 0, 3]),
            copy_failure_rate=0.1 if failures else 0.0,
            forward_failure_rate=0.02 if failures else 0.0,
        )
        if timed:
            worker.timing = lambda plan: own.choice([0.01, 0.02, 0.5]) + 0.001 * plan.num_tokens
        self.own = own
        self.late = LateWorker(worker, lag)
        self.rng = rng
        self.now_s = 100.0
        self.done: dict[str, Request] = {}
        self.failures = failures
        self.requests: dict[str, Request] = {}
        self.erasing: list[tuple[str, Erasure, set[int]]] = []
        self.num_erased = 0

    def step(self) -> bool:
        """One schedule and the commits that are due; False if nothing moved."""
        self.now_s += self.rng.choice([0.0, 0.001, 0.5, 30.0])
        plan = self.scheduler.schedule(self.now_s)
        check(self.cache)
        self.check_overtaking()
        self.late.submit(plan)
        self.check_zeros()
        idle = plan.is_empty
        for settled, result in self.late.ready(drain=idle):
            events = self.scheduler.commit(settled, result, self.now_s)
            check(self.cache)
            self.collect(events.finished)
            idle &= not (result.tokens or result.copies_done or result.copies_failed or events.finished)
        self.collect(self.scheduler.take_finished())
        # what two conversations shared, and both are to lose, goes with the second
        coming = set().union(*(cells for _, erasure, cells in self.erasing if not erasure.done))
        for name, erasure, cells in self.erasing:
            if erasure.done:
                self.num_erased += 1
                found = (
                    cells
                    & {cell for tier in self.late.worker.tiers for slot in tier for cell in slot}
                    - self.cells()
                    - coming
                )
                assert not found, f"{len(found)} cells of {name} are left"
        self.erasing = [item for item in self.erasing if not item[1].done]
        return not idle or bool(self.late.worker.settling)

    def check_zeros(self) -> None:
        """A slot said to be clean is zero (all plans made so far have run)."""
        wipes = self.cache.places.wipes
        for tier, slots in enumerate(self.late.worker.tiers):
            for slot, cells in enumerate(slots):
                assert wipes.is_dirty(tier, slot) or not any(cells), (
                    f"slot {slot} of tier {tier} is not zero: {cells}"
                )

    def submit(
        self, request_id: str, name: str, prompt: list[int], history: int, sampling: SamplingParams
    ) -> None:
        self.requests[request_id] = self.scheduler.submit(
            request_id, "n", name, tuple(prompt), history, sampling, self.now_s
        )

    def check_overtaking(self) -> None:
        """Bounded, and never rising along the queue."""
        counts = [request.num_overtaken for request in self.scheduler._lifecycle.waiting]
        assert all(count <= MAX_OVERTAKINGS for count in counts) and counts == sorted(counts, reverse=True), (
            counts
        )

    def cells(self, only: str | None = None) -> set[int]:
        """Every cell that the requests of a conversation, or of all, may have had."""
        chosen = [
            request for request in self.requests.values() if only is None or request.sequence_id == only
        ]
        cells: set[int] = set()
        for request in chosen:
            prompt = request.tokens[: request.num_prompt]
            cells.update(cells_of([*prompt, *expected_answer(prompt, request.sampling.max_new_tokens)])[0])
        return cells

    def erase(self, name: str) -> None:
        erasure = self.scheduler.forget("n", name, self.now_s, erase=True)
        while erasure is None:
            self.step()
            erasure = self.scheduler.forget("n", name, self.now_s, erase=True)
        own = self.cells(name)
        later = [request_id for request_id, request in self.requests.items() if request.sequence_id == name]
        for request_id in later:
            del self.requests[request_id]
        self.erasing.append((name, erasure, own))  # but for what others have, or a later turn computes anew

    def collect(self, finished: list[Request]) -> None:
        for request in finished:
            self.done[request.request_id] = request

    def run(self, limit: int = 4000) -> None:
        idle = 0
        for _ in range(limit):
            if not self.scheduler.requests:
                return
            idle = 0 if self.step() else idle + 1
            assert idle < 10, (
                f"deadlock: {[(r.request_id, r.state) for r in self.scheduler.requests.values()]}"
            )
        raise AssertionError("too many steps")


def check_answer(request: Request, vocab: int = 50) -> None:
    prompt = request.tokens[: request.num_prompt]
    want = expected_answer(prompt, request.sampling.max_new_tokens, vocab, request.sampling.stop_token_ids)
    if request.ending in (FinishReason.LENGTH, FinishReason.ABORT):
        assert request.output == want[: request.num_output]
    elif request.ending is FinishReason.STOP:
        assert request.output == want
    receipt = request.receipt
    served = receipt.gpu_tokens + receipt.cpu_tokens + receipt.recomputed_tokens + receipt.new_tokens
    assert not request.started or served == request.num_prompt
    misses = receipt.misses
    missed = [(miss.why, miss.stop - miss.start) for miss in misses]
    assert all(length > 0 for _, length in missed)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(misses))
    assert all((a.stop, a.why, a.by) != (b.start, b.why, b.by) for a, b in itertools.pairwise(misses)), (
        "not merged"
    )
    assert sum(length for why, length in missed if why == "on_cpu") == receipt.cpu_tokens
    assert (
        sum(length for why, length in missed if why != "on_cpu")
        == receipt.recomputed_tokens + receipt.new_tokens
    )
    for miss in misses:
        assert miss.why != "new" or miss.start >= request.history_tokens
        assert miss.why not in ("never_seen", "unfinished") or miss.stop <= request.history_tokens
        assert (miss.at_s is not None) == (miss.why in ("dropped", "failed"))


def play(seed: int, tiers: list[int], policy: str, lag: int, *, failures: bool, retain: bool = True) -> None:
    rng = random.Random(seed)
    world = World(rng, tiers, policy, lag, failures=failures, retain=retain)
    system = [rng.randrange(50) for _ in range(rng.choice([0, 3, 9]))]
    logs = {f"c{i}": list(system) for i in range(rng.randint(2, 6))}
    pending: dict[str, str] = {}
    for turn in range(rng.randint(4, 14)):
        name = rng.choice(sorted(logs))
        if rng.random() < 0.15 and logs[name]:
            logs[name] = logs[name][: rng.randrange(len(logs[name]))]  # a shortened history
        prompt = logs[name] + [rng.randrange(50) for _ in range(rng.randint(1, 14))]
        sampling = SamplingParams(
            max_new_tokens=rng.randint(1, 12),
            stop_token_ids=frozenset(rng.sample(range(50), rng.choice([0, 2]))),
        )
        request_id = f"r{turn}"
        try:
            world.submit(request_id, name, prompt, rng.randint(0, len(logs[name])), sampling)
        except PensieveError:
            logs[name] = list(system)
            continue
        pending[request_id] = name
        for _ in range(rng.choice([0, 1, 3, 50])):
            world.step()
        if rng.random() < 0.1:
            world.scheduler.abort(rng.choice(sorted(pending)), world.now_s)
        if rng.random() < 0.1:
            world.scheduler.forget("n", rng.choice(sorted(logs)), world.now_s)
        if rng.random() < 0.15 and retain:
            world.erase(rng.choice(sorted(logs)))
        if rng.random() < 0.3:
            warm = rng.choice([True, False])
            with contextlib.suppress(PensieveError):
                name = rng.choice(sorted(logs))
                if warm:
                    world.scheduler.warm("n", name, world.now_s)
                else:
                    world.scheduler.idle("n", name)
        if rng.random() < 0.2:
            with contextlib.suppress(PensieveError):
                world.scheduler.set_keep("n", rng.choice(sorted(logs)), rng.random() < 0.7)
        check(world.cache)
        for done_id, request in world.done.items():
            if done_id in pending and request.ending in (FinishReason.STOP, FinishReason.LENGTH):
                logs[pending.pop(done_id)] = list(request.tokens)
    world.run()
    for request in world.done.values():
        assert request.ending is not FinishReason.ERROR or world.failures, request.error
        check_answer(request)
    for name in logs:
        world.scheduler.forget("n", name, world.now_s)
    while world.step():
        pass
    check(world.cache)
    assert not world.cache.sequences and not world.cache.index
    assert not world.erasing
    for pool in world.cache.places.pools:
        assert pool.num_used == 0


@settings(max_examples=300, deadline=None)
@example(seed=19419, gpu=15, cpu=40, policy="arc", lag=0, failures=True)  # a swap-in failed, no span named it
@given(
    seed=st.integers(0, 1 << 32),
    gpu=st.integers(1, 20),
    cpu=st.sampled_from([0, 1, 3, 8, 40]),
    policy=st.sampled_from(ALL_POLICIES),
    lag=st.sampled_from([0, 0, 1, 2]),
    failures=st.booleans(),
)
def test_every_request_ends_with_the_stateless_answer(
    seed: int, gpu: int, cpu: int, policy: str, lag: int, failures: bool
) -> None:
    play(seed, [gpu, cpu] if cpu else [gpu], policy, lag, failures=failures)


def test_a_kept_chunk_is_anothers_for_a_turn_that_parts_from_it() -> None:
    play(
        712, [4], "belady", 0, failures=False
    )  # (was admitted to the queue as if it could have that chunk's slot, and waited for ever)


def test_who_waits_for_kept_chunks_is_looked_at_again_when_the_keep_ends_or_a_failed_tier_may_be_tried() -> (
    None
):
    play(921099, [7, 5, 30], "retention", 2, failures=True)  # (the head of the queue was not looked at again)


def test_what_two_erased_conversations_shared_goes_with_the_second() -> None:
    play(51292859, [9, 1], "t-lru", 1, failures=False)  # (was taken for bytes left by the first)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 32), gpu=st.integers(2, 12), lag=st.sampled_from([0, 2]), failures=st.booleans()
)
def test_a_third_tier_needs_no_change(seed: int, gpu: int, lag: int, failures: bool) -> None:
    play(seed, [gpu, 5, 30], "retention", lag, failures=failures)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), gpu=st.integers(2, 12))
def test_the_stateless_baseline_keeps_nothing(seed: int, gpu: int) -> None:
    play(seed, [gpu, 6], "retention", 0, failures=False, retain=False)


def test_a_prompt_that_cannot_fit_alone_is_refused_with_its_size() -> None:
    world = World(random.Random(1), [3, 4], "retention", 0, failures=False)
    with pytest.raises(RequestTooLarge, match=r"needs 4 chunks of 4, but the first tier has 3"):
        world.scheduler.submit("r", "n", "c", tuple(range(13)), 0, SamplingParams(), 0.0)
