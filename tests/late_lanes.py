"""Lanes that do everything late, in any order that the marks allow: what CUDA streams may do, at their worst."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pensieve.worker.lanes import Lanes

PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class LateMark:
    lane: LateLane
    count: int  # reached when the lane has done so much

    @property
    def is_reached(self) -> bool:
        return self.lane.num_done >= self.count


@dataclass(slots=True, eq=False)
class LateLane:
    """A queue of work and waits. Nothing is done before `LateDevice.catch_up`, which any number of threads may wait for."""

    device: LateDevice
    queue: deque[Callable[[], None] | LateMark] = field(default_factory=deque)
    num_queued: int = 0
    num_done: int = 0

    def do(self, work: Callable[[], None]) -> None:
        with self.device.changed:
            self.queue.append(work)
            self.num_queued += 1
            self.device.changed.notify_all()

    def mark(self) -> LateMark:
        with self.device.changed:
            return LateMark(self, self.num_queued)

    def wait(self, mark: LateMark) -> None:
        with self.device.changed:
            self.queue.append(mark)
            self.num_queued += 1

    def reach(self, mark: LateMark) -> None:
        with self.device.changed:
            assert self.device.changed.wait_for(lambda: mark.is_reached, PATIENCE_S), (
                "nobody let the device catch up"
            )

    def drain(self) -> None:
        with self.device.changed:
            self.device.num_draining += 1
            self.device.changed.notify_all()
            goal = self.num_queued
            assert self.device.changed.wait_for(lambda: self.num_done >= goal, PATIENCE_S), (
                "nobody let the device catch up"
            )
            self.device.num_draining -= 1

    @property
    def can_go_on(self) -> bool:
        head = self.queue[0] if self.queue else None
        return head is not None and (not isinstance(head, LateMark) or head.is_reached)


class LateDevice:
    def __init__(self, seed: int) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.random = random.Random(seed)
        self.num_draining = 0
        self.lanes = Lanes(LateLane(self), LateLane(self), LateLane(self))
        self._all: tuple[LateLane, ...] = (self.lanes.compute, self.lanes.copy_in, self.lanes.copy_out)  # type: ignore[assignment]

    def catch_up(self) -> None:
        """Do all that is queued, each time a piece of whichever lane may go on."""
        with self.changed:
            while ready := [lane for lane in self._all if lane.can_go_on]:
                lane = self.random.choice(ready)
                head = lane.queue.popleft()
                if not isinstance(head, LateMark):
                    head()
                lane.num_done += 1
            assert not any(lane.queue for lane in self._all), "lanes wait for each other"
            self.changed.notify_all()

    def when_drained(self, count: int) -> None:
        """Return when so many threads wait for the device."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_draining >= count, PATIENCE_S)
