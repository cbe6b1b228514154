"""What an engine's process and its parent say to each other besides commands and events, and how a message is framed. Knows a pipe; never engines."""

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
    """What a parent should know about an engine that is ready."""

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
    cost_source: str  # where Cost(l) came from
    attention: str  # the backend's name
    forward: str  # what computes the model: fused operations or its modules
    load_s: float  # from the child's first line to ready
    tokenizer_dir: str | None = None  # None: there is no tokenizer
    note: str | None = None  # what a user should know about the model
    limit: ContextLimit | None = None  # what would allow a longer context
    instructions: str = ""  # what our kernels compute with, for people; empty where they do not compute
    remarks: tuple[str, ...] = ()  # what was found at the start where nothing was told, for people


@dataclass(frozen=True, slots=True)
class Close:
    """Parent to child: end after the step under way."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Child to parent: what the start is busy with, a sign of life."""

    text: str


@dataclass(frozen=True, slots=True)
class Broken:
    """Child to parent: why it is about to exit."""

    code: str  # PensieveError.code
    message: str


@dataclass(frozen=True, slots=True)
class Beat:
    """Child to parent, once a second, from a thread of its own."""

    stalled_s: float  # since the step loop was asked for a sign of life, or since its last step while there is work; 0: it turns


def send(connection: Connection, message: object) -> None:
    """One message into the pipe."""
    connection.send_bytes(pickle.dumps(message, protocol=5))


def receive(connection: Connection) -> Any:
    """The next message out of the pipe.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    return pickle.loads(connection.recv_bytes())


class Inbox:
    """Messages out of a pipe, as far as they have come: half of one, whose sender stands still, delays no other reader."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bytes = bytearray()

    def take(self) -> list[Any]:
        """The messages that are whole now. Waits only where nothing at all has come.

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
            if length < 0:  # 2 GB and more: the length is in the eight bytes behind
                if (first := first + 8) > len(self._bytes):
                    break
                length = int.from_bytes(self._bytes[first - 8 : first], "big")
            if first + length > len(self._bytes):
                break
            messages.append(pickle.loads(self._bytes[first : first + length]))
            start = first + length
        del self._bytes[:start]
        return messages
