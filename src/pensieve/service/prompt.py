"""Prompts of turns: which conversation, which path, which job for the text room.

Knows stores and jobs; never engines or answers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from pensieve.config import ContextLimit
from pensieve.errors import ConversationNotFound, InvalidRequest
from pensieve.message import Message, chars_of, path_digests
from pensieve.service.turn import LEAF, Path, Prompt, TurnPosition, TurnSpec
from pensieve.store import ConversationStore, Turn, path_messages, path_tokens
from pensieve.text import ChatText, WriteChat, WrittenChat, check_length, newest, size_of

ANSWER_SHARE = 0.25  # of the context: the most that truncating frees for the answer
MAX_REMEMBERED = 512  # paths kept in memory, so that turns rarely read their histories from the store
MAX_REMEMBERED_TOKENS = 1 << 20  # of all these paths together
MAX_REMEMBERED_CHARS = 1 << 25
# of the messages of one conversation: reading and resending more at every turn would delay other requests
MAX_STORED_CHARS = 1 << 24
# keys in a turn's meta:
CHARS = "chars"  # characters of all messages on its path
LEFT_OUT = "left_out"  # number of messages of its path that were truncated when it was answered
INSTRUCTIONS = "instructions"  # the system prompt of this turn alone
TOOLS = "tools"  # the functions that the model was told of


class Prompts:
    """Finds a turn's position and makes its prompt. Used by the service's thread only."""

    def __init__(
        self,
        text: ChatText | None,
        store: Callable[[str], ConversationStore | None],
        max_context: int,
        overflow: Literal["refuse", "truncate"],
        limit: ContextLimit | None = None,
    ) -> None:
        """`store(conversation_id)` returns the store of a conversation; `limit` says what would allow a
        longer context.
        """
        self._text = text
        self._store = store
        self._max_context = max_context
        self._overflow = overflow
        self._way_out = "start with a larger --max-context" if limit is None else limit.way_out()
        self._paths: OrderedDict[tuple[str, str], Path] = OrderedDict()  # by namespace and turn id
        self._num_remembered_tokens = self._num_remembered_chars = 0

    # -- which conversation

    def recognise(
        self, spec: TurnSpec, store: ConversationStore, busy: Callable[[str], bool], new_id: str
    ) -> TurnPosition:
        """The position of a turn that names no conversation: after `after`, or after its longest stored
        history.

        The turn continues the conversation that ends there. If none does, or that one is `busy` with another
        turn, it begins a fork.

        Raises:
            ConversationNotFound: `after` names no turn of this namespace.
        """
        if isinstance(spec.after, str):
            turn, new = store.turn(spec.namespace, spec.after), spec.messages
        else:
            asked = len(spec.messages) - 1  # the last message is answered, whether it is stored or not
            found = store.find(spec.namespace, path_digests(spec.messages[:asked])) if asked > 0 else None
            if found is None:
                return TurnPosition(new_id, None, spec.messages)
            turn, new = found[1], spec.messages[found[0] + 1 :]
        leaves = [
            conversation
            for conversation in store.leaves(spec.namespace, turn.id)
            if not busy(conversation.id)
        ]
        leaves.sort(key=lambda conversation: conversation.id != spec.hint)  # stable: the latest used first
        if leaves:
            return TurnPosition(leaves[0].id, turn.id, new, leaves[0])
        return TurnPosition(new_id, turn.id, new)

    def locate(self, spec: TurnSpec, conversation_id: str) -> TurnPosition:
        """The position of a turn of a named conversation.

        Raises:
            ConversationNotFound: the conversation or the turn must exist, and does not.
        """
        store = self._store(conversation_id)
        conversation = None
        if store is not None:
            try:
                conversation = store.get(spec.namespace, conversation_id)
            except ConversationNotFound:
                if spec.must_exist:
                    raise
                if spec.after is not LEAF and spec.after is not None:
                    store.turn(spec.namespace, spec.after)  # raises if it does not exist
        parent = (
            (conversation.leaf if conversation is not None else None) if spec.after is LEAF else spec.after
        )
        return TurnPosition(conversation_id, parent, spec.messages, conversation)

    # -- which tokens

    def job(self, spec: TurnSpec, position: TurnPosition) -> tuple[Path, WriteChat]:
        """The path that a turn continues, and the job that writes its prompt.

        Takes as long as reading a path from the store.

        Raises:
            InvalidRequest: there is nothing to answer, or the conversation is too long to continue.
            ContextLengthExceeded: not even the newest turn fits.
        """
        assert self._text is not None
        path = (
            spec.forced
            if spec.forced is not None
            else self.path(spec.namespace, position.conversation_id, position.parent)
        )
        check_stored(path.stored_chars)
        head = _head(spec)
        logged = len(path.messages) - path.unlogged
        history, new = (*head, *path.messages[:logged]), (*path.messages[logged:], *position.new)
        truncating = (spec.overflow or self._overflow) == "truncate"
        max_chars = self._text.most_chars(self._max_context)
        whole, left_out, left_out_chars = (*history, *new), 0, 0
        tools_chars = size_of(spec.tools, max_chars)
        if truncating:
            kept = newest(whole, max_chars)
            left_out, left_out_chars = kept.dropped, chars_of(whole) - chars_of(kept.messages)
            if left_out:
                history, new = (), kept.messages
            check_length(newest(whole, 0).messages, tools_chars, max_chars, self._max_context, self._way_out)
        else:
            check_length(whole, tools_chars, max_chars, self._max_context, self._way_out)
        return path, WriteChat(
            history,
            new,
            () if left_out else path.tokens,
            self._max_context,
            min(spec.sampling.max_new_tokens, int(ANSWER_SHARE * self._max_context)),
            truncating,
            left_out,
            left_out_chars,
            len(position.new),
            tuple(spec.tools),
            spec.prefix,
            self._way_out,
        )

    def take(self, spec: TurnSpec, position: TurnPosition, path: Path, written: WrittenChat) -> Prompt:
        """A turn's prompt, from the job's result."""
        tokens = (*path.tokens[: written.reused_tokens], *written.tokens)
        warning = written.warning
        if written.dropped:
            warning = (
                f"the context of {self._max_context} tokens is full: the oldest {written.dropped} messages "
                f"({written.dropped_tokens} tokens) were left out, and what follows the system prompt is "
                "computed again"
            )
        return Prompt(
            tokens,
            written.history_tokens,
            written.reused_tokens,
            None if warning is None or written.dropped else written.reused_tokens,
            position.parent,
            position.new,
            _without_oldest(path, _head(spec), position.new, written.dropped) if written.dropped else path,
            written.dropped_tokens,
            warning,
        )

    def path(self, namespace: str, conversation_id: str, turn_id: str | None) -> Path:
        """The path that ends with a turn; an empty one if `turn_id` is None.

        Raises:
            ConversationNotFound: there is no such turn in this namespace.
        """
        store = self._store(conversation_id)
        if turn_id is None or store is None:
            return Path()
        key = (namespace, turn_id)
        if (path := self._paths.get(key)) is None:
            path = read_path(store.path(namespace, turn_id))
            self.remember(namespace, turn_id, path)
        self._paths.move_to_end(key)
        return path

    def remember(self, namespace: str, turn_id: str, path: Path) -> None:
        """Keep a path in memory; those not used for longest are dropped."""
        before = self._paths.pop((namespace, turn_id), None)
        self._paths[namespace, turn_id] = path
        self._count(path, 1)
        if before is not None:
            self._count(before, -1)
        while len(self._paths) > 1 and (
            len(self._paths) > MAX_REMEMBERED
            or self._num_remembered_tokens > MAX_REMEMBERED_TOKENS
            or self._num_remembered_chars > MAX_REMEMBERED_CHARS
        ):
            self._count(self._paths.popitem(last=False)[1], -1)

    def forget(self, namespace: str) -> None:
        """Drop the remembered paths of a namespace, in which something was deleted."""
        for key in [key for key in self._paths if key[0] == namespace]:
            self._count(self._paths.pop(key), -1)

    def _count(self, path: Path, sign: int) -> None:
        self._num_remembered_tokens += sign * len(path.tokens)
        self._num_remembered_chars += sign * path.chars


def _head(spec: TurnSpec) -> tuple[Message, ...]:
    """Messages in front of a turn's path, for this turn alone."""
    return () if spec.instructions is None else (Message("system", spec.instructions),)


def _without_oldest(path: Path, head: Sequence[Message], new: Sequence[Message], dropped: int) -> Path:
    """A path without the `dropped` messages after its system prompt."""
    messages = [*head, *path.messages, *new]
    start = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    del messages[start : start + dropped]
    return replace(
        path,
        messages=tuple(messages[len(head) : len(messages) - len(new)]),
        left_out=path.left_out + dropped,
        unlogged=0,
    )


def check_stored(num_chars: int) -> None:
    """Refuse to continue a conversation of `num_chars` characters if that is too long.

    Raises:
        InvalidRequest: it is.
    """
    if num_chars > MAX_STORED_CHARS:
        raise InvalidRequest(
            f"the conversation holds {num_chars} characters, and one of more than {MAX_STORED_CHARS} "
            "is not gone on with: fork it at an earlier turn, or begin another"
        )


def stored_chars(turns: Sequence[Turn]) -> int:
    """Characters of all messages of a path, root to leaf."""
    known = turns[-1].meta.get(CHARS) if turns else 0
    return known if isinstance(known, int) else sum(chars_of(turn.messages) for turn in turns)


def read_path(turns: Sequence[Turn]) -> Path:
    """A path from its turns, root to leaf; messages that were truncated are left out again."""
    messages = path_messages(turns)
    left_out = _left_out(turns[-1]) if turns else 0
    if left_out:
        head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
        del messages[head : head + left_out]
    unlogged = 0
    for turn in reversed(turns):
        if turn.token_ids:
            break
        unlogged += len(turn.messages)
    instructions = turns[-1].meta.get(INSTRUCTIONS) if turns else None
    return Path(
        tuple(messages),
        tuple(path_tokens(turns)),
        left_out,
        min(unlogged, len(messages)),
        instructions if isinstance(instructions, str) else None,
        stored_chars(turns),
    )


def _left_out(turn: Turn) -> int:
    count = turn.meta.get(LEFT_OUT, 0)
    return count if isinstance(count, int) else 0
