"""Turns of conversations with their times, our own form, which `pensieve record` writes. Knows that form;
never who wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pensieve.errors import ConfigError
from pensieve.workloads.scripts import Piece, Script, ScriptTurn
from pensieve.workloads.traces.prefixes import Block, shared_beginnings
from pensieve.workloads.traces.reading import TraceFile, check_fields, count, seconds

_FIELDS = frozenset(
    {"conversation", "turn", "arrival_s", "gap_s", "new_tokens", "output_tokens", "keep_turns", "blocks", "block_tokens"}
)  # fmt: skip


@dataclass(slots=True)
class _Conversation:
    where: str
    turns: list[ScriptTurn] = field(default_factory=list)
    last_s: float = 0.0  # when its latest turn so far that tells it arrived
    history: int = 0  # turns on the path
    blocks: list[Block] = field(default_factory=list)  # of the first message


def is_turns(entry: object) -> bool:
    """Whether a first entry is of this form."""
    return isinstance(entry, dict) and "conversation" in entry


def read_turns(file: TraceFile) -> tuple[Script, ...]:
    """Turns of conversations, in any order of conversations and in the order of turns within one."""
    found: dict[str, _Conversation] = {}
    for number, record in file.objects():
        where = file.where(number)
        check_fields(record, _FIELDS, where)
        key = record.get("conversation")
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise ConfigError(f'{where}: "conversation" must be a text or a whole number, got {key!r:.40}')
        conversation = found.get(str(key)) or found.setdefault(str(key), _Conversation(where))
        _add(conversation, record, str(key), where)
    beginnings = shared_beginnings([conversation.blocks for conversation in found.values()])
    return tuple(
        _script(key, conversation, tuple(Piece(*stretch) for stretch in stretches))
        for (key, conversation), stretches in zip(found.items(), beginnings, strict=True)
    )


def _add(conversation: _Conversation, record: Mapping[str, object], key: str, where: str) -> None:
    turns = conversation.turns
    if (turn := count(record.get("turn"), f'{where}: "turn"', least=0)) != len(turns):
        raise ConfigError(
            f"{where}: turn {turn} of conversation {key!r} follows {len(turns)} turn(s): they must be "
            "numbered 0, 1, 2, ..."
        )
    if ("arrival_s" in record) == ("gap_s" in record):
        raise ConfigError(f'{where}: exactly one of "arrival_s" and "gap_s" must be there')
    due_s = seconds(record["arrival_s"], f'{where}: "arrival_s"') if "arrival_s" in record else None
    if due_s is not None:
        if conversation.last_s > due_s:
            raise ConfigError(
                f"{where}: turn {turn} of conversation {key!r} arrives at {due_s:g} s, before an earlier "
                f"turn's {conversation.last_s:g} s"
            )
        conversation.last_s = due_s
    gap_s = seconds(record["gap_s"], f'{where}: "gap_s"') if "gap_s" in record else 0.0
    new, output = (count(record.get(name), f'{where}: "{name}"') for name in ("new_tokens", "output_tokens"))
    keep: int | None = None
    if "keep_turns" in record:
        keep = count(record["keep_turns"], f'{where}: "keep_turns"', least=0)
        if keep > conversation.history:
            raise ConfigError(
                f'{where}: "keep_turns" must be at most {conversation.history}, the turns before this one, '
                f"got {keep}"
            )
        conversation.history = keep
    conversation.history += 1
    turns.append(ScriptTurn(new, output, gap_s, due_s, keep_turns=keep))
    if "blocks" in record or "block_tokens" in record:
        conversation.blocks = _blocks(record, turn, new, where)


def _blocks(record: Mapping[str, object], turn: int, new: int, where: str) -> list[Block]:
    """Hashes of the whole blocks that a conversation begins with."""
    hashes = record.get("blocks")
    if turn:
        raise ConfigError(
            f'{where}: "blocks" and "block_tokens" are of a conversation\'s turn 0 alone, this is turn {turn}'
        )
    if not isinstance(hashes, list) or any(
        isinstance(one, bool) or not isinstance(one, str | int) for one in hashes
    ):
        raise ConfigError(f'{where}: "blocks" must be a list of texts or whole numbers, got {hashes!r:.40}')
    size = count(record.get("block_tokens"), f'{where}: "block_tokens"')
    if len(hashes) * size > new:
        raise ConfigError(
            f'{where}: {len(hashes)} "blocks" of {size} tokens are more than the {new} "new_tokens" that '
            "they are of"
        )
    return [((size, one), size) for one in hashes[: (new - 1) // size]]  # (a message has a token of its own)


def _script(key: str, conversation: _Conversation, prefix: tuple[Piece, ...]) -> Script:
    shared = sum(piece.tokens for piece in prefix)
    turns = (
        replace(turn, new_tokens=max(1, turn.message_tokens - shared))
        if index == 0 or turn.keep_turns == 0
        else turn
        for index, turn in enumerate(conversation.turns)
    )
    return Script(key, tuple(turns), prefix=prefix, where=conversation.where)
