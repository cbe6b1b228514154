"""Queues of work on a device, and what waits for what between them.

Knows streams and events; never chunks, copies or models.

On CUDA, work is queued on a stream and the host goes on; only an event that another stream waits for orders
the two. On a CPU, work is done when it is queued, and nothing waits. The tests have streams that do
everything as late and in as odd an order as events allow, so that a missing wait shows as wrong bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_SWAP_IN_PRIORITY = -1  # a forward waits for swap-ins; lower numbers go first on CUDA
_SWAP_OUT_PRIORITY = 0  # the lowest priority


class Stream(Protocol):
    """Work that is done in the order in which it was queued."""

    def do(self, work: Callable[[], None]) -> None:
        """Queue work. It may be done at once, and raise, or later."""
        ...

    def record(self) -> Any:
        """An event, reached when everything queued so far has been done."""
        ...

    def wait(self, event: Any) -> None:
        """Let what is queued from now on wait for an event of another stream; the host does not wait."""
        ...

    def reach(self, event: Any) -> None:
        """Block the host until one of this stream's events is reached."""
        ...

    def drain(self) -> None:
        """Block the host until everything queued so far has been done."""
        ...


@dataclass(frozen=True, slots=True)
class Streams:
    """The three streams of a worker."""

    compute: Stream  # runs the model
    copy_in: Stream
    copy_out: Stream


class HostStream:
    """Does everything at once, so that nothing ever waits."""

    def do(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> None:
        pass

    def wait(self, event: None) -> None:
        pass

    def reach(self, event: None) -> None:
        pass

    def drain(self) -> None:
        pass


class CudaStream:
    """A CUDA stream: one of its own, or whatever stream is current where it is used."""

    def __init__(self, device: torch.device, priority: int | None) -> None:
        """`priority` makes a stream of its own; None takes the current one."""
        self._device = device
        self._own: torch.cuda.Stream | None = None
        if priority is not None:
            self._own = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def do(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)

    def reach(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def drain(self) -> None:
        self._stream.synchronize()

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own if self._own is not None else torch.cuda.current_stream(self._device)


def streams_for(device: torch.device) -> Streams:
    """The streams of the device that holds the first tier."""
    if device.type != "cuda":
        return Streams(HostStream(), HostStream(), HostStream())
    return Streams(
        CudaStream(device, None),
        CudaStream(device, _SWAP_IN_PRIORITY),
        CudaStream(device, _SWAP_OUT_PRIORITY),
    )


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Make a CUDA device current in this thread, without gradients."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.inference_mode():
        yield
