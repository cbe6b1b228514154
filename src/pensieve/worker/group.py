"""The processes that compute one model together, and how they agree.

Knows ranks and bytes; never models or plans.

Tensors go through torch's default group (nccl on CUDA, gloo on a CPU), where transformers' collectives run.
Messages, a few bytes a step, go through a gloo group of their own, so that they can never be paired with a
collective of a forward.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, BroadcastOptions

from pensieve.errors import ConfigError, PensieveError, WorkerLost, error_from
from pensieve.worker.rank import Rank

_IDLE = timedelta(
    days=365
)  # how long a rank may wait for the next message; a rank that died is noticed at once, by its connection
_SHORT_BYTES = 2048  # most messages fit, and take one collective; longer ones take two
_LENGTH_BYTES = 4


class Group:
    """The connected ranks. All of them call each method at the same point, from one thread each."""

    def __init__(self, rank: Rank, device: torch.device, control: dist.ProcessGroup) -> None:
        self.rank, self.size, self.local_size, self.device = rank.index, rank.size, rank.local_size, device
        self._control: dist.ProcessGroup | None = control

    @classmethod
    def join(cls, rank: Rank, device: str) -> Group:
        """Connect to the other ranks; returns when all are there.

        Args:
            rank: see `Rank.from_environment`.
            device: "cpu" or "cuda"; on CUDA each process takes the device of its own local rank.

        Raises:
            ConfigError: this machine has no such device for this rank, or a device was named by its number.
            WorkerLost: the others cannot be reached.
        """
        own = _own_device(rank, device)
        try:
            if own.type == "cuda":
                torch.cuda.set_device(own)
            if not dist.is_initialized():
                dist.init_process_group(
                    "nccl" if own.type == "cuda" else "gloo", rank=rank.index, world_size=rank.size
                )
            control = dist.new_group(backend="gloo", timeout=_IDLE)
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise WorkerLost(
                f"rank {rank.index} cannot join the other processes at {where}: {error}"
            ) from error
        assert control is not None
        group = cls(rank, own, control)
        if group.rank == 0:
            atexit.register(group.dismiss)
        return group

    # -- what is said

    def tell(self, message: object) -> None:
        """On rank 0: send a message to all others, which call `hear`."""
        assert self.rank == 0
        self._broadcast(pickle.dumps(message, protocol=5))

    def hear(self) -> Any:
        """On ranks above 0: wait for the next message of rank 0."""
        assert self.rank > 0
        return pickle.loads(self._broadcast(None))

    def exchange(self, message: object, patience: timedelta | None = None) -> list[Any]:
        """Exchange a message with all ranks; returns their messages in the order of ranks.

        Raises:
            WorkerLost: a rank is gone, or did not come within `patience`.
        """
        data = pickle.dumps(message, protocol=5)
        length = _SHORT_BYTES
        said = self._gather(data, length, patience)
        longest = max(_LENGTH_BYTES + size for size, _ in said)
        if longest > length:
            said = self._gather(data, longest, patience)
        return [pickle.loads(each) for _, each in said]

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """Run a block on all ranks; if it fails on one, it fails on all.

        Raises:
            Exception: what the block raised on this rank.
            PensieveError: of the kind and with the words that it raised on another rank, which is named.
        """
        error: Exception | None = None
        try:
            yield
        except WorkerLost:
            raise
        except Exception as own:
            error = own
        said = self.exchange(None if error is None else _in_words(error))
        if error is not None:
            raise error
        for rank, failure in enumerate(said):
            if failure is not None:
                code, message = failure
                raise error_from(code, f"rank {rank}: {message}")

    # -- the end

    def dismiss(self) -> None:
        """On rank 0: tell the others that no message will follow. Safe to call again or without ranks."""
        if self._control is not None:
            with contextlib.suppress(WorkerLost):
                self.tell(Leave())
            self.leave()

    def leave(self) -> None:
        """Close the connections: ranks that wait for this one learn that it is gone. Safe to call twice."""
        if self._control is None:
            return
        self._control = None
        atexit.unregister(self.dismiss)
        with contextlib.suppress(RuntimeError, AssertionError):
            dist.destroy_process_group()

    # -- bytes

    def _broadcast(self, data: bytes | None) -> bytes:
        first = _padded(data, _SHORT_BYTES)
        self._collect(lambda control: control.broadcast([first], BroadcastOptions()))
        length = int.from_bytes(first[:_LENGTH_BYTES].numpy().tobytes(), "little")
        if _LENGTH_BYTES + length > _SHORT_BYTES:
            first = _padded(data, _LENGTH_BYTES + length)
            self._collect(lambda control: control.broadcast([first], BroadcastOptions()))
        return first[_LENGTH_BYTES : _LENGTH_BYTES + length].numpy().tobytes()

    def _gather(self, data: bytes, num_bytes: int, patience: timedelta | None) -> list[tuple[int, bytes]]:
        """Of each rank, the length of its message and as many of its bytes as fitted."""
        own = _padded(data, num_bytes)
        rows = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(self.size)]
        options = AllgatherOptions()
        options.timeout = (
            patience or _IDLE
        )  # the collective's own limit: a wait that ends earlier would leave a thread in it for ever
        self._collect(lambda control: control.allgather([rows], [own], options))
        lengths = [int.from_bytes(row[:_LENGTH_BYTES].numpy().tobytes(), "little") for row in rows]
        return [
            (length, row[_LENGTH_BYTES : _LENGTH_BYTES + length].numpy().tobytes())
            for length, row in zip(lengths, rows, strict=True)
        ]

    def _collect(self, begin: Callable[[dist.ProcessGroup], dist.Work]) -> None:
        if self._control is None:
            raise WorkerLost(f"rank {self.rank} has left the other processes")
        try:
            begin(self._control).wait()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise WorkerLost(
                f"rank {self.rank} lost the other processes, one of them ended or is out of step: {reason[0]}"
            ) from error


@dataclass(frozen=True, slots=True)
class Leave:
    """Rank 0's last message."""


def _own_device(rank: Rank, device: str) -> torch.device:
    kind = torch.device(device)
    if kind.type == "cpu":
        return kind
    if kind.index is not None:
        raise ConfigError(
            f"--device {device} names one device for {rank.size} processes: each takes its own, give "
            f"--device {kind.type}"
        )
    count = torch.cuda.device_count()
    if rank.local_rank >= count:
        raise ConfigError(
            f"rank {rank.index} is number {rank.local_rank + 1} of {rank.local_size} processes here, and "
            f"there are {count} CUDA devices: "
            f"start at most {count} a machine (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", rank.local_rank)


def _in_words(error: Exception) -> tuple[str, str]:
    if isinstance(error, PensieveError):
        return error.code, error.message
    return PensieveError.code, f"{type(error).__name__}: {error}"


def _padded(data: bytes | None, num_bytes: int) -> torch.Tensor:
    """Length and bytes, cut or padded to `num_bytes`."""
    row = torch.zeros(num_bytes, dtype=torch.uint8)
    if data is not None:
        packed = (len(data).to_bytes(_LENGTH_BYTES, "little") + data)[:num_bytes]
        row[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    return row
