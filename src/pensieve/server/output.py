"""An answer's text as its parts: words, reasoning, tool calls. Knows the text room's parsers; never bodies or events."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pensieve.message import Message, ToolCall
from pensieve.server.errors import ApiError
from pensieve.service.turn import Tools
from pensieve.text import (
    CallBegin,
    CallDelta,
    CallEnd,
    ChatText,
    ContentDelta,
    ReasoningDelta,
    ToolCallParser,
    ToolEvent,
    force_prefix,
    tool_names,
)

OutputEvent = ToolEvent | ReasoningDelta


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How an answer is to be read."""

    tools: Tools = ()  # that the model is told of
    calls: bool = True  # calls of them are read out of the answer; False: it is words, whatever it says
    parallel: bool = True  # several calls in one answer
    forced: bool = False  # one of them must be called
    named: str | None = None  # the one that must be; None: as the model likes
    reasoning: bool = False  # the template knows <think>

    def prefix(self, text: ChatText) -> str:
        """What the answer is made to begin with, so that it is the call that was asked for."""
        return force_prefix(text.tool_format, self.named) if self.forced else ""


def form_for(tools: Tools, choice: object, named: bool, parallel: bool, text: ChatText) -> OutputForm:
    """How an answer is read that may call `tools`, or must.

    Args:
        tools: the functions, as chat templates expect them.
        choice: None, none, auto or required; a function's name if `named`.
        named: `choice` is a function's name.
        parallel: an answer may hold several calls.
        text: whose reasoning and calls these are.

    Raises:
        ApiError: the choice is not among the functions.
    """
    if not tools and (named or choice not in (None, "none", "auto")):
        raise ApiError(400, "tool_choice needs tools", code="invalid_value", param="tool_choice")
    if choice == "none" and not named:
        return OutputForm(
            tools, calls=False, reasoning=text.has_reasoning
        )  # (without them the prompt, and its cache, would be another)
    if not tools:
        return OutputForm(reasoning=text.has_reasoning)
    names = tool_names(tools)
    if named:
        if choice not in names:
            raise ApiError(
                400,
                f"tool_choice names {choice!r}, which is none of the tools",
                code="invalid_value",
                param="tool_choice",
            )
        return OutputForm(
            tools, parallel=False, forced=True, named=str(choice)
        )  # who names a function wants this call and nothing behind it
    if choice == "required":
        return OutputForm(tools, parallel=parallel, forced=True, named=names[0] if len(names) == 1 else None)
    return OutputForm(tools, parallel=parallel, reasoning=text.has_reasoning)


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
            if self.form.tools and self.form.calls
            else None
        )
        self._arguments: list[str] = []

    @property
    def enough(self) -> bool:
        """Nothing after this belongs to the answer: the one call that it may hold is complete."""
        return self._parser is not None and self._parser.done

    def feed(self, text: str) -> list[OutputEvent]:
        """Take the next piece."""
        return self._take(
            self._splitter.feed(text) if self._splitter is not None else [ContentDelta(text)], last=False
        )

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
