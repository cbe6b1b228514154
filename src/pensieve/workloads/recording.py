"""Finished turns of a running server, as they come, to lines of a trace. Knows lengths, times and hashes;
never servers, files or text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class _Turn:
    """What must be kept of a turn to tell whether another goes on from it."""

    num_blocks: int  # whole ones of its prompt
    last_block: str | None  # the hash of the last of them, which stands for all before it too
    tokens: int  # of prompt and answer


@dataclass(slots=True)
class _Conversation:
    num_turns: int = 0
    last_s: float = 0.0
    path: list[_Turn] = field(default_factory=list)  # those that the latest goes on from, and itself


class Recording:
    """Numbers turns, and finds out what each adds to its conversation (the form that `traces.turns` reads).

    A conversation that was under way before the recording has its whole history as its first message.
    """

    def __init__(self, block_tokens: int) -> None:
        """`block_tokens`: tokens that each hash stands for."""
        self._block_tokens = block_tokens
        self._conversations: dict[str, _Conversation] = {}
        self.num_turns = 0

    @property
    def num_conversations(self) -> int:
        """Seen so far."""
        return len(self._conversations)

    def line(
        self,
        conversation: str,
        arrival_s: float,
        prompt_tokens: int,
        output_tokens: int,
        blocks: Sequence[str],
    ) -> Mapping[str, Any]:
        """The next line of the trace.

        Args:
            conversation: whose turn it is.
            arrival_s: since the recording began. Turns come as they end: one that arrived before another of
                its conversation that is written already is told to have come with it.
            prompt_tokens: history and message.
            output_tokens: of the answer.
            blocks: a hash for each whole block of the prompt, of all tokens up to there.
        """
        known = self._conversations.setdefault(conversation, _Conversation())
        before = len(known.path)
        while known.path and not _goes_on(known.path[-1], prompt_tokens, blocks):
            known.path.pop()
        history = known.path[-1].tokens if known.path else 0
        known.last_s = max(known.last_s, arrival_s)
        line: dict[str, Any] = {
            "conversation": conversation,
            "turn": known.num_turns,
            "arrival_s": known.last_s,
            "new_tokens": prompt_tokens - history,
            "output_tokens": output_tokens,
        }
        if len(known.path) < before:
            line["keep_turns"] = len(known.path)
        if known.num_turns == 0 and blocks:
            line |= {"block_tokens": self._block_tokens, "blocks": list(blocks)}
        known.path.append(_Turn(len(blocks), blocks[-1] if blocks else None, prompt_tokens + output_tokens))
        known.num_turns += 1
        self.num_turns += 1
        return line


def _goes_on(turn: _Turn, prompt_tokens: int, blocks: Sequence[str]) -> bool:
    """Whether a prompt begins with a turn's, and has room for its answer."""
    if turn.tokens >= prompt_tokens or turn.num_blocks > len(blocks):
        return False
    return turn.num_blocks == 0 or blocks[turn.num_blocks - 1] == turn.last_block
