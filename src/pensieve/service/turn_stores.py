"""What is stored of turns, and in which store. Knows turns and stores; never engines, text or threads."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress

from pensieve.core.request import FinishReason
from pensieve.errors import ConversationNotFound
from pensieve.message import Message, chars_of
from pensieve.service.prompt import CHARS, INSTRUCTIONS, LEFT_OUT, TOOLS
from pensieve.service.turn import LEAF, PendingTurn, TurnDone
from pensieve.store import Conversation, ConversationStore, Turn

EPHEMERAL = "temp_"  # prefix of the ids of conversations that are kept in memory only
EPHEMERAL_S = 3600.0  # how long such a conversation is kept after its last turn
TITLE_CHARS = 60
DRAFT_TOKENS = 32  # a draft is extended whenever it lacks this many tokens of its answer


class TurnStores:
    """A durable store and one in memory, either of which may be absent.

    Attributes:
        owner: this process's name in the durable store, under which it writes drafts; "" if it writes none.
    """

    def __init__(
        self, durable: ConversationStore | None, ephemeral: ConversationStore | None, owner: str | None
    ) -> None:
        self.durable = durable
        self.ephemeral = ephemeral
        self.owner = owner or ""

    # -- which store

    def of(self, conversation_id: str) -> ConversationStore | None:
        """The store that a conversation is kept in; None if it is kept in none."""
        if self.ephemeral is not None and conversation_id.startswith(EPHEMERAL):
            return self.ephemeral
        return self.durable

    def new_id(self, *, durable: bool) -> str:
        """An id for a new conversation, which says in which store it is kept."""
        return ("chat_" if durable or self.ephemeral is None else EPHEMERAL) + uuid.uuid4().hex

    @property
    def _all(self) -> list[ConversationStore]:
        return [store for store in (self.ephemeral, self.durable) if store is not None]

    def expired(self, now_s: float, limit: int) -> list[Conversation]:
        """Conversations of all namespaces whose ttl has passed at `now_s` (since the epoch), at most `limit`
        of each store.

        Waits for the stores.
        """
        return [conversation for store in self._all for conversation in store.expired(now_s, limit)]

    def turn(self, namespace: str, turn_id: str) -> Turn | None:
        """A turn of either store; None if neither has it. Waits for the stores."""
        for store in self._all:
            with suppress(ConversationNotFound):
                return store.turn(namespace, turn_id)
        return None

    def conversation_of(self, namespace: str, turn_id: str) -> str | None:
        """The id of the conversation that a turn of either store belongs to; None if neither has it.

        Waits for the stores.
        """
        homes = (store.home(namespace, turn_id) for store in self._all)
        return next((home for home in homes if home is not None), None)

    # -- a turn, as it goes on

    def touch(self, turn: PendingTurn) -> None:
        """A turn begins: the ttl of its conversation starts again."""
        store = self.of(turn.conversation_id)
        conversation = None if turn.position is None else turn.position.conversation
        if store is not None and conversation is not None and conversation.ttl_s is not None:
            store.touch(turn.namespace, turn.conversation_id)

    def open(self, turn: PendingTurn) -> Future[Conversation] | None:
        """A turn has its first token: create its conversation if it is new, and begin the draft.

        Waits for nothing.

        Returns:
            The creation of the conversation, None if it exists or is not stored.
        """
        turn.opened = True
        store, position = self.of(turn.conversation_id), turn.position
        if not turn.stored or store is None or position is None:
            return None
        title = _title(turn.spec.messages)
        created = None
        if position.conversation is None:
            created = store.create_soon(turn.namespace, turn.conversation_id, title=title)
            turn.created = True
        elif position.conversation.title is None and position.conversation.leaf is None:
            metadata = position.conversation.metadata
            store.describe(turn.namespace, turn.conversation_id, title=title, metadata=metadata)
        if store is self.ephemeral:
            store.set_ttl(turn.namespace, turn.conversation_id, EPHEMERAL_S)
        elif self.owner:
            prompt = turn.prompt
            store.draft(
                turn.namespace,
                turn.conversation_id,
                prompt.parent,
                turn.request_id,
                prompt.new,
                prompt.tokens[prompt.reused_tokens :],
                prompt.reused_tokens,
                len(prompt.tokens),
                _meta(turn, prompt.new),
                owner=self.owner,
            )
            turn.drafted = True
        return created

    def extend_draft(self, turn: PendingTurn) -> Future[None] | None:
        """Add what was sampled since to the draft. None if there is none, or too little to add."""
        if not turn.drafted or turn.cut is not None or len(turn.sampled) - turn.num_drafted < DRAFT_TOKENS:
            return None
        store = self.of(turn.conversation_id)
        assert store is not None
        token_ids = [token.token_id for token in turn.sampled[turn.num_drafted :]]
        text = "".join(piece.text for piece in turn.pieces[turn.pieces_drafted :])
        turn.num_drafted, turn.pieces_drafted = len(turn.sampled), len(turn.pieces)
        return store.extend_draft(turn.request_id, token_ids, text)

    def takes(self, turn: PendingTurn, done: TurnDone) -> bool:
        """Whether an answer that has ended is to be stored."""
        is_empty = done.reason is FinishReason.ABORT and not done.output
        return turn.stored and not is_empty and self.of(turn.conversation_id) is not None

    def append(self, turn: PendingTurn, done: TurnDone) -> Future[Turn]:
        """Store an answer that has ended."""
        store, prompt = self.of(turn.conversation_id), turn.prompt
        assert store is not None and done.message is not None
        messages = (*prompt.new, done.message)
        answer_meta = {} if turn.spec.answer_meta is None else dict(turn.spec.answer_meta(done))
        return store.append(
            turn.namespace,
            turn.conversation_id,
            prompt.parent,
            messages,
            (*prompt.tokens[prompt.reused_tokens :], *done.output),
            start=prompt.reused_tokens,
            reply_reason=done.reason.value,
            only_if_leaf=turn.spec.after is LEAF and turn.spec.conversation_id is not None,
            turn_id=turn.request_id,
            meta=_meta(turn, messages) | answer_meta,
            claimed=turn.spec.claimed and store is self.durable,  # claims are kept in the durable store only
        )

    def discard(self, turn: PendingTurn) -> None:
        """A turn ended without being stored: drop its draft."""
        if turn.drafted:
            turn.drafted = False
            store = self.of(turn.conversation_id)
            assert store is not None
            store.discard_draft(turn.request_id)

    def delete_unused(self, turn: PendingTurn) -> Future[bool]:
        """Delete the conversation that was created for a turn, if no turn is stored in it."""
        store = self.of(turn.conversation_id)
        assert store is not None
        return store.delete_unused(turn.namespace, turn.conversation_id)


def _meta(turn: PendingTurn, messages: Sequence[Message]) -> dict[str, object]:
    """What a later turn's prompt needs to know of this one, which stores `messages`."""
    meta: dict[str, object] = {CHARS: turn.prompt.path.stored_chars + chars_of(messages)}
    if turn.prompt.path.left_out:
        meta[LEFT_OUT] = turn.prompt.path.left_out
    if turn.spec.instructions is not None:
        meta[INSTRUCTIONS] = turn.spec.instructions
    if turn.spec.tools:
        meta[TOOLS] = [dict(tool) for tool in turn.spec.tools]
    return meta


def _title(messages: Sequence[Message]) -> str | None:
    """A title for a conversation that has none: the first words of its user."""
    words = next((message.content for message in messages if message.role == "user"), "").split()
    return " ".join(words)[:TITLE_CHARS] or None
