"""Queues of work on a device, and what waits for what between them. Knows streams and events; never chunks, copies or models.

On CUDA a lane is a stream: work is queued, the host goes on, and only a mark that another lane waits for (an event) puts the two in order. On a CPU work
is done when it is queued, and there is nothing to wait for. The tests have lanes that do everything as late and in as odd an order as marks allow, so that a
wait that is missing shows as wrong bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_COPY_IN_PRIORITY = -1  # of the stream of swap-ins, for which somebody waits; CUDA takes lower numbers first
_COPY_OUT_PRIORITY = 0  # the lowest there is


class Lane(Protocol):
    """Work that is done in the order it was queued."""

    def do(self, work: Callable[[], None]) -> None:
        """Queue work. It may be done at once, and raise; or later."""
        ...

    def mark(self) -> Any:
        """Where the queue ends now: reached when everything queued so far has been done."""
        ...

    def wait(self, mark: Any) -> None:
        """What is queued from now on is done after a mark of another lane was reached."""
        ...

    def reach(self, mark: Any) -> None:
        """Return when one of this lane's marks was reached."""
        ...

    def drain(self) -> None:
        """Return when everything queued so far has been done."""
        ...


@dataclass(frozen=True, slots=True)
class Lanes:
    """The three that a worker has."""

    compute: Lane  # what the model runs on
    copy_in: Lane
    copy_out: Lane


class HostLane:
    """Does everything at once."""

    def do(self, work: Callable[[], None]) -> None:
        """Do it."""
        work()

    def mark(self) -> None:
        """Reached already."""

    def wait(self, mark: None) -> None:
        """Nothing to wait for."""

    def reach(self, mark: None) -> None:
        """Nothing to wait for."""

    def drain(self) -> None:
        """Nothing to wait for."""


class CudaLane:
    """A CUDA stream."""

    def __init__(self, device: torch.device, priority: int | None) -> None:
        """`priority` of a stream of its own; None: whatever stream is current where the lane is used."""
        self._device = device
        self._own = None if priority is None else torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def do(self, work: Callable[[], None]) -> None:
        """Queue what `work` launches."""
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> torch.cuda.Event:
        """An event."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """The stream waits, the host does not."""
        self._stream.wait_event(mark)

    def reach(self, mark: torch.cuda.Event) -> None:
        """The host waits."""
        mark.synchronize()

    def drain(self) -> None:
        """The host waits."""
        self._stream.synchronize()

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own if self._own is not None else torch.cuda.current_stream(self._device)


def lanes_for(device: torch.device) -> Lanes:
    """The lanes of a device that holds the first tier."""
    if device.type != "cuda":
        return Lanes(HostLane(), HostLane(), HostLane())
    return Lanes(
        CudaLane(device, None), CudaLane(device, _COPY_IN_PRIORITY), CudaLane(device, _COPY_OUT_PRIORITY)
    )


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """For a thread of its own: a CUDA device is current per thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.inference_mode():
        yield
