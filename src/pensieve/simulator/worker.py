"""A worker that costs instead of computing. Knows plans, rates and virtual time; never tensors or why a plan
is as it is.

A step takes what the cost model says. Swap-ins come layer by layer while layers that are there are computed
(paper §4.3.3). Swap-outs go on in the background, one after the other, and wait for swap-ins (paper §5).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from pensieve.core.plan import Copy, SampledToken, StepPlan, StepResult
from pensieve.simulator.cost_model import CostModel, Overheads


class VirtualClock:
    """Seconds since the beginning of a simulation. Moved by the worker and the driver only, and never back."""

    __slots__ = ("now_s",)

    def __init__(self) -> None:
        self.now_s = 0.0

    def advance(self, to_s: float) -> None:
        """Move on to `to_s`."""
        assert to_s >= self.now_s, f"time would run backwards, from {self.now_s} to {to_s}"
        self.now_s = to_s


@dataclass(frozen=True, slots=True)
class Links:
    """How fast one chunk moves between tiers, and what both directions at once cost."""

    chunk_bytes: int  # over all layers
    host_bytes_per_s: float  # between the first tier and the second, each way
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    duplex_share: float  # of a direction's rate while the other is busy
    hold_back: bool = True  # swap-outs do not begin while a swap-in is under way
    host_down_bytes_per_s: float | None = None  # from the first tier to the second; None: as fast as up

    def up_s(self, tier: int) -> float:
        """Seconds for one chunk from `tier` to the first."""
        return self.chunk_bytes / (
            self.host_bytes_per_s if tier == 1 else min(self.host_bytes_per_s, self.disk_read_bytes_per_s)
        )

    def down_s(self, tier: int) -> float:
        """Seconds for one chunk from `tier` to the next."""
        host = self.host_down_bytes_per_s or self.host_bytes_per_s
        return self.chunk_bytes / (host if tier == 0 else self.disk_write_bytes_per_s)


@dataclass(slots=True)
class _Lane:
    """Downward copies out of one tier, one after the other."""

    waiting: deque[tuple[int, float, float]]  # (copy id, asked for at, seconds)
    current: int | None = None
    ends_s: float = 0.0  # of the current copy, or of the last

    def held_until(self, begin_s: float, end_s: float, share: float) -> None:
        """The other direction is busy in [begin_s, end_s): the current copy is slower in it."""
        if self.current is not None and self.ends_s > begin_s:
            self.ends_s += (min(self.ends_s, end_s) - begin_s) * (1.0 / share - 1.0)

    def next_s(self, not_before_s: float) -> float | None:
        """When the next copy is done, if none is asked for meanwhile; None: there is none."""
        if self.current is not None:
            return self.ends_s
        if not self.waiting:
            return None
        _, asked_s, seconds = self.waiting[0]
        return max(self.ends_s, asked_s, not_before_s) + seconds

    def settle(self, now_s: float, not_before_s: float) -> list[int]:
        """The copies done by `now_s`; those not begun yet begin at `not_before_s` at the earliest."""
        done: list[int] = []
        while True:
            if self.current is None:
                if not self.waiting:
                    return done
                copy_id, asked_s, seconds = self.waiting[0]
                begin_s = max(self.ends_s, asked_s, not_before_s)
                if begin_s >= now_s:
                    return done
                self.waiting.popleft()
                self.current, self.ends_s = copy_id, begin_s + seconds
            if self.ends_s > now_s:
                return done
            done.append(self.current)
            self.current = None


class CostWorker:
    """A `Worker` in virtual time. Each request's tokens are its prompt's last id over and over."""

    def __init__(
        self,
        cost: CostModel,
        links: Links,
        num_tiers: int,
        clock: VirtualClock,
        overheads: Overheads | None = None,
    ) -> None:
        self._cost, self._links, self._clock = cost, links, clock
        self._overheads = overheads or Overheads()
        self._lanes = [_Lane(deque()) for _ in range(max(0, num_tiers - 1))]
        self._tokens: dict[str, SampledToken] = {}
        self._free_from_s = 0.0  # swap-outs do not begin before
        self._num_requests = 0  # in the last step that computed
        self.busy_s = 0.0  # with steps that compute
        self.waited_s = 0.0  # of those, for swap-ins
        self.num_steps = 0  # that computed
        self.num_tokens = 0  # computed
        self.chunks_up: Counter[int] = Counter()  # by source tier
        self.chunks_down: Counter[int] = Counter()

    def run(self, plan: StepPlan) -> StepResult:
        """See `Worker`. Moves the clock on to when the step is over."""
        begin_s = self._clock.now_s
        for request_id in plan.ended:
            self._tokens.pop(request_id, None)
        for start in plan.started:
            self._tokens[start.request_id] = SampledToken(start.request_id, start.prompt[-1])
        copied_s = self._swap_in(plan.swap_in, begin_s)
        end_s = begin_s + self._computed_s(plan, copied_s)
        for copy in plan.swap_out:
            self._lanes[copy.src_tier].waiting.append(
                (copy.copy_id, begin_s, self._links.down_s(copy.src_tier))
            )
            self.chunks_down[copy.src_tier] += 1
        if plan.settles:
            last = {copy.src_tier for copy in plan.swap_out}
            end_s = max([end_s, *(self._lane_end_s(self._lanes[tier]) for tier in last)])
        self._clock.advance(end_s)
        done = [copy.copy_id for copy in plan.swap_in]
        for lane in self._lanes:
            done += lane.settle(end_s, self._free_from_s)
        tokens = self._tokens
        sampled = tuple([tokens[span.request_id] for span in plan.spans if span.emits_token])
        return StepResult(plan.step_id, sampled, tuple(done), seconds=end_s - begin_s if plan.spans else None)

    def committed_s(self, plan: StepPlan, num_ended: int) -> float:
        """Seconds from when the result of the plan that ran last is there to when the next step is planned."""
        if not plan.spans:
            return 0.0
        overheads = self._overheads
        return (
            overheads.commit_step_s
            + overheads.commit_request_s * self._num_requests
            + overheads.commit_end_s * num_ended
        )

    @property
    def next_settled_s(self) -> float | None:
        """When the next swap-out is done; None: none is under way."""
        return min(
            (at for lane in self._lanes if (at := lane.next_s(self._free_from_s)) is not None), default=None
        )

    def set_waker(self, wake: Callable[[], None]) -> None:
        """See `Worker`. Nobody sleeps in virtual time: the driver asks `next_settled_s`."""

    def close(self) -> None:
        """See `Worker`."""

    def _swap_in(self, copies: tuple[Copy, ...], begin_s: float) -> float:
        """Seconds until all these are up; swap-outs wait so long."""
        if not copies:
            return 0.0
        links = self._links
        seconds = 0.0
        for copy in copies:
            seconds += links.up_s(copy.src_tier)
            self.chunks_up[copy.src_tier] += 1
        lane = self._lanes[0]
        down_s = lane.ends_s - begin_s if lane.current is not None else 0.0
        if not links.hold_back and lane.waiting:
            down_s = seconds  # the other direction is busy all along
        # while both are busy each moves at `duplex_share`: what is done in `down_s` would have taken a share
        # of it
        shared_s = min(max(0.0, down_s), seconds / links.duplex_share)
        seconds += shared_s * (1.0 - links.duplex_share)
        lane.held_until(begin_s, begin_s + seconds, links.duplex_share)
        if links.hold_back:
            self._free_from_s = begin_s + seconds
        return seconds

    def _computed_s(self, plan: StepPlan, copied_s: float) -> float:
        if not plan.spans:
            return copied_s
        device_s = self._cost.step_s(plan.spans)
        self._num_requests = len({span.request_id for span in plan.spans})
        host_s = self._overheads.step_s + self._overheads.request_s * self._num_requests
        computed_s = device_s
        if copied_s:
            # layer i can be computed when it is copied and layer i - 1 is computed: all layers are alike, so
            # one of the two runs is the whole
            layers = self._cost.num_layers
            computed_s = max(copied_s / layers + device_s, copied_s + device_s / layers)
        self.busy_s += host_s + computed_s
        self.waited_s += computed_s - device_s
        self.num_steps += 1
        self.num_tokens += plan.num_tokens
        return host_s + computed_s

    def _lane_end_s(self, lane: _Lane) -> float:
        end_s = max(lane.ends_s, self._free_from_s) if lane.current is None else lane.ends_s
        for _, asked_s, seconds in lane.waiting:
            end_s = max(end_s, asked_s) + seconds
        return end_s
