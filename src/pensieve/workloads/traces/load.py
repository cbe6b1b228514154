"""Which form a trace has, and what is in it. Knows how forms look from outside; never their fields.

The forms are told apart by the first entry: turns of conversations with times (ours), sessions of coding
agents (token counts and think times, no words), requests with the hashes of their blocks (Mooncake), requests
with nothing but their lengths (Azure), and chats with words (every form that `conversations.load_dataset`
reads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.conversations import load_dataset
from pensieve.workloads.generators import LIKENESSES, Generator, generator
from pensieve.workloads.scripts import Script, ScriptTurn
from pensieve.workloads.traces.azure import is_azure, read_azure
from pensieve.workloads.traces.mooncake import is_mooncake, read_mooncake
from pensieve.workloads.traces.reading import FORMS, TraceFile, try_json
from pensieve.workloads.traces.sessions import is_sessions, read_sessions
from pensieve.workloads.traces.turns import is_turns, read_turns

DEFAULT_OUTPUT_TOKENS = 64  # of an answer whose length the trace does not give
NUM_MADE = 1000  # conversations of a trace that has no end


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file holds."""

    form: str  # "turns", "sessions", "mooncake", "azure" or "texts"; or the name of what it is like
    scripts: tuple[Script, ...]
    timed: bool  # whether it has the times at which conversations begin; else the caller gives them
    generator: Generator | None = None  # makes more of its conversations, without end


def load_trace(
    path: str | Path, output_tokens: int | None = None, think: ThinkTime | None = None, seed: int | str = 0
) -> Trace:
    """Read a trace; `.gz` files are unpacked.

    Args:
        path: the file, or a name of `LIKENESSES`, whatever files there are: its first `NUM_MADE`
            conversations and what makes more.
        output_tokens: of the answers in chats with words; None: as many as the recorded answer has, or,
            without one, 64.
        think: the time before turns whose gap it does not tell; None: no time at all.
        seed: of the think times, and of what is made.

    Raises:
        ConfigError: the file cannot be read, or an entry is wrong; the message names file and line, and what
            is allowed.
    """
    name, think = str(path), think or ThinkTime()
    if name in LIKENESSES:
        made = generator(name, think, seed)
        return Trace(name, tuple(map(made.script, range(NUM_MADE))), False, made)
    file = TraceFile(path)
    number, text = file.first()
    if is_azure(text):
        return Trace("azure", read_azure(file), True)
    entry = try_json(text)
    if is_turns(entry):
        return Trace("turns", read_turns(file), True)
    if is_mooncake(entry):
        return Trace("mooncake", read_mooncake(file), True)
    if is_sessions(entry):
        return Trace("sessions", read_sessions(file), False)
    if text.lstrip()[:1] not in ("[", "{"):
        raise ConfigError(f"{name}, line {number}: not JSON; the file must be {FORMS}")
    return Trace("texts", _texts(path, output_tokens, think, seed), False)


def _texts(
    path: str | Path, output_tokens: int | None, think: ThinkTime, seed: int | str
) -> tuple[Script, ...]:
    """Chats: what users said, and about as much answered as was recorded."""

    def answered(recorded: Sequence[int | None], turn: int) -> int:
        told = recorded[turn] if turn < len(recorded) else None
        return output_tokens or told or DEFAULT_OUTPUT_TOKENS

    return tuple(
        Script(
            conversation.id,
            tuple(
                ScriptTurn(
                    None,
                    answered(conversation.answer_tokens, turn),
                    think.draw_s(seed, index, turn),
                    text=text,
                )
                for turn, text in enumerate(conversation.turns)
            ),
            conversation.system,
            where=f"{path}, conversation {conversation.id!r}",
        )
        for index, conversation in enumerate(load_dataset(path))
    )
