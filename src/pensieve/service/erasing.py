"""Deleting and erasing conversations: turns are ended, then the rows go, then the KV.

Knows stores and an engine client; never text or HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import cast

from pensieve.engine.messages import Abort, CacheMap, Forgotten
from pensieve.errors import ConversationNotFound, EngineSilent, PensieveError, StoreError
from pensieve.service.engine_client import EngineClient
from pensieve.service.open_turns import Key, OpenTurns
from pensieve.service.prompt import Prompts
from pensieve.service.service_thread import Job
from pensieve.service.turn import PendingTurn, TurnDone, as_pensieve_error, settle
from pensieve.service.turn_stores import TurnStores
from pensieve.store import ConversationStore, Erased

ERASE_WAIT_S = 60.0  # how long an erasure waits for the turn under way to end


@dataclass(frozen=True, slots=True)
class Erasure:
    """What the erasure of a conversation removed."""

    turns: int
    store_bytes: int
    kv_slots: int
    kv_bytes: int
    # False if the rows are deleted, but the write-ahead log could not be truncated yet (a reader holds it),
    # or the
    # engine has not confirmed yet that it forgot the KV: it does that first once it is back.
    complete: bool


class Eraser:
    """Deletes conversations.

    Its methods run on the service's thread; an erasure then goes on in a thread of its own.
    """

    def __init__(
        self,
        turns: OpenTurns,
        stores: TurnStores,
        prompts: Prompts,
        engine: EngineClient,
        *,
        put: Callable[[Job], bool],
        fail: Callable[[PendingTurn, PensieveError], None],
    ) -> None:
        """`put` queues a job on the service's thread, `fail` ends a turn with an error."""
        self._turns = turns
        self._stores = stores
        self._prompts = prompts
        self._engine = engine
        self._put = put
        self._fail = fail

    def delete(self, key: Key, done: Future[None]) -> None:
        """Delete a conversation's turns in the store, and what is cached of it."""
        namespace, conversation_id = key
        was_new = self._end_waiting(key)
        try:
            if (store := self._stores.of(conversation_id)) is not None and not was_new:
                store.delete(namespace, conversation_id)
            self._engine.forget(conversation_id, namespace=namespace)
        except PensieveError as error:
            settle(done, error=error)
        else:
            settle(done, None)

    def erase(self, key: Key, overwrite: bool, within_s: float, done: Future[Erasure]) -> None:
        """Delete a conversation and overwrite its rows and its KV; see `ConversationService.erase`.

        The turn under way is ended first, because its end would write again. A conversation that is cached
        without being stored, such as a completed text, has KV only.
        """
        namespace, conversation_id = key
        store = self._stores.of(conversation_id)
        unknown: PensieveError | None = None
        try:
            if store is not None:
                store.get(namespace, conversation_id)  # before any turn is ended
        except ConversationNotFound as error:
            store, unknown = None, error
        except PensieveError as error:
            settle(done, error=error)
            return
        if self._end_waiting(key):
            unknown = None
        self._turns.begin_erasing(key)
        under_way = [turn for turn in self._turns.in_engine.values() if turn.key == key]
        for turn in under_way:
            turn.erased = turn.aborted = True
            self._engine.post(Abort(turn.request_id))

        def carry_out() -> None:
            try:
                began_s = time.monotonic()
                self._await_ends(under_way, within_s / 2)
                if unknown is not None and not self._is_cached(key, within_s / 2):
                    raise unknown
                rows = self._erase_rows(store, key, overwrite)
                left_s = max(within_s / 4, began_s + within_s - time.monotonic())
                kv, complete = self._erase_kv(key, left_s)
                settle(done, Erasure(rows.turns, rows.bytes, kv.slots, kv.bytes, rows.complete and complete))
            except BaseException as error:
                settle(done, error=as_pensieve_error("the conversation could not be erased", error))
            finally:
                self._put(lambda: self._end(key))

        threading.Thread(target=carry_out, name="pensieve-erase", daemon=True).start()

    # -- on the service's thread

    def _end_waiting(self, key: Key) -> bool:
        """Fail a conversation's turns that have not begun, and one that would create it.

        A turn under way in it goes on.

        Returns:
            Whether a turn would have created it: then the conversation existed, although the store does not
            know it.
        """
        deleted = ConversationNotFound(f"conversation {key[1]!r} was deleted")
        for turn in self._turns.withdraw_all(key):
            settle(turn.future, error=deleted)
        self._prompts.forget(key[0])
        was_new = False
        for turn in self._turns.under_way(key):
            position = turn.position
            is_new = not turn.opened and position is not None and position.conversation is None
            was_new |= is_new
            is_in_engine = turn.request_id in self._turns.in_engine
            if is_new and is_in_engine:
                self._engine.post(Abort(turn.request_id))
            if is_new or not is_in_engine:
                self._fail(turn, deleted)
        return was_new

    def _drop(self, turns: list[PendingTurn]) -> None:
        """End turns of a conversation that is being erased without the engine, which does not confirm that
        they ended.
        """
        for turn in turns:
            if turn.request_id in self._turns.in_engine and not turn.ending:
                self._fail(turn, ConversationNotFound(f"conversation {turn.conversation_id!r} was deleted"))

    def _end(self, key: Key) -> None:
        self._turns.end_erasing(key)
        self._prompts.forget(key[0])

    # -- on a thread of its own

    def _await_ends(self, turns: list[PendingTurn], within_s: float) -> None:
        ends: list[Future[TurnDone]] = [turn.future for turn in turns]
        if wait(ends, within_s).not_done:
            self._put(lambda: self._drop(turns))
            if wait(ends, ERASE_WAIT_S).not_done:
                raise StoreError("a turn of the conversation is still being stored: try again")

    def _is_cached(self, key: Key, within_s: float) -> bool:
        try:
            return bool(cast(CacheMap, self._engine.rows([key]).result(within_s)).rows)
        except TimeoutError:
            raise EngineSilent(
                f"the engine did not say within {within_s:g} s whether it has conversation {key[1]!r}: "
                "try again"
            ) from None
        except PensieveError:  # the engine died, and its memory with it
            return False

    def _erase_rows(self, store: ConversationStore | None, key: Key, overwrite: bool) -> Erased:
        if store is None:
            return Erased(0, 0, complete=True)
        return store.erase(*key, overwrite=overwrite or store is self._stores.ephemeral)

    def _erase_kv(self, key: Key, within_s: float) -> tuple[Forgotten, bool]:
        """What was cached, and whether it is erased by now."""
        nothing = Forgotten("", 0, 0)
        try:
            return cast(Forgotten, self._engine.erase(key[1], namespace=key[0]).result(within_s)), True
        except TimeoutError:  # the command is queued: the engine forgets once it is back
            return nothing, False
        except PensieveError:  # the engine died, and its memory with it
            return nothing, True
