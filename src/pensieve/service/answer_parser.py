"""An answer's text as its parts: content, reasoning, tool calls.

Knows the text room's parsers; never stores, bodies or HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pensieve.message import Message, ToolCall
from pensieve.text import (
    CallBegin,
    CallDelta,
    CallEnd,
    ChatText,
    ContentDelta,
    ReasoningDelta,
    ToolCallParser,
    ToolEvent,
)
from pensieve.text.tool_format import Tools

AnswerEvent = ToolEvent | ReasoningDelta


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How an answer is read."""

    tools: Tools = ()  # the functions that the prompt tells the model of
    calls: bool = True  # whether calls are read out of the answer; without, it is content, whatever it says
    parallel: bool = True  # whether one answer may hold several calls
    reasoning: bool = False  # whether the template knows <think>
    prefix: str = ""  # text that the answer is made to begin with, so that it is the call that was asked for


class AnswerParser:
    """Parses one answer as it arrives. The events do not depend on where the pieces are cut.

    The ids of calls are derived from the turn's id, so that they are the same in a stream, in the store and
    in a retry.
    """

    def __init__(self, text: ChatText, form: AnswerForm, turn_id: str) -> None:
        self._turn_id = turn_id
        self._splitter = text.reasoning_splitter() if form.reasoning else None
        self._tool_parser = None
        if form.tools and form.calls:
            self._tool_parser = ToolCallParser(
                text.tool_format, form.tools, max_calls=None if form.parallel else 1
            )
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._arguments: list[str] = []  # of the call that is arriving

    @property
    def is_complete(self) -> bool:
        """Whether the only call that the answer may hold is complete: further text is ignored."""
        return self._tool_parser is not None and self._tool_parser.done

    def feed(self, text: str) -> list[AnswerEvent]:
        """Parse the next piece."""
        return self._take([ContentDelta(text)] if self._splitter is None else self._splitter.feed(text))

    def finish(self) -> list[AnswerEvent]:
        """The answer has ended: what was held back."""
        events = [] if self._splitter is None else self._take(self._splitter.finish())
        return events if self._tool_parser is None else [*events, *self._collect(self._tool_parser.finish())]

    def message(self) -> Message:
        """The answer as a message, once it has ended."""
        return Message("assistant", "".join(self._content), tuple(self._calls))

    def _take(self, split: Sequence[ReasoningDelta | ContentDelta]) -> list[AnswerEvent]:
        events: list[AnswerEvent] = []
        for part in split:
            if isinstance(part, ReasoningDelta):
                events.append(part)
            elif part.text:
                events += self._collect(
                    [part] if self._tool_parser is None else self._tool_parser.feed(part.text)
                )
        return events

    def _collect(self, parsed: Sequence[ToolEvent]) -> list[AnswerEvent]:
        events: list[AnswerEvent] = []
        for event in parsed:
            match event:
                case ContentDelta():
                    self._content.append(event.text)
                case CallBegin():
                    event = replace(event, id=call_id(self._turn_id, event.index))
                    self._calls.append(ToolCall(event.id, event.name, ""))
                    self._arguments = []
                case CallDelta():
                    self._arguments.append(event.arguments)
                case CallEnd():
                    call = self._calls[event.index]
                    self._calls[event.index] = ToolCall(call.id, call.name, "".join(self._arguments))
            events.append(event)
        return events


def call_id(turn_id: str, index: int) -> str:
    """The id of a turn's call."""
    return "call_" + hashlib.blake2b(f"{turn_id}:{index}".encode(), digest_size=12).hexdigest()
