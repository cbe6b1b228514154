"""Times single steps of a worker, in rounds. Knows plans and clocks; never schedulers or profiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from pensieve.core.plan import BlockTableUpdate, Copy, RequestStart, Span, StepPlan, StepResult
from pensieve.core.request import SamplingParams
from pensieve.worker.worker import ModelWorker

COPIED_CHUNKS = 8
LEAST_S = 1e-9


@dataclass(slots=True)
class Timing:
    """A piece of work, and the seconds that it took in each round."""

    work: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """Seconds of the work, never 0."""
        return max(LEAST_S, statistics.median(self.seconds))

    def beyond_s(self, base: Timing) -> float:
        """Seconds that this work takes beyond another, at least 0: the median of the rounds' differences."""
        more = (own - other for own, other in zip(self.seconds, base.seconds, strict=True))
        return max(0.0, statistics.median(more))


class StepTimer:
    """Makes the work that is timed.

    Forwards and copies of one worker, on requests whose block tables it fills.
    """

    def __init__(
        self,
        worker: ModelWorker,
        vocab_size: int,
        device: torch.device,
        clock: Callable[[], float],
        *,
        num_slots: int,
        num_requests: int,
        spread_requests: int,
        table_chunks: int,
    ) -> None:
        """Start the requests.

        Args:
            worker: its first two tiers have `num_slots` slots, and at least `num_copied`.
            vocab_size: of the model; token ids lie below.
            device: of the model.
            clock: seconds.
            num_slots: of the first tier.
            num_requests: with a block table each.
            spread_requests: the first requests, of which no two read the same slots if there are enough.
            table_chunks: chunks of each block table; slots repeat if there are fewer.
        """
        self._worker, self._vocab_size, self._device, self._clock = worker, vocab_size, device, clock
        self.num_copied = min(num_slots, COPIED_CHUNKS)  # chunks of one copying work
        self._num_steps = self._num_copies = 0
        apart = num_slots // spread_requests + 1
        tables = [
            tuple((row * apart + index) % num_slots for index in range(table_chunks))
            for row in range(num_requests)
        ]
        self._run(
            (),
            started=tuple(RequestStart(_name(row), SamplingParams(), ()) for row in range(num_requests)),
            tables=tuple(BlockTableUpdate(_name(row), 0, table) for row, table in enumerate(tables)),
        )

    def forward(self, start: int, stop: int, *, requests: int = 1, emits_token: bool = False) -> Timing:
        """A forward over tokens `[start, stop)` of each of some requests."""
        ids = tuple(position * 7919 % self._vocab_size for position in range(start, stop))
        spans = tuple(Span(_name(row), start, stop, ids, emits_token) for row in range(requests))
        return Timing(lambda: self._run(spans))

    def copy(self, source: int, target: int) -> Timing:
        """Copying `num_copied` chunks from one tier to the other."""
        return Timing(lambda: self._copy(source, target))

    def run_rounds(self, timings: Iterable[Timing], repeats: int, tell: Callable[[str, float], None]) -> None:
        """Each piece of work once to warm up and then once a round.

        A machine that is slow for a while is slow for all of them.

        Args:
            timings: filled with `repeats` seconds each.
            repeats: rounds after the warm-up.
            tell: called with (what is run, share done).
        """
        timings = list(timings)
        for round_ in range(-1, repeats):
            what = "warm-up" if round_ < 0 else f"round {round_ + 1} of {repeats}"
            tell(what, max(0, round_) / (repeats + 1))
            for timing in timings:
                before_s = self._clock()
                timing.work()
                if round_ >= 0:
                    timing.seconds.append(self._clock() - before_s)

    def _copy(self, source: int, target: int) -> None:
        """Copy, and wait until everything has arrived."""
        copies = tuple(
            Copy(self._num_copies + slot, source, slot, target, slot) for slot in range(self.num_copied)
        )
        self._num_copies += self.num_copied
        waiting = {copy.copy_id for copy in copies}
        result = self._run((), swap_in=copies) if target == 0 else self._run((), swap_out=copies)
        while waiting := waiting - set(result.copies_done):
            if result.copies_failed:
                raise RuntimeError(f"a copy failed while measuring: {result.copies_failed[0].message}")
            time.sleep(20e-6)  # let the copying thread have the interpreter
            result = self._run(())

    def _run(
        self,
        spans: tuple[Span, ...],
        swap_in: tuple[Copy, ...] = (),
        swap_out: tuple[Copy, ...] = (),
        started: tuple[RequestStart, ...] = (),
        tables: tuple[BlockTableUpdate, ...] = (),
    ) -> StepResult:
        result = self._worker.run(
            StepPlan(self._num_steps, spans, swap_in, swap_out, started, tables, (), ())
        )
        self._num_steps += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if result.forward_error is not None:
            raise RuntimeError(f"a forward failed while measuring: {result.forward_error}")
        return result


def _name(row: int) -> str:
    return f"profile {row}"
