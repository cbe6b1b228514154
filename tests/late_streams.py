"""Streams that do everything as late and in any order that events allow.

The worst that CUDA streams may do.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pensieve.worker.streams import Streams

PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class LateEvent:
    stream: LateStream
    count: int  # reached when the stream has done so much

    @property
    def is_reached(self) -> bool:
        return self.stream.num_done >= self.count


@dataclass(slots=True, eq=False)
class LateStream:
    """A queue of work and waits.

    Nothing is done before `LateDevice.catch_up`, which any number of threads may wait for.
    """

    device: LateDevice
    queue: deque[Callable[[], None] | LateEvent] = field(default_factory=deque)
    num_queued: int = 0
    num_done: int = 0

    def do(self, work: Callable[[], None]) -> None:
        with self.device.changed:
            self.queue.append(work)
            self.num_queued += 1
            self.device.changed.notify_all()

    def record(self) -> LateEvent:
        with self.device.changed:
            return LateEvent(self, self.num_queued)

    def wait(self, event: LateEvent) -> None:
        with self.device.changed:
            self.queue.append(event)
            self.num_queued += 1

    def reach(self, event: LateEvent) -> None:
        with self.device.changed:
            assert self.device.changed.wait_for(lambda: event.is_reached, PATIENCE_S), (
                "no test let the device catch up"
            )

    def drain(self) -> None:
        with self.device.changed:
            self.device.num_draining += 1
            self.device.changed.notify_all()
            goal = self.num_queued
            assert self.device.changed.wait_for(lambda: self.num_done >= goal, PATIENCE_S), (
                "no test let the device catch up"
            )
            self.device.num_draining -= 1

    @property
    def can_go_on(self) -> bool:
        head = self.queue[0] if self.queue else None
        return head is not None and (not isinstance(head, LateEvent) or head.is_reached)


class LateDevice:
    def __init__(self, seed: int) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.random = random.Random(seed)
        self.num_draining = 0
        self.streams = Streams(LateStream(self), LateStream(self), LateStream(self))
        self._all: tuple[LateStream, ...] = (
            self.streams.compute,
            self.streams.copy_in,
            self.streams.copy_out,
        )  # type: ignore[assignment]

    def catch_up(self) -> None:
        """Do all that is queued, each time a piece of whichever stream may go on."""
        with self.changed:
            while ready := [stream for stream in self._all if stream.can_go_on]:
                stream = self.random.choice(ready)
                head = stream.queue.popleft()
                if not isinstance(head, LateEvent):
                    head()
                stream.num_done += 1
            assert not any(stream.queue for stream in self._all), "streams wait for each other"
            self.changed.notify_all()

    def when_drained(self, count: int) -> None:
        """Return when so many threads wait for the device."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_draining >= count, PATIENCE_S)
