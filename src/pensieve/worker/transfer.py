"""Copies chunks between tiers while the model computes.

Knows copies and stores; never plans, requests or attention.

One thread does all copies, on streams of their own (`worker/streams.py`). Swap-ins go layer by layer, so that
attention in layer l waits for that layer only (paper §4.3.3). Swap-outs go in whole slots, and none starts
while a swap-in is queued or under way: both directions at once slow each other (§5).

A copy comes after everything that the model computed before the copy was queued: a swap-out reads what was
written by then, and a swap-in writes where no forward reads any more.
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
from pensieve.worker.streams import Stream, Streams, on_device, streams_for

logger = logging.getLogger(__name__)


class SourceLost(Exception):
    """A copy failed because its source cannot be read, neither now nor later."""


class ChecksumDiffers(SourceLost):
    """The bytes that arrived are not those that were sent."""


class SwapIn:
    """The swap-ins of one plan, which a forward waits for layer by layer."""

    def __init__(self, copies: tuple[Copy, ...], num_layers: int, compute: Stream) -> None:
        self.copies = copies
        self._compute = compute
        self.failures: list[CopyFailure] = []  # complete once `wait` has returned
        self._num_layers = num_layers
        self._ready = num_layers if not copies else 0  # layers [0, _ready) may be read
        self._settled = not copies
        self._changed = threading.Condition()
        self._events: list[Any] = []  # one for each copied layer, of the stream that copies

    @property
    def failed_slots(self) -> frozenset[tuple[int, int]]:
        """(tier, slot) of each destination that holds nothing valid."""
        failed = {failure.copy_id for failure in self.failures}
        return frozenset((copy.dst_tier, copy.dst_slot) for copy in self.copies if copy.copy_id in failed)

    def wait_layer(self, layer: int) -> None:
        """Return when attention may read this layer.

        Waits for failed copies too, whose bytes are not valid.
        """
        if self._ready <= layer:
            with self._changed:
                self._changed.wait_for(lambda: self._ready > layer)
        if layer < len(self._events):
            self._compute.wait(self._events[layer])

    def wait(self) -> None:
        """Return when every copy has settled."""
        if not self._settled:
            with self._changed:
                self._changed.wait_for(lambda: self._settled)

    def layer_done(self, event: Any) -> None:
        """Note that one more layer has been copied once its stream has reached this event."""
        with self._changed:
            self._events.append(event)
            self._ready += 1
            self._changed.notify_all()

    def settle(self) -> None:
        """Note that every copy has succeeded or failed, and wake all waiting threads."""
        with self._changed:
            self._ready = self._num_layers
            self._settled = True
            self._changed.notify_all()


class Transfer:
    """The copying thread.

    Sole writer of lower tiers; writes the first tier only into the slots of swap-ins.
    """

    def __init__(
        self,
        stores: Sequence[KVStore],
        *,
        before_copy: Callable[[Copy], None] = lambda copy: None,
        streams: Streams | None = None,
        verify: bool = False,
    ) -> None:
        """Start the thread.

        Args:
            stores: the tiers, fastest first.
            before_copy: called for each copy; if it raises, only that copy fails.
            streams: for computing and copying; None takes those of the first tier's device.
            verify: compare checksums: a chunk that comes back changed from a lower tier is reported as lost.
        """
        self._stores = tuple(stores)
        self._num_layers = self._stores[0].num_layers
        self._before_copy = before_copy
        self._wake: Callable[[], None] = lambda: None
        self._device = self._stores[0].device
        self._streams = streams_for(self._device) if streams is None else streams
        # Checksums of what was sent, by (tier, slot) below the first tier; None without `verify`.
        self._sums: dict[tuple[int, int], int] | None = {} if verify else None
        lock = threading.Lock()  # guards everything below
        self._work = threading.Condition(lock)  # notified when there is work
        self._idle = threading.Condition(lock)  # notified when all work is done
        self._swap_ins: deque[tuple[SwapIn, Any]] = deque()  # with the event of what was computed before
        self._swap_outs: deque[tuple[Copy, Any]] = deque()
        self._done: list[int] = []
        self._failed: list[CopyFailure] = []
        self._copying = False
        self._num_steps = 0  # under way
        self._closing = False
        self._nothing = SwapIn((), self._num_layers, self._streams.compute)
        self._thread = threading.Thread(target=self._loop, name="pensieve-transfer", daemon=True)
        self._thread.start()

    def set_waker(self, wake: Callable[[], None]) -> None:
        """Set what the copying thread calls when a swap-out settles while no step is under way."""
        self._wake = wake

    def start(self, swap_in: tuple[Copy, ...], swap_out: tuple[Copy, ...]) -> SwapIn:
        """Queue a plan's copies. A step is under way until `end_step`."""
        # as in nearly every step: waking the thread would only cost the interpreter
        if not (swap_in or swap_out):
            with self._work:
                assert not self._closing, "the worker is closed"
                self._num_steps += 1
            return self._nothing
        ticket = SwapIn(swap_in, self._num_layers, self._streams.compute)
        computed = self._streams.compute.record()
        with self._work:
            assert not self._closing, "the worker is closed"
            self._num_steps += 1
            if swap_in:
                self._swap_ins.append((ticket, computed))
            self._swap_outs.extend((copy, computed) for copy in swap_out)
            self._work.notify()
        return ticket

    def wait(self) -> None:
        """Return when every copy queued so far has settled, or the thread has been told to close."""
        with self._idle:
            self._idle.wait_for(
                lambda: self._closing or not (self._copying or self._swap_ins or self._swap_outs)
            )

    def end_step(self) -> tuple[tuple[int, ...], tuple[CopyFailure, ...]]:
        """End the oldest step under way.

        Returns:
            The ids of the copies that were done since the last call, and the copies that failed.
        """
        with self._work:
            self._num_steps = max(0, self._num_steps - 1)
            done, self._done = tuple(self._done), []
            failed, self._failed = tuple(self._failed), []
        return done, failed

    def close(self) -> None:
        """Finish the copies under way, drop those queued, and join the thread. Safe to call twice."""
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
        """The next swap-outs between one pair of tiers.

        Few, so that a swap-in that arrives now waits briefly.
        """
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
            stream = self._streams.copy_in
            stream.wait(computed)
            moves = self._moves(good)
            for layer in range(self._num_layers):
                for move in moves:
                    stream.do(partial(move.layer, layer))
                ticket.layer_done(stream.record())
            arrived = self._checksums(stream, [(copy.dst_tier, copy.dst_slot) for copy in good])
            stream.drain()
            good = self._verified(good, arrived, failures)
        except Exception as error:  # no failure may hang the forward or fail another plan's copies
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
            stream = self._streams.copy_out
            stream.wait(computed)
            sent = self._checksums(stream, [(copy.src_tier, copy.src_slot) for copy in good])
            for move in self._moves(good):
                stream.do(move.whole)
            stream.drain()
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
        """The copies that the hook lets through; the others are appended to `failures`."""
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
        """One `SlotCopy` for each pair of tiers."""
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

    # -- checksums, if asked for

    def _checksums(self, stream: Stream, slots: list[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        """Tensors that hold the checksums once the stream has reached them, by (tier, slot).

        Empty without `verify`.
        """
        sums: dict[tuple[int, int], Any] = {}
        if self._sums is None:
            return sums

        def sum_up() -> None:
            for tier in {tier for tier, _ in slots}:
                own = [slot for slot_tier, slot in slots if slot_tier == tier]
                sums.update(
                    zip([(tier, slot) for slot in own], self._stores[tier].checksums(own), strict=True)
                )

        stream.do(sum_up)
        return sums

    def _verified(
        self, copies: list[Copy], found: dict[tuple[int, int], Any], failures: list[CopyFailure]
    ) -> list[Copy]:
        """The copies whose bytes have the checksum of their source, if it is known.

        The others are appended to `failures`.
        """
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
            message = f"slot {copy.src_slot} of tier {copy.src_tier} does not hold what was sent there"
            failures.append(_failure(copy, ChecksumDiffers(message)))
        return good

    def _remember(self, copies: list[Copy], sent: dict[tuple[int, int], Any]) -> None:
        """Keep the checksums of what the targets of good swap-outs hold now."""
        if self._sums is not None:
            for copy in copies:
                self._sums[copy.dst_tier, copy.dst_slot] = int(sent[copy.src_tier, copy.src_slot])


def _failure(copy: Copy, error: Exception) -> CopyFailure:
    return CopyFailure(copy.copy_id, isinstance(error, SourceLost), f"{type(error).__name__}: {error}")
