"""Messages between an engine's process and its parent besides commands and events, and their framing.

Knows a pipe; never engines.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from pensieve.config import ContextLimit, TierConfig

_READ_BYTES = 1 << 16
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the parent must know about a ready engine."""

    pid: int
    model: str  # label, for people
    weights: Literal["real", "random"]
    num_parameters: int
    dtype: str
    device: str
    vocab_size: int
    max_context: int  # tokens
    chunk_tokens: int
    chunk_bytes: int
    tiers: tuple[TierConfig, ...]
    cost_source: str  # origin of Cost(l), for people
    attention: str  # name of the backend
    forward: str  # fused operations, or the model's own modules
    load_s: float  # seconds from the child's first line to ready
    tokenizer_dir: str | None = None  # None if there is no tokenizer
    note: str | None = None  # about the model, for users
    limit: ContextLimit | None = None  # what would allow a longer context
    instructions: str = ""  # CPU instructions of our kernels, for people; empty if our kernels are not used
    remarks: tuple[str, ...] = ()  # about settings that the start chose by itself, for people


@dataclass(frozen=True, slots=True)
class Close:
    """Parent to child: end after the current step."""


@dataclass(frozen=True, slots=True)
class StartProgress:
    """Child to parent: what it is loading or measuring; a sign of life."""

    text: str


@dataclass(frozen=True, slots=True)
class Broken:
    """Child to parent: why it is about to exit."""

    code: str  # PensieveError.code
    message: str


@dataclass(frozen=True, slots=True)
class Beat:
    """Child to parent, once a second, from a thread of its own."""

    # How long the step loop has not turned (no answer, or no step while there is work); 0 if it turns.
    stalled_s: float


def send(connection: Connection, message: object) -> None:
    """Write one message into the pipe."""
    connection.send_bytes(pickle.dumps(message, protocol=5))


def receive(connection: Connection) -> Any:
    """Read the next message from the pipe.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    return pickle.loads(connection.recv_bytes())


class Inbox:
    """Reads messages from a pipe without waiting for the rest of a half-written one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bytes = bytearray()

    def take(self) -> list[Any]:
        """The messages that are complete now. Waits only if no byte has come.

        Raises:
            EOFError, OSError: the other side is gone.
        """
        read = os.read(self._connection.fileno(), _READ_BYTES)
        if not read:
            raise EOFError
        self._bytes += read
        messages, start = [], 0
        while (first := start + _LENGTH_BYTES) <= len(self._bytes):  # as `Connection.send_bytes` writes them
            length = int.from_bytes(self._bytes[start:first], "big", signed=True)
            if length < 0:  # 2 GB and more: the length is in the next eight bytes
                if (first := first + 8) > len(self._bytes):
                    break
                length = int.from_bytes(self._bytes[first - 8 : first], "big")
            if first + length > len(self._bytes):
                break
            messages.append(pickle.loads(self._bytes[first : first + length]))
            start = first + length
        del self._bytes[:start]
        return messages
