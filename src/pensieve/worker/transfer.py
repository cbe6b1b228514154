"""Moves chunks between tiers while the model computes. Knows copies and stores; never plans, requests or attention.

One thread does all copies, on a stream of its own where there is CUDA. Swap-ins go layer by layer, so that attention in layer l waits
for that layer only (paper §4.3.3), and always before swap-outs (§5: both directions at once slow each other): a swap-out never starts
while a swap-in is queued or under way. Swap-outs go in whole slots.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from pensieve.core.plan import Copy, CopyFailure
from pensieve.worker.kv_store import PIECE_BYTES, KVStore, copy_slots

logger = logging.getLogger(__name__)


class SourceLost(Exception):
    """A copy failed because its source cannot be read, now or later."""


class SwapIn:
    """The swap-ins of one plan, as the forward sees them: layer by layer."""

    def __init__(self, copies: tuple[Copy, ...], num_layers: int) -> None:
        self.copies = copies
        self.failures: list[CopyFailure] = []  # complete once `wait` has returned
        self._num_layers = num_layers
        self._ready = num_layers if not copies else 0  # layers [0, _ready) may be read
        self._settled = not copies
        self._changed = threading.Condition()
        self._events: list[torch.cuda.Event] = []  # one a layer, where copies run on a stream

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
        if layer < len(self._events):
            torch.cuda.current_stream().wait_event(self._events[layer])

    def wait(self) -> None:
        """Return when every copy has settled."""
        if not self._settled:
            with self._changed:
                self._changed.wait_for(lambda: self._settled)

    def layer_done(self, event: torch.cuda.Event | None) -> None:
        """One more layer was copied (or, with an event, will have been when it fires)."""
        with self._changed:
            if event is not None:
                self._events.append(event)
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

    def __init__(self, stores: Sequence[KVStore], *, before_copy: Callable[[Copy], None] = lambda copy: None) -> None:
        """`before_copy` is called for each copy; when it raises, that copy fails and the others go on."""
        self._stores = tuple(stores)
        self._num_layers = self._stores[0].num_layers
        self._before_copy = before_copy
        self._wake: Callable[[], None] = lambda: None
        self._device = self._stores[0].device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        lock = threading.Lock()  # guards everything below
        self._work = threading.Condition(lock)  # there is something to do
        self._idle = threading.Condition(lock)  # there is nothing to do any more
        self._swap_ins: deque[tuple[SwapIn, torch.cuda.Event | None]] = deque()
        self._swap_outs: deque[tuple[Copy, torch.cuda.Event | None]] = deque()
        self._done: list[int] = []
        self._failed: list[CopyFailure] = []
        self._copying = False
        self._in_step = False
        self._closing = False
        self._nothing = SwapIn((), self._num_layers)
        self._thread = threading.Thread(target=self._loop, name="pensieve-transfer", daemon=True)
        self._thread.start()

    def set_waker(self, wake: Callable[[], None]) -> None:
        """`wake` is called, from the copying thread, when a swap-out settles between `end_step` and the next `start`."""
        self._wake = wake

    def start(self, swap_in: tuple[Copy, ...], swap_out: tuple[Copy, ...]) -> SwapIn:
        """Queue a plan's copies; a step is under way from now on."""
        if not (swap_in or swap_out):  # as in nearly every step: the thread is left asleep, it would only ask for the interpreter
            with self._work:
                assert not self._closing, "the worker is closed"
                self._in_step = True
            return self._nothing
        ticket = SwapIn(swap_in, self._num_layers)
        computed = None  # what the device computes until here comes before these copies
        if self._stream is not None:
            computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            computed.record(torch.cuda.current_stream(self._device))
        with self._work:
            assert not self._closing, "the worker is closed"
            self._in_step = True
            if swap_in:
                self._swap_ins.append((ticket, computed))
            self._swap_outs.extend((copy, computed) for copy in swap_out)
            self._work.notify()
        return ticket

    def wait(self) -> None:
        """Return when every copy queued so far has settled (or will not be begun any more: see `close`)."""
        with self._idle:
            self._idle.wait_for(lambda: self._closing or not (self._copying or self._swap_ins or self._swap_outs))

    def end_step(self) -> tuple[tuple[int, ...], tuple[CopyFailure, ...]]:
        """What settled since the last call: ids of good copies, and failures. The step is over."""
        with self._work:
            self._in_step = False
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
        if self._stream is not None:
            torch.cuda.set_device(self._device)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
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

    def _take_piece(self) -> tuple[list[Copy], torch.cuda.Event | None]:
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

    def _run_swap_in(self, ticket: SwapIn, computed: torch.cuda.Event | None) -> None:
        failures: list[CopyFailure] = []
        good: list[Copy] = []
        try:
            good = self._admit(ticket.copies, failures)
            self._wait_for(computed)
            for layer in range(self._num_layers):
                self._copy(good, layer)
                ticket.layer_done(self._record())
            self._drain()
        except Exception as error:  # whatever it was, it must not hang the forward or take other batches along
            failures += [_failure(copy, error) for copy in good]
            good = []
        ticket.failures = failures
        with self._work:
            self._done += [copy.copy_id for copy in good]
            self._failed += failures
        ticket.settle()

    def _run_swap_outs(self, piece: list[Copy], computed: torch.cuda.Event | None) -> None:
        failures: list[CopyFailure] = []
        good: list[Copy] = []
        try:
            good = self._admit(piece, failures)
            self._wait_for(computed)
            self._copy(good, None)
            self._drain()
        except Exception as error:
            failures += [_failure(copy, error) for copy in good]
            good = []
        with self._work:
            self._done += [copy.copy_id for copy in good]
            self._failed += failures
            wake = not self._in_step
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

    def _copy(self, copies: Sequence[Copy], layer: int | None) -> None:
        by_pair: dict[tuple[int, int], list[Copy]] = {}
        for copy in copies:
            by_pair.setdefault((copy.src_tier, copy.dst_tier), []).append(copy)
        for (source, target), pair in by_pair.items():
            copy_slots(
                self._stores[source], [copy.src_slot for copy in pair], self._stores[target], [copy.dst_slot for copy in pair], layer
            )

    def _wait_for(self, computed: torch.cuda.Event | None) -> None:
        if self._stream is not None and computed is not None:
            self._stream.wait_event(computed)

    def _record(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def _drain(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _failure(copy: Copy, error: Exception) -> CopyFailure:
    return CopyFailure(copy.copy_id, isinstance(error, SourceLost), f"{type(error).__name__}: {error}")
