"""A server's lease in the store, and the recovery of servers that died.

Knows processes and time; never what answers are.

A lease is renewed every `RENEW_S`. Another server's answers are recovered when its process has ended, if that
can be seen from here, or when its lease was found lapsed twice, `RENEW_S` apart. Once is not enough: a
machine that was asleep wakes up with every lease lapsed, and each server renews its own then.
"""

from __future__ import annotations

import logging
import threading
import uuid

from pensieve.errors import PensieveError
from pensieve.store import processes
from pensieve.store.conversation_store import ConversationStore
from pensieve.store.values import LEASE_S

log = logging.getLogger(__name__)

RENEW_S = 5.0  # seconds, a third of LEASE_S: two renewals may fail


class Lease:
    """Keeps this process's lease until `close`, and recovers the answers of dead servers.

    Args:
        store: keeps the answers.
        renew_s: seconds between two renewals.

    Raises:
        StoreError: the store cannot be written to.
    """

    def __init__(self, store: ConversationStore, *, renew_s: float = RENEW_S) -> None:
        assert renew_s < LEASE_S
        self.owner = uuid.uuid4().hex
        self._store = store
        self._process = processes.own_process()
        self._renew_s = renew_s
        self._lapsed: dict[
            str, float
        ] = {}  # when the leases ended that were found lapsed the last time, by owner
        store.join(self.owner, self._process)
        self.num_recovered = store.recover_drafts() + self._recover_dead()  # drafts, at the start
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the lease and recover what is still under way. Close everything that writes answers first."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        try:
            self._store.leave(self.owner)
        except PensieveError as error:  # the lease lapses later
            log.warning("the lease in the conversation store could not be ended: %s", error.message)

    def _run(self) -> None:
        while not self._ended.wait(self._renew_s):
            try:
                self._tick()
            except PensieveError as error:
                log.warning("the lease in the conversation store could not be renewed: %s", error.message)
            except Exception:
                log.exception("renewing the lease in the conversation store failed")

    def _tick(self) -> None:
        if not self._store.renew(self.owner, self._process):
            log.error(
                "this server's lease in the conversation store had lapsed, and another server gave its "
                "answers up: those under way may fail"
            )
        if num_recovered := self._recover_dead():
            log.info("%d answers of a server that died are kept as far as they were stored", num_recovered)

    def _recover_dead(self) -> int:
        """Recover the drafts of dead servers; returns how many there were."""
        others = [owner for owner in self._store.owners() if owner.id != self.owner]
        dead = [
            owner
            for owner in others
            if processes.has_ended(owner.process)
            or (owner.lapsed and self._lapsed.get(owner.id) == owner.expires_s)
        ]
        self._lapsed = {owner.id: owner.expires_s for owner in others if owner.lapsed}
        return sum(self._store.recover_drafts(owner.id, owner.expires_s) for owner in dead)
