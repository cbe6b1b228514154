"""One answer as its readers see it, while it is made and after it has ended. Knows pieces; never endpoints."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from pensieve.errors import EngineSilent, PensieveError
from pensieve.service import PendingTurn, Piece, TurnDone
from pensieve.service.turn import settle


@dataclass(eq=False)
class Answer:
    """A view of a turn for any number of readers, each from any piece on. The turn holds the pieces."""

    turn: PendingTurn
    created: int  # seconds since the epoch, as its client is told
    num_pieces: int = 0  # number of leading pieces of the turn that readers may have
    done: TurnDone | None = None
    error: BaseException | None = None
    record: Any = None  # what the API wants to remember of it
    given_up: PensieveError | None = None  # why it was ended before the engine ended it
    ended_s: float | None = None  # loop clock
    first_piece_s: float | None = None  # loop clock
    num_bytes: int = 0  # estimated size of its pieces
    _waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @staticmethod
    def now() -> int:
        """Seconds since the epoch, as clients are told them."""
        return int(time.time())

    @property
    def id(self) -> str:
        """The turn's id, without any API's prefix."""
        return self.turn.spec.turn_id

    @property
    def namespace(self) -> str:
        """The namespace of its conversation."""
        return self.turn.spec.namespace

    @property
    def ended(self) -> bool:
        """Whether no more pieces will come."""
        return self.done is not None or self.error is not None

    @property
    def stored(self) -> bool:
        """Whether it is a stored turn now; the store knows whether that was deleted since."""
        return self.done is not None and self.done.turn_id is not None

    async def read(self, start: int = 0) -> AsyncIterator[Piece]:
        """The pieces from `start` on, as they come, until the end."""
        while True:
            while start < self.num_pieces:
                start += 1
                yield self.turn.pieces[start - 1]
            if self.ended:
                return
            await self.changed()

    async def result(self) -> TurnDone:
        """The whole answer.

        Raises:
            PensieveError: it failed, or took too long.
        """
        while not self.ended:
            await self.changed()
        if self.error is not None:
            raise copy.copy(
                self.error
            )  # a raised error refers to frames, which must not stay in memory with it
        assert self.done is not None
        return self.done

    async def begun(self, within_s: float) -> None:
        """Wait for the first piece or the end, but no longer than `within_s` seconds."""
        try:
            async with asyncio.timeout(within_s):
                while not (self.num_pieces or self.ended):
                    await self.changed()
        except TimeoutError:
            return

    async def over(self, within_s: float) -> None:
        """Wait for the end.

        Raises:
            EngineSilent: it does not come within `within_s` seconds.
        """
        try:
            async with asyncio.timeout(within_s):
                while not self.ended:
                    await self.changed()
        except TimeoutError:
            raise EngineSilent(
                f"the answer did not end within {within_s:g} s: "
                "it ends when the engine has heard of it, look again later"
            ) from None

    async def changed(self) -> None:
        """Wait for a piece or the end."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def drop_pieces(self) -> None:
        """Let readers have no pieces any more."""
        self.num_pieces = self.num_bytes = 0

    def for_later(self) -> Answer:
        """An ended answer without what only the making of it needed: the prompt, the history, the frames of
        its error.
        """
        spec = self.turn.spec
        turn = PendingTurn(
            replace(spec, messages=(), instructions=None, form=None, answer_meta=None, forced=None, raw=None),
            self.turn.submitted_s,
            conversation_id=self.turn.conversation_id,
            sampled=self.turn.sampled if spec.sampling.logprobs is not None else [],
            pieces=self.turn.pieces[: self.num_pieces],
            aborted=self.turn.aborted,
        )
        done = None if self.done is None else replace(self.done, prompt=(), logprobs=(), tops=())
        settle(turn.future, done, error=None if done is not None else copy.copy(self.error))
        return replace(self, turn=turn, done=done, error=copy.copy(self.error), _waiters=[])

    def notify(self) -> None:
        """Wake every reader."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
