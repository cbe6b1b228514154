"""Answers under way in a store: drafts, claims, and the servers that own them.

Knows transactions; never models or caches.

An answer under way is a draft: its part that was stored survives a crash, and becomes a turn of its own then.
A claim says which turn answers an idempotency key: a whole answer, or one that its owner still generates.
Owners are servers. Each renews a lease in the store; another server recovers the drafts and claims of an
owner whose lease has lapsed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from pensieve.errors import InvalidRequest
from pensieve.message import Message
from pensieve.store import answers, encoding, owners, trees
from pensieve.store.storage import Storage
from pensieve.store.values import Claim, Owner
from pensieve.store.writer import Connection, failed


class AnswerStore(Storage):
    """Keeps answers while they are generated; see `ConversationStore` for what all methods promise."""

    def draft(
        self,
        namespace: str,
        conversation_id: str,
        parent: str | None,
        turn_id: str,
        messages: Sequence[Message],
        token_ids: Sequence[int],
        start: int | None,
        output_start: int,
        meta: Mapping[str, object] | None = None,
        *,
        owner: str = "",
    ) -> Future[None]:
        """Begin an answer: keep its turn's prompt. Replaces an earlier draft of the same id.

        The draft ends with `append` of the same `turn_id`, with `discard_draft`, or with its conversation.

        Args:
            namespace: the caller's.
            conversation_id: the conversation that continues.
            parent: the turn before it; None for the first.
            turn_id: the id that the turn will have.
            messages: the turn's messages without the answer.
            token_ids: the turn's token ids before the answer (and the answer's first ids, if it has any).
            start: how many tokens of the parent's path are kept before them; None keeps all.
            output_start: position in the path's token log at which the answer begins, within or at the end of
                `token_ids`.
            meta: kept with the turn.
            owner: the server that generates the answer, as in `join`, so that another server can recover the
                draft; "" if none.

        Returns:
            A future that resolves when the draft is durable. It fails as `append`'s does.
        """
        try:
            content = encoding.Content.of(messages, token_ids, meta)
            encoding.check_names(turn_id=turn_id, owner=owner)
        except InvalidRequest as error:
            return failed(error)

        def job(connection: Connection) -> None:
            key = trees.key_of(connection, namespace, conversation_id)
            at = trees.insert_point(connection, namespace, key, parent, start, turn_id)
            now_s = self._clock()
            if owner:
                owners.ensure(connection, owner, self._now_s(connection))
            answers.begin_draft(connection, at, turn_id, content, output_start, owner, now_s)
            trees.touch(connection, key, now_s)

        return self._writer.submit(job)

    def extend_draft(self, turn_id: str, output_ids: Sequence[int], text: str) -> Future[None]:
        """Append these ids and this text to a draft's answer. The cost does not grow with the answer.

        Returns:
            A future that resolves when they are durable. It fails with `ConversationNotFound` (no such
            draft), `InvalidRequest` (a token id out of range) or `StoreError`.
        """
        try:
            ids = encoding.pack(tuple(output_ids))
            encoding.check_names(turn_id=turn_id)
        except InvalidRequest as error:
            return failed(error)
        return self._writer.submit(lambda connection: answers.extend_draft(connection, turn_id, ids, text))

    def discard_draft(self, turn_id: str) -> Future[None]:
        """Delete a draft; does nothing if there is none of this id."""
        try:
            encoding.check_names(turn_id=turn_id)
        except InvalidRequest as error:
            return failed(error)
        return self._writer.submit(lambda connection: answers.discard_draft(connection, turn_id))

    def join(self, owner: str, process: str) -> None:
        """Give a server a lease of `LEASE_S`: its drafts and claims are its own meanwhile.

        Args:
            owner: a name that no other process has or had.
            process: identifies the process, as `processes.own_process` does; "" if that is unknown.
        """
        encoding.check_names(owner=owner)
        self._writer.call(lambda connection: owners.join(connection, owner, process, self._now_s(connection)))

    def renew(self, owner: str, process: str) -> bool:
        """Renew a server's lease.

        Returns:
            False if the lease had lapsed and another server recovered its answers; it has a new lease then.
        """

        def job(connection: Connection) -> bool:
            now_s = self._now_s(connection)
            renewed = owners.renew(connection, owner, now_s)
            if not renewed:
                owners.join(connection, owner, process, now_s)
            return renewed

        return self._writer.call(job)

    def owners(self) -> Sequence[Owner]:
        """The servers that have a lease, lapsed leases included."""
        return self._read(lambda connection: owners.listed(connection, self._now_s(connection)))

    def leave(self, owner: str) -> int:
        """End a server's lease and recover its drafts; returns how many there were."""
        return self.recover_drafts(owner)

    def recover_drafts(self, owner: str | None = None, expires_s: float | None = None) -> int:
        """Make a turn of each draft whose owner is dead.

        The turn is a branch that no conversation ends with, but that a turn can follow. Its last message is
        the assistant's, as far as it was stored; its `reply_reason` is `INTERRUPTED`. Idempotency keys whose
        answer was not stored whole are free again. All of it is one transaction. Never recover a server that
        lives: its answers would be cut in two.

        Args:
            owner: the owner whose lease ends; None for all owners without a lease.
            expires_s: recover only if the lease still ends then: it was neither renewed nor recovered
                meanwhile.

        Returns:
            The number of drafts.
        """
        encoding.check_names(owner=owner)

        def job(connection: Connection) -> int:
            if owner is not None and not owners.end(connection, owner, expires_s):
                return 0
            return answers.recover_drafts(connection, owner)

        return self._writer.call(job)

    def claim(
        self,
        namespace: str,
        key: str,
        fingerprint: bytes,
        turn_id: str,
        now_s: float | None = None,
        *,
        owner: str = "",
    ) -> Claim:
        """Claim an idempotency key for a turn, unless it is claimed for another one already.

        A claim holds for `CLAIM_S`, if its answer is stored whole, or is under way at an owner that was not
        recovered. Durable on return.

        Args:
            namespace: the caller's; each namespace has its own keys.
            key: as the caller sent it.
            fingerprint: of the request, so that another request with the same key is recognised.
            turn_id: the turn that will answer the request.
            now_s: seconds since the epoch; None takes the store's clock.
            owner: the server that will answer, as in `join`; "" for one that never dies.

        Returns:
            This claim, `fresh`, or the first one.

        Raises:
            InvalidRequest: a database cannot hold the key.
        """
        encoding.check_names(namespace=namespace, idempotency_key=key, turn_id=turn_id, owner=owner)
        claimed_s = self._clock() if now_s is None else now_s

        def job(connection: Connection) -> Claim:
            owners.ensure(connection, owner, self._now_s(connection) if owner else 0.0)
            return answers.claim(connection, namespace, key, fingerprint, turn_id, owner, claimed_s)

        return self._writer.call(job)

    def release(self, namespace: str, key: str, turn_id: str | None = None) -> Future[None]:
        """Free the key of an answer that failed, so that the next attempt is the first again.

        Returns at once.

        Does nothing if the key is not claimed, or is claimed for another turn than `turn_id`: a later attempt
        may have claimed it.
        """
        encoding.check_names(namespace=namespace, idempotency_key=key, turn_id=turn_id)
        return self._writer.submit(lambda connection: answers.release(connection, namespace, key, turn_id))

    def purge(self, before_s: float) -> int:
        """Remove claims made before this time, except of answers under way; returns how many."""
        return self._writer.call(lambda connection: answers.purge(connection, before_s))
