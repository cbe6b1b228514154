"""The turns that are open: with the engine, in the text room, or waiting for an earlier turn.

Knows turns and keys; never engines or stores.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from pensieve.service.turn import PendingTurn

Key = tuple[str, str]  # namespace and conversation id


class OpenTurns:
    """Sole owner of which turns are open and in which order. Written by the service's thread only.

    Attributes:
        in_engine: turns that the engine answers, by request id.
        writing: turns whose prompts are being made, by request id.
    """

    def __init__(self) -> None:
        self.in_engine: dict[str, PendingTurn] = {}
        self.writing: dict[str, PendingTurn] = {}
        # of each conversation with a turn under way, the turns that wait behind it
        self._waiting: dict[Key, deque[PendingTurn]] = {}
        self._erasing: Counter[Key] = Counter()  # erasures under way, by conversation: no turn begins there

    def is_open(self, key: Key) -> bool:
        """Whether a conversation has a turn under way. May be asked from any thread."""
        return key in self._waiting

    def is_erasing(self, key: Key) -> bool:
        """Whether a conversation is being erased."""
        return key in self._erasing

    def enter(self, turn: PendingTurn) -> bool:
        """Add a turn to its conversation. True if it may begin, False if it waits for an earlier one."""
        if turn.key in self._waiting:
            self._waiting[turn.key].append(turn)
            return False
        self._waiting[turn.key] = deque()
        return True

    def leave(self, turn: PendingTurn) -> PendingTurn | None:
        """Remove a turn that was under way. Returns the next of its conversation, None if there is none."""
        self.in_engine.pop(turn.request_id, None)
        self.writing.pop(turn.request_id, None)
        if waiting := self._waiting[turn.key]:
            return waiting.popleft()
        del self._waiting[turn.key]
        return None

    def withdraw(self, turn: PendingTurn) -> bool:
        """Remove a turn that waits for an earlier one. False if it does not wait."""
        waiting = self._waiting.get(turn.key, ())
        if turn not in waiting:
            return False
        self._waiting[turn.key].remove(turn)
        return True

    def withdraw_all(self, key: Key) -> list[PendingTurn]:
        """Remove all turns of a conversation that wait for an earlier one."""
        waiting = self._waiting.get(key, deque())
        turns = list(waiting)
        waiting.clear()
        return turns

    def under_way(self, key: Key) -> list[PendingTurn]:
        """Turns of a conversation that are with the engine or in the text room."""
        return [turn for turn in (*self.in_engine.values(), *self.writing.values()) if turn.key == key]

    def begin_erasing(self, key: Key) -> None:
        """Let no turn begin in a conversation until `end_erasing` was called as often as this."""
        self._erasing[key] += 1

    def end_erasing(self, key: Key) -> None:
        """Undo `begin_erasing`."""
        self._erasing[key] -= 1
        if not self._erasing[key]:
            del self._erasing[key]

    def __iter__(self) -> Iterator[PendingTurn]:
        """All open turns."""
        yield from list(self.in_engine.values())
        yield from list(self.writing.values())
        for waiting in list(self._waiting.values()):
            yield from list(waiting)
