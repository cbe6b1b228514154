"""From messages to the tokens a model is given: which conversation, which path, which ids. Knows text and stores; never engines or answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pensieve.chat import Message, path_digests
from pensieve.config import ContextLimit
from pensieve.errors import ContextLengthExceeded, ConversationNotFound, InvalidRequest
from pensieve.service.turn import LEAF, Path, Place, Prompt, TurnSpec
from pensieve.store.base import ConversationStore, Turn, path_messages, path_tokens
from pensieve.text import ChatText, truncate

# After an overflow the chat is cut to this share of the context, so that the next turns append again instead of cutting (and recomputing) each time.
TRUNCATE_TO = 0.75
ANSWER_SHARE = 0.25  # of the context, at most, that truncating makes free for the answer
MAX_REMEMBERED = 512  # paths kept in memory, so that a turn need not read its whole history from the store
MAX_REMEMBERED_TOKENS = 1 << 20  # of all of them together
LEFT_OUT = "left_out"  # a turn's meta: how many messages of its path an overflow had left out when it was answered
INSTRUCTIONS = "instructions"  # a turn's meta: the system's words that were for this turn alone
TOOLS = "tools"  # a turn's meta: the tools that the model was told of


class Prompts:
    """Finds a turn's place and makes its prompt. Used by the service's thread alone."""

    def __init__(
        self,
        text: ChatText | None,
        store: Callable[[str], ConversationStore | None],
        max_context: int,
        overflow: Literal["refuse", "truncate"],
        limit: ContextLimit | None = None,
    ) -> None:
        """`store(conversation_id)` is where a conversation is kept, None if nowhere; `limit` says what would allow a longer context."""
        self._text = text
        self._store = store
        self._max_context = max_context
        self._overflow = overflow
        self._way_out = "start with a larger --max-context" if limit is None else limit.way_out()
        self._paths: OrderedDict[tuple[str, str], Path] = OrderedDict()  # by namespace and turn
        self._num_remembered_tokens = 0

    # -- which conversation

    def recognise(self, spec: TurnSpec, store: ConversationStore, busy: Callable[[str], bool], new_id: str) -> Place:
        """The place of a turn whose conversation nobody named: behind `after`, or of a resent history behind the longest part that is stored.

        It goes on in the conversation that ends there; if none does, or that one is `busy` with another turn, in a fork of its own.

        Raises:
            ConversationNotFound: `after` names no turn of this namespace.
        """
        if isinstance(spec.after, str):
            turn, new = store.turn(spec.namespace, spec.after), spec.messages
        else:
            asked = len(spec.messages) - 1  # the last message is to be answered, whatever is stored
            found = store.find(spec.namespace, path_digests(spec.messages[:asked])) if asked > 0 else None
            if found is None:
                return Place(new_id, None, spec.messages)
            turn, new = found[1], spec.messages[found[0] + 1 :]
        leaves = [conversation for conversation in store.leaves(spec.namespace, turn.id) if not busy(conversation.id)]
        leaves.sort(key=lambda conversation: conversation.id != spec.hint)  # (stable: the latest used first)
        if leaves:
            return Place(leaves[0].id, turn.id, new, leaves[0])
        return Place(new_id, turn.id, new)

    def locate(self, spec: TurnSpec, conversation_id: str) -> Place:
        """The place of a turn of a named conversation.

        Raises:
            ConversationNotFound: there is no such conversation, or turn, and there has to be.
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
                    store.turn(spec.namespace, spec.after)  # (raises where that is not to be had either)
        parent = (conversation.leaf if conversation is not None else None) if spec.after is LEAF else spec.after
        return Place(conversation_id, parent, spec.messages, conversation)

    # -- which tokens

    def make(self, spec: TurnSpec, place: Place) -> Prompt:
        """The tokens of a turn.

        Raises:
            InvalidRequest: the template refuses these messages.
            ContextLengthExceeded: not even the newest turn fits.
        """
        assert self._text is not None
        path = spec.forced if spec.forced is not None else self.path(spec.namespace, place.conversation_id, place.parent)
        head = () if spec.instructions is None else (Message("system", spec.instructions),)
        logged = len(path.messages) - path.unlogged
        history, new = (*head, *path.messages[:logged]), (*path.messages[logged:], *place.new)
        if not history and not new:
            raise InvalidRequest("there is nothing to answer: send at least one message")
        options = self._options(spec)
        truncating = (spec.overflow or self._overflow) == "truncate"
        if self._text.exceeds(_newest_turn(new) if truncating else (*head, *new), self._max_context):
            raise ContextLengthExceeded(
                f"the new messages have more than the {self._max_context} tokens that the context holds: shorten them, or {self._way_out}"
            )
        prompt = Prompt(parent=place.parent, new=place.new, path=path)
        if path.tokens and history and history[-1].role == "assistant":
            extension = self._text.extend(path.tokens, history, new, **options)
            tokens, reused = tuple(extension.tokens), extension.reused_tokens
            known = len(path.tokens) if extension.rewritten is None else self._count(history, options)
            prompt = replace(
                prompt,
                tokens=tokens,
                reused_tokens=reused,
                warning=extension.rewritten,
                rewritten_at=None if extension.rewritten is None else reused,
                history_tokens=min(known, len(tokens)),
            )
        else:
            prompt = replace(prompt, tokens=tuple(self._text.first([*history, *new], **options)))
        answer = min(spec.sampling.max_new_tokens, int(ANSWER_SHARE * self._max_context))
        if truncating and len(prompt.tokens) + answer > self._max_context:
            prompt = self._truncate(spec, prompt, self._max_context - answer, options)
        if spec.prefix:
            prompt = replace(prompt, tokens=(*prompt.tokens, *self._text.encode_answer(spec.prefix)))
        return prompt

    def path(self, namespace: str, conversation_id: str, turn_id: str | None) -> Path:
        """The path that ends with a turn; an empty one for None.

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
        """Keep a path in memory; the least used ones make room."""
        before = self._paths.pop((namespace, turn_id), None)
        self._paths[namespace, turn_id] = path
        self._num_remembered_tokens += len(path.tokens) - (0 if before is None else len(before.tokens))
        while len(self._paths) > 1 and (len(self._paths) > MAX_REMEMBERED or self._num_remembered_tokens > MAX_REMEMBERED_TOKENS):
            _, gone = self._paths.popitem(last=False)
            self._num_remembered_tokens -= len(gone.tokens)

    def forget(self, namespace: str) -> None:
        """Let go of what is remembered of a namespace (something in it was deleted)."""
        for key in [key for key in self._paths if key[0] == namespace]:
            self._num_remembered_tokens -= len(self._paths.pop(key).tokens)

    def _options(self, spec: TurnSpec) -> dict[str, Any]:
        return {"tools": spec.tools} if spec.tools else {}

    def _count(self, messages: Sequence[Message], options: dict[str, Any]) -> int:
        assert self._text is not None
        return len(self._text.first(messages, add_generation_prompt=False, **options)) if messages else 0

    def _truncate(self, spec: TurnSpec, prompt: Prompt, room: int, options: dict[str, Any]) -> Prompt:
        """Leave out the oldest turns; what is left is a new path, computed anew after the system prompt."""
        assert self._text is not None
        text = self._text
        head = () if spec.instructions is None else (Message("system", spec.instructions),)
        messages = [*head, *prompt.path.messages, *prompt.new]

        def count(some: Sequence[Message]) -> int:
            return len(text.first(some, **options))

        try:
            kept = truncate(messages, min(room, int(TRUNCATE_TO * self._max_context)), count)
        except ContextLengthExceeded:
            kept = truncate(messages, self._max_context - 1, count, self._way_out)
        if not kept.dropped:
            return prompt
        tokens = tuple(text.first(kept.messages, **options))
        remaining = kept.messages[len(head) : len(kept.messages) - len(prompt.new)]
        gone = len(prompt.tokens) - len(tokens)
        return replace(
            prompt,
            tokens=tokens,
            reused_tokens=0,
            rewritten_at=None,
            path=replace(prompt.path, messages=remaining, left_out=prompt.path.left_out + kept.dropped, unlogged=0),
            history_tokens=min(len(tokens), self._count(kept.messages[: len(kept.messages) - len(prompt.new)], options)),
            truncated_tokens=gone,
            warning=f"the context of {self._max_context} tokens is full: the oldest {kept.dropped} messages ({gone} tokens) were left out, "
            "and what follows the system prompt is computed again",
        )


def _newest_turn(messages: Sequence[Message]) -> Sequence[Message]:
    """From the last user's message on: what is never left out."""
    return messages[next((i for i in range(len(messages) - 1, -1, -1) if messages[i].role == "user"), 0) :]


def read_path(turns: Sequence[Turn]) -> Path:
    """A path from its turns, root to leaf; what an overflow had left out is left out again."""
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
    )


def _left_out(turn: Turn) -> int:
    count = turn.meta.get(LEFT_OUT, 0)
    return count if isinstance(count, int) else 0
