"""Regular work on the store: deletes expired conversations, completes erasures, forgets old keys, probes.

Knows the service and the store; never requests.

Each of these is tried again every few seconds, and none waits for another that hangs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from pensieve.errors import ConversationNotFound, PensieveError
from pensieve.server.context import Context
from pensieve.store import CLAIM_S, Conversation

log = logging.getLogger(__name__)

SWEEP_S = 5.0  # between two rounds
MAX_SWEPT = 64  # conversations that are being deleted at once
DELETE_S = 30.0  # how long one round waits for the deletions it began
PURGE_S = 3600.0  # between two purges of old keys
OVERWRITE_S = 60.0  # the longest pause between two attempts to complete erasures


class Sweeper:
    """The work, as one task; cancel it to end it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._deleting: dict[str, asyncio.Task[None]] = {}  # by conversation
        self._purged_s = 0.0  # monotonic clock, as the next
        self._overwrite_s = 0.0  # when the next attempt is due
        self._pause_s = SWEEP_S
        self._pending: int = 0  # erasures to complete, as of the last round

    async def run(self) -> None:
        """Sweep until cancelled."""
        await asyncio.gather(
            self._repeat("looking for conversations whose time is up", self._expire),
            self._repeat("completing erasures", self._overwrite),
            self._repeat("forgetting old idempotency keys", self._purge),
            self._repeat("trying to write to the conversation store again", self._probe),
        )

    async def _repeat(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except PensieveError as error:
                log.warning("%s failed: %s", what, error.message)
            except Exception:
                log.exception("%s failed", what)
            await asyncio.sleep(SWEEP_S)

    async def _expire(self) -> None:
        """Delete expired conversations. A deletion that hangs goes on, and counts towards `MAX_SWEPT`."""
        limit = MAX_SWEPT + len(self._deleting)
        for conversation in await asyncio.to_thread(self._context.service.expired, time.time(), limit):
            if conversation.key not in self._deleting and len(self._deleting) < MAX_SWEPT:
                self._deleting[conversation.key] = asyncio.ensure_future(self._delete(conversation))
        if self._deleting:
            await asyncio.wait(self._deleting.values(), timeout=DELETE_S)

    async def _delete(self, conversation: Conversation) -> None:
        try:
            erasing = self._context.service.erase(
                conversation.id, namespace=conversation.namespace, overwrite=False
            )
            await asyncio.wrap_future(erasing)
            self._context.answers.forget(conversation.namespace, conversation.id)
            log.info("conversation %s is deleted: its time was up", conversation.id)
        except ConversationNotFound:  # another server with the same store was faster
            log.debug("conversation %s, whose time is up, is deleted already", conversation.id)
        except PensieveError as error:  # tried again in the next round
            log.warning(
                "conversation %s, whose time is up, could not be deleted: %s", conversation.id, error.message
            )
        finally:
            del self._deleting[conversation.key]

    async def _overwrite(self) -> None:
        """Overwrite the bytes of deleted conversations in the store's files; less and less often while that
        fails.
        """
        store = self._context.store
        self._pending = await asyncio.to_thread(store.erasures)
        self._context.metrics.erasures.set(self._pending)
        if not self._pending:
            self._pause_s = SWEEP_S
            return
        if time.monotonic() < self._overwrite_s:
            return
        await asyncio.to_thread(store.overwrite)
        left = await asyncio.to_thread(store.erasures)
        self._context.metrics.erasures.set(left)
        if left:
            log.warning(
                "%d deleted conversations may still be in the store's files: "
                "they could not be overwritten yet",
                left,
            )
            self._pause_s = min(2 * self._pause_s, OVERWRITE_S)
            self._overwrite_s = time.monotonic() + self._pause_s
        else:
            log.info("%d deleted conversations are overwritten in the store's files", self._pending)

    async def _purge(self) -> None:
        if time.monotonic() - self._purged_s > PURGE_S or not self._purged_s:
            self._purged_s = time.monotonic()
            await asyncio.to_thread(self._context.store.purge, time.time() - CLAIM_S)

    async def _probe(self) -> None:
        """Try a store that failed again; /ready reports it until it works."""
        if self._context.store.trouble() is not None:
            await asyncio.to_thread(self._context.store.probe)
