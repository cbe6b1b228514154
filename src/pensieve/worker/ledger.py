"""Records which ranks have settled which copies.

Knows copy ids and ranks; never bytes, spans or processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pensieve.core.plan import CopyFailure, StepPlan


@dataclass(slots=True)
class _Fate:
    """What is known of one copy."""

    ranks: set[int] = field(default_factory=set)  # the ranks that have settled it
    failure: CopyFailure | None = None  # of all ranks on which it failed, in one; None if it failed on none


class CopyLedger:
    """Sole owner of the ranks' reports of copies under way.

    A copy is done when it is done on all ranks, and failed when it is failed on one.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._open: dict[int, _Fate] = {}  # by copy id

    @property
    def num_open(self) -> int:
        """Copies that some rank has not reported yet."""
        return len(self._open)

    @property
    def others_owe(self) -> bool:
        """Whether rank 0 has settled a copy that another rank has not reported yet."""
        return any(0 in fate.ranks for fate in self._open.values())

    def begin(self, plan: StepPlan) -> None:
        """Note that a plan's copies are under way."""
        for copy in (*plan.swap_in, *plan.swap_out):
            self._open[copy.copy_id] = _Fate()

    def settle(self, rank: int, done: Iterable[int], failed: Iterable[CopyFailure]) -> None:
        """Take a rank's report."""
        for copy_id in done:
            self._open[copy_id].ranks.add(rank)
        for failure in failed:
            fate = self._open[failure.copy_id]
            fate.ranks.add(rank)
            known = fate.failure
            own = CopyFailure(failure.copy_id, failure.source_lost, f"rank {rank}: {failure.message}")
            if known is not None:
                own = CopyFailure(
                    known.copy_id, known.source_lost or own.source_lost, f"{known.message}; {own.message}"
                )
            fate.failure = own

    def take(self) -> tuple[tuple[int, ...], tuple[CopyFailure, ...]]:
        """Take the copies that all ranks have reported since the last call: ids done, and failures."""
        settled = [copy_id for copy_id, fate in self._open.items() if len(fate.ranks) == self._num_ranks]
        fates = {copy_id: self._open.pop(copy_id).failure for copy_id in settled}
        done = tuple(copy_id for copy_id, failure in fates.items() if failure is None)
        return done, tuple(failure for failure in fates.values() if failure is not None)
