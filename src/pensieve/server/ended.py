"""Ended answers, kept for a while within limits of number, bytes and time.

Knows their sizes; never engines, stores or HTTP.

Sizes are estimates for CPython: a token of an answer is a few objects of about 50 bytes each, a
log-probability of another token is three.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

from pensieve.service import Piece

if TYPE_CHECKING:
    from pensieve.server.answer import Answer

MAX_ENDED = 512  # ended answers that are kept
MAX_ENDED_BYTES = 64 << 20  # of all ended answers
# of all open answers: above it no other begins, and above twice as much the largest is ended
MAX_OPEN_BYTES = 256 << 20
_PIECE_BYTES = 240  # beside its text and tokens, with one event
_TOKEN_BYTES = 320
_TOP_BYTES = 128  # one log-probability of another token
_ANSWER_BYTES = 4096  # beside its pieces
_CHAR_BYTES = 4  # at most
_VALUE_BYTES = 64  # any value, beside its characters
_MOST_VALUES = 100_000


def bytes_of_piece(piece: Piece) -> int:
    """Estimated memory of a piece."""
    num_tops = sum(len(token.top) for token in piece.tokens)
    return (
        _PIECE_BYTES
        + _CHAR_BYTES * len(piece.text)
        + _TOKEN_BYTES * len(piece.tokens)
        + _TOP_BYTES * num_tops
    )


def bytes_of(value: object) -> int:
    """Estimated memory of plain data (JSON, dataclasses with slots); `MAX_ENDED_BYTES` if counting would take
    long.
    """
    total, num_values, left = 0, 0, [value]
    while left:
        one = left.pop()
        num_values += 1
        if num_values > _MOST_VALUES:
            return MAX_ENDED_BYTES
        total += _VALUE_BYTES
        if isinstance(one, (str, bytes)):
            total += _CHAR_BYTES * len(one)
        elif isinstance(one, dict):
            left += one.keys()
            left += one.values()
        elif isinstance(one, (list, tuple)):
            left += one
        elif slots := getattr(type(one), "__slots__", None):
            left += [getattr(one, name) for name in slots]
    return total


class EndedAnswers:
    """The latest ended answers, by turn id. Used by the event loop only."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, keep_s: float, max_bytes: int = MAX_ENDED_BYTES
    ) -> None:
        """Keep each for at most `keep_s` seconds, and at most about `max_bytes` of all together."""
        self._loop = loop
        self._keep_s, self._max_bytes = keep_s, max_bytes
        # in the order in which they ended, each with its size in bytes
        self._answers: OrderedDict[str, tuple[Answer, int]] = OrderedDict()
        self._num_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def num_bytes(self) -> int:
        """Estimated memory of all."""
        return self._num_bytes

    def add(self, answer: Answer) -> None:
        """Keep an answer that has just ended, and drop older ones if there is no room.

        An answer that is too large is dropped.
        """
        done = answer.done
        weight = _ANSWER_BYTES + answer.num_bytes + bytes_of(answer.record)
        if done is not None:
            weight += 40 * len(done.output) + bytes_of(done.text) + bytes_of(done.message)
        self._answers[answer.id] = (answer, weight)
        self._num_bytes += weight
        self._prune()

    def get(self, turn_id: str) -> Answer | None:
        """The answer of a turn; None if it is not kept."""
        found = self._answers.get(turn_id)
        return None if found is None else found[0]

    def forget(self, namespace: str, conversation_id: str) -> None:
        """Drop the answers of a conversation."""
        for answer, _ in list(self._answers.values()):
            if answer.namespace == namespace and answer.turn.conversation_id == conversation_id:
                self._drop(answer.id)

    def forget_turn(self, namespace: str, turn_id: str) -> None:
        """Drop an answer."""
        if (answer := self.get(turn_id)) is not None and answer.namespace == namespace:
            self._drop(turn_id)

    def clear(self) -> None:
        """Drop all."""
        self._answers.clear()
        self._num_bytes = 0

    def _drop(self, turn_id: str) -> None:
        self._num_bytes -= self._answers.pop(turn_id)[1]

    def _prune(self) -> None:
        """Drop what exceeds the limits, and set a timer for when the oldest will be too old."""
        now_s = self._loop.time()
        while self._answers:
            oldest, _ = next(iter(self._answers.values()))
            assert oldest.ended_s is not None
            if (
                len(self) <= MAX_ENDED
                and self._num_bytes <= self._max_bytes
                and now_s - oldest.ended_s < self._keep_s
            ):
                break
            self._drop(oldest.id)
        if self._answers and self._timer is None:
            assert oldest.ended_s is not None
            self._timer = self._loop.call_at(oldest.ended_s + self._keep_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._prune()
