"""Two processes that compute one model, kept for many tests: each job joins a group of its own, so that one may break it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

Job = Callable[..., Any]  # called with the group, then the job's own arguments
TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    named = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in named.items()}


class RankPair:
    """Starts both on first use."""

    def __init__(self) -> None:
        self._children: dict[int, tuple[Any, Connection]] = {}  # by rank

    def run(self, lead: Job, follower: Job, *arguments: Any) -> list[Any]:
        """What `lead(group, *arguments)` on rank 0 and `follower(group, *arguments)` on rank 1 return."""
        results = self.outcomes(lead, follower, *arguments)
        for rank, result in enumerate(results):
            assert not isinstance(result, BaseException), f"rank {rank}: {result}"
        return results

    def outcomes(self, lead: Job, follower: Job, *arguments: Any) -> list[Any]:
        """The same; what was raised stands in its result's place, `EOFError` where a process died."""
        self._ensure()
        port = free_port()
        for rank, (_, connection) in self._children.items():
            connection.send((port, (lead, follower)[rank], arguments))
        results: list[Any] = [TimeoutError(f"no answer in {TIMEOUT_S} s")] * 2
        waiting = {connection: rank for rank, (_, connection) in self._children.items()}
        while waiting and (ready := wait(list(waiting), TIMEOUT_S)):
            for connection in [child for child in waiting if child in ready]:
                rank = waiting.pop(connection)
                try:
                    results[rank] = connection.recv()
                except EOFError as error:
                    results[rank] = error
        for rank, result in enumerate(results):
            if isinstance(result, (EOFError, TimeoutError)):
                self._end(rank)
        return results

    def close(self) -> None:
        for rank in list(self._children):
            self._end(rank)

    def _end(self, rank: int) -> None:
        process, connection = self._children.pop(rank)
        connection.close()
        process.kill()  # (it holds nothing that would have to be closed)
        process.join()

    def _ensure(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in {0, 1} - set(self._children):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._children[rank] = (process, ours)


def _serve(rank: int, connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from pensieve.worker.group import Group
    from pensieve.worker.rank import Rank

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            port, job, arguments = connection.recv()
            os.environ.update(environment(rank, 2, port))
            group = None
            try:
                own = Rank.from_environment()
                assert own is not None
                group = Group.join(own, "cpu")
                result = job(group, *arguments)
            except BaseException as error:
                result = error
                if not hasattr(error, "message"):  # (one of ours says what it says)
                    result = AssertionError(traceback.format_exc())
            finally:
                if group is not None:
                    group.dismiss() if rank == 0 else group.leave()
            connection.send(result)
