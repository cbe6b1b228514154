"""An answer's text as its parts: words, reasoning, tool calls. Knows the text room's parsers; never bodies or events."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pensieve.chat import Message, ToolCall
from pensieve.service.turn import Tools
from pensieve.text import CallBegin, CallDelta, CallEnd, ChatText, ContentDelta, ReasoningDelta, ToolCallParser, ToolEvent, force_prefix

OutputEvent = ToolEvent | ReasoningDelta


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How an answer is to be read."""

    tools: Tools = ()
    parallel: bool = True  # several calls in one answer
    forced: str | None = None  # "required", or the name of the function that must be called; None: as the model likes
    reasoning: bool = False  # the template knows <think>

    def prefix(self, text: ChatText) -> str:
        """What the answer is made to begin with, so that it is the call that was asked for."""
        if self.forced is None:
            return ""
        return force_prefix(text.tool_format, None if self.forced == "required" else self.forced)


@dataclass
class Output:
    """Reads an answer as it comes. Fed the same text in any pieces, it says the same.

    Call ids follow from the turn's id, so that what is streamed and what is stored agree.
    """

    text: ChatText
    form: OutputForm
    turn_id: str
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._splitter = self.text.reasoning_splitter() if self.form.reasoning else None
        self._parser = (
            ToolCallParser(
                self.text.tool_format,
                self.form.tools,
                max_calls=None if self.form.parallel else 1,
            )
            if self.form.tools
            else None
        )
        self._arguments: list[str] = []

    @property
    def enough(self) -> bool:
        """Nothing after this belongs to the answer: the one call that it may hold is complete."""
        return self._parser is not None and self._parser.done

    def feed(self, text: str) -> list[OutputEvent]:
        """Take the next piece."""
        return self._take(self._splitter.feed(text) if self._splitter is not None else [ContentDelta(text)], last=False)

    def finish(self) -> list[OutputEvent]:
        """The answer ended."""
        return self._take(self._splitter.finish() if self._splitter is not None else [], last=True)

    def message(self) -> Message:
        """The answer as a message, once it is finished."""
        return Message("assistant", "".join(self.content), tuple(self.calls))

    def _take(self, split: Sequence[ReasoningDelta | ContentDelta], *, last: bool) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        for part in split:
            if isinstance(part, ReasoningDelta):
                self.reasoning.append(part.text)
                events.append(part)
            elif part.text:
                events += self._parse([part] if self._parser is None else self._parser.feed(part.text))
        if last and self._parser is not None:
            events += self._parse(self._parser.finish())
        return events

    def _parse(self, parsed: Sequence[ToolEvent]) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        for event in parsed:
            match event:
                case ContentDelta():
                    self.content.append(event.text)
                case CallBegin():
                    event = replace(event, id=call_id(self.turn_id, event.index))
                    self.calls.append(ToolCall(event.id, event.name, ""))
                    self._arguments = []
                case CallDelta():
                    self._arguments.append(event.arguments)
                case CallEnd():
                    call = self.calls[event.index]
                    self.calls[event.index] = ToolCall(call.id, call.name, "".join(self._arguments))
            events.append(event)
        return events


def call_id(turn_id: str, index: int) -> str:
    """The id of a turn's call."""
    return "call_" + hashlib.blake2b(f"{turn_id}:{index}".encode(), digest_size=12).hexdigest()


def read_whole(text: ChatText, form: OutputForm, turn_id: str, answer: str) -> Output:
    """Read a whole answer at once."""
    output = Output(text, form, turn_id)
    output.feed(answer)
    output.finish()
    return output
