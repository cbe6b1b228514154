"""This process's rank among several that serve one model together.

Knows torchrun's environment; never torch, so that any process may ask.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pensieve.errors import ConfigError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of several that serve one model together."""

    index: int  # rank 0 decides, the others follow
    size: int  # at least 2
    local_rank: int  # among the processes of this machine: the number of its device
    local_size: int  # processes of this machine

    @classmethod
    def from_environment(cls) -> Rank | None:
        """The rank that torchrun's variables give; None if this process is alone.

        Raises:
            ConfigError: a variable is not a number, or out of its range.
        """
        if any(name not in os.environ for name in _NEEDED):
            return None
        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank, local_size = (
                int(os.environ.get("LOCAL_RANK", rank)),
                int(os.environ.get("LOCAL_WORLD_SIZE", size)),
            )
        except ValueError as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE and their like must be numbers, as torchrun sets them: {error}"
            ) from error
        if not 0 <= rank < size:
            raise ConfigError(f"RANK must lie in [0, WORLD_SIZE = {size}), got {rank}")
        return None if size == 1 else cls(rank, size, local_rank, local_size)
