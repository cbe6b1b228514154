"""Moves chunks between tiers while the model computes. Knows copies and stores; never plans, requests or attention.

One thread does all copies, on lanes of their own (`worker/lanes.py`: streams, where there is CUDA). Swap-ins go layer by layer, so that attention in
layer l waits for that layer only (paper §4.3.3), and always before swap-outs (§5: both directions at once slow each other): a swap-out never starts while
a swap-in is queued or under way. Swap-outs go in whole slots.

What a lane copies comes after everything the model computed before the copies were queued: a swap-out reads what was written by then, a swap-in writes
where nobody reads any more.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pensieve.core.plan import Copy, CopyFailure
from pensieve.worker.kv_store import PIECE_BYTES, KVStore, SlotCopy
from pensieve.worker.lanes import Lane, Lanes, lanes_for, on_device

logger = logging.getLogger(__name__)


class SourceLost(Exception):
    """A copy failed because its source cannot be read, now or later."""


class ChecksumDiffers(SourceLost):
    """What arrived is not what was sent."""


class SwapIn:
    """The swap-ins of one plan, as the forward sees them: layer by layer."""

    def __init__(self, copies: tuple[Copy, ...], num_layers: int, compute: Lane) -> None:
        self.copies = copies
        self._compute = compute
        self.failures: list[CopyFailure] = []  # complete once `wait` has returned
        self._num_layers = num_layers
        self._ready = num_layers if not copies else 0  # layers [0, _ready) may be read
        self._settled = not copies
        self._changed = threading.Condition()
        self._marks: list[Any] = []  # one a layer, of the lane that copies

    @property
    def failed_slots(self) -> frozenset[tuple[int, int]]:
        """(tier, slot) of each destination that holds nothing valid."""
        failed = {failure.copy_id for failure in self.failures}
        return frozenset((copy.dst_tier, copy.dst_slot) for copy in self.copies if copy.copy_id in failed)

    def wait_layer(self, layer: int) -> None:
        """Return when attention may read this layer. Failed copies are waited for like good ones: their bytes are not valid."""
        if self._ready <= layer:
            with self._changed:
                self._changed.wait_for(lambda: self._ready > layer)
        if layer < len(self._marks):
            self._compute.wait(self._marks[layer])

    def wait(self) -> None:
        """Return when every copy has settled."""
        if not self._settled:
            with self._changed:
                self._changed.wait_for(lambda: self._settled)

    def layer_done(self, mark: Any) -> None:
        """One more layer will have been copied when its lane has reached this mark."""
        with self._changed:
            self._marks.append(mark)
            self._ready += 1
            self._changed.notify_all()

    def settle(self) -> None:
        """Nothing more will come, good or bad: let everybody go on."""
        with self._changed:
            self._ready = self._num_layers
            self._settled = True
            self._changed.notify_all()


class Transfer:
    """The copying thread. Sole writer of lower tiers; writes the first tier only where a swap-in says so."""

    def __init__(
        self,
        stores: Sequence[KVStore],
        *,
        before_copy: Callable[[Copy], None] = lambda copy: None,
        lanes: Lanes | None = None,
        verify: bool = False,
    ) -> None:
        """Start the thread.

        Args:
            stores: the tiers, fastest first.
            before_copy: called for each copy; when it raises, that copy fails and the others go on.
            lanes: what computes and copies; by default those of the first tier's device.
            verify: compare checksums: what comes back from a lower tier and is not what was sent there is lost, and said so.
        """
        self._stores = tuple(stores)
        self._num_layers = self._stores[0].num_layers
        self._before_copy = before_copy
        self._wake: Callable[[], None] = lambda: None
        self._device = self._stores[0].device
        self._lanes = lanes_for(self._device) if lanes is None else lanes
        self._sums: dict[tuple[int, int], int] | None = (
            {} if verify else None
        )  # of what was sent, by (tier, slot) below the first
        lock = threading.Lock()  # guards everything below
        self._work = threading.Condition(lock)  # there is something to do
        self._idle = threading.Condition(lock)  # there is nothing to do any more
        self._swap_ins: deque[tuple[SwapIn, Any]] = deque()  # with the mark of what was computed before
        self._swap_outs: deque[tuple[Copy, Any]] = deque()
        self._done: list[int] = []
        self._failed: list[CopyFailure] = []
        self._copying = False
        self._num_steps = 0  # under way
        self._closing = False
        self._nothing = SwapIn((), self._num_layers, self._lanes.compute)
        self._thread = threading.Thread(target=self._loop, name="pensieve-transfer", daemon=True)
        self._thread.start()

    def set_waker(self, wake: Callable[[], None]) -> None:
        """`wake` is called, from the copying thread, when a swap-out settles between `end_step` and the next `start`."""
        self._wake = wake

    def start(self, swap_in: tuple[Copy, ...], swap_out: tuple[Copy, ...]) -> SwapIn:
        """Queue a plan's copies; a step is under way from now on."""
        if not (
            swap_in or swap_out
        ):  # as in nearly every step: the thread is left asleep, it would only ask for the interpreter
            with self._work:
                assert not self._closing, "the worker is closed"
                self._num_steps += 1
            return self._nothing
        ticket = SwapIn(swap_in, self._num_layers, self._lanes.compute)
        computed = self._lanes.compute.mark()
        with self._work:
            assert not self._closing, "the worker is closed"
            self._num_steps += 1
            if swap_in:
                self._swap_ins.append((ticket, computed))
            self._swap_outs.extend((copy, computed) for copy in swap_out)
            self._work.notify()
        return ticket

    def wait(self) -> None:
        """Return when every copy queued so far has settled (or will not be begun any more: see `close`)."""
        with self._idle:
            self._idle.wait_for(
                lambda: self._closing or not (self._copying or self._swap_ins or self._swap_outs)
            )

    def end_step(self) -> tuple[tuple[int, ...], tuple[CopyFailure, ...]]:
        """What settled since the last call: ids of good copies, and failures. The oldest step under way is over."""
        with self._work:
            self._num_steps = max(0, self._num_steps - 1)
            done, self._done = tuple(self._done), []
            failed, self._failed = tuple(self._failed), []
        return done, failed

    def close(self) -> None:
        """Finish the copies under way, leave those queued, and join the thread. Safe to call twice."""
        with self._work:
            self._closing = True
            self._work.notify()
            self._idle.notify_all()
        self._thread.join()

    # -- the thread

    def _loop(self) -> None:
        with on_device(self._device):
            while True:
                with self._work:
                    self._copying = False
                    if not (self._swap_ins or self._swap_outs):
                        self._idle.notify_all()
                    self._work.wait_for(lambda: self._closing or self._swap_ins or self._swap_outs)
                    if self._closing:
                        break
                    self._copying = True
                    ticket, computed = self._swap_ins.popleft() if self._swap_ins else (None, None)
                    piece, outs_computed = self._take_piece() if ticket is None else ([], None)
                if ticket is not None:
                    self._run_swap_in(ticket, computed)
                else:
                    self._run_swap_outs(piece, outs_computed)
        for ticket, _ in self._swap_ins:
            ticket.settle()

    def _take_piece(self) -> tuple[list[Copy], Any]:
        """The next swap-outs between one pair of tiers, few enough that a swap-in arriving now waits for little."""
        first, computed = self._swap_outs.popleft()
        piece = [first]
        most = max(1, PIECE_BYTES // self._stores[0].slot_bytes)
        while self._swap_outs and len(piece) < most:
            copy, after = self._swap_outs[0]
            if (copy.src_tier, copy.dst_tier) != (first.src_tier, first.dst_tier):
                break
            self._swap_outs.popleft()
            piece.append(copy)
            computed = after  # the later event covers the earlier ones
        return piece, computed

    def _run_swap_in(self, ticket: SwapIn, computed: Any) -> None:
        failures: list[CopyFailure] = []
        good: list[Copy] = []
        try:
            good = self._admit(ticket.copies, failures)
            lane = self._lanes.copy_in
            lane.wait(computed)
            moves = self._moves(good)
            for layer in range(self._num_layers):
                for move in moves:
                    lane.do(partial(move.layer, layer))
                ticket.layer_done(lane.mark())
            arrived = self._checksums(lane, [(copy.dst_tier, copy.dst_slot) for copy in good])
            lane.drain()
            good = self._verified(good, arrived, failures)
        except (
            Exception
        ) as error:  # whatever it was, it must not hang the forward or take other batches along
            failures += [_failure(copy, error) for copy in good]
            good = []
        ticket.failures = failures
        with self._work:
            self._done += [copy.copy_id for copy in good]
            self._failed += failures
        ticket.settle()

    def _run_swap_outs(self, piece: list[Copy], computed: Any) -> None:
        failures: list[CopyFailure] = []
        good: list[Copy] = []
        try:
            good = self._admit(piece, failures)
            lane = self._lanes.copy_out
            lane.wait(computed)
            sent = self._checksums(lane, [(copy.src_tier, copy.src_slot) for copy in good])
            for move in self._moves(good):
                lane.do(move.whole)
            lane.drain()
            good = self._verified(good, sent, failures)
            self._remember(good, sent)
        except Exception as error:
            failures += [_failure(copy, error) for copy in good]
            good = []
        with self._work:
            self._done += [copy.copy_id for copy in good]
            self._failed += failures
            wake = self._num_steps == 0
        if wake:
            try:
                self._wake()
            except Exception:  # the waker's bug must not end all copying
                logger.exception("the waker of finished swap-outs raised")

    def _admit(self, copies: Sequence[Copy], failures: list[CopyFailure]) -> list[Copy]:
        """The copies whose hook lets them; the others are failures."""
        good = []
        for copy in copies:
            try:
                self._before_copy(copy)
            except Exception as error:
                failures.append(_failure(copy, error))
            else:
                good.append(copy)
        return good

    def _moves(self, copies: Sequence[Copy]) -> list[SlotCopy]:
        """What is to be moved between each pair of tiers."""
        by_pair: dict[tuple[int, int], list[Copy]] = {}
        for copy in copies:
            by_pair.setdefault((copy.src_tier, copy.dst_tier), []).append(copy)
        return [
            SlotCopy(
                self._stores[source],
                [copy.src_slot for copy in pair],
                self._stores[target],
                [copy.dst_slot for copy in pair],
            )
            for (source, target), pair in by_pair.items()
        ]

    # -- checksums, where they are asked for

    def _checksums(self, lane: Lane, places: list[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        """By (tier, slot), a tensor that will hold the checksum when the lane has come so far; nothing where nobody asks."""
        sums: dict[tuple[int, int], Any] = {}
        if self._sums is None:
            return sums

        def reckon() -> None:
            for tier in {tier for tier, _ in places}:
                slots = [slot for place, slot in places if place == tier]
                sums.update(
                    zip([(tier, slot) for slot in slots], self._stores[tier].checksums(slots), strict=True)
                )

        lane.do(reckon)
        return sums

    def _verified(
        self, copies: list[Copy], found: dict[tuple[int, int], Any], failures: list[CopyFailure]
    ) -> list[Copy]:
        """The copies whose bytes are those that were once sent to their source, as far as that is known. The others are failures."""
        if self._sums is None:
            return copies
        good = []
        for copy in copies:
            expected = self._sums.get((copy.src_tier, copy.src_slot))
            here: Any = found.get((copy.dst_tier, copy.dst_slot), found.get((copy.src_tier, copy.src_slot)))
            if expected is None or copy.src_tier == 0 or expected == int(here):
                good.append(copy)
                continue
            logger.warning(
                "slot %d of tier %d does not hold what was sent there: it will be computed again",
                copy.src_slot,
                copy.src_tier,
            )
            failures.append(
                _failure(
                    copy,
                    ChecksumDiffers(
                        f"slot {copy.src_slot} of tier {copy.src_tier} does not hold what was sent there"
                    ),
                )
            )
        return good

    def _remember(self, copies: list[Copy], sent: dict[tuple[int, int], Any]) -> None:
        """What the targets of good swap-outs hold from now on."""
        if self._sums is not None:
            for copy in copies:
                self._sums[copy.dst_tier, copy.dst_slot] = int(sent[copy.src_tier, copy.src_slot])


def _failure(copy: Copy, error: Exception) -> CopyFailure:
    return CopyFailure(copy.copy_id, isinstance(error, SourceLost), f"{type(error).__name__}: {error}")
