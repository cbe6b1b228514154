"""Finds tool calls in an answer while it arrives.

Knows the markers around calls and the text between them; never tokens, templates or requests.

Every character is read once (a few of a marker twice), and nothing depends on where the pieces are cut. Text
that may still become a call is held back. It is a call once a known tool's name and the first character of an
arguments object are there: from then on its arguments are passed on as they arrive and cannot be taken back.
Text that turns out before that to be no call is content, unchanged.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from pensieve.text.call_body import CallBody, NamedBody, ObjectBody, Verdict
from pensieve.text.json_scan import JSON_SPACE
from pensieve.text.tool_format import ToolFormat, Tools, tool_names

_RUNS = re.compile(r"\s+|\S+")
_END_MARKER = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call begins."""

    index: int  # of the call in its answer
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call's arguments. All pieces together are their JSON text, as the model wrote it."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call's arguments are complete, or the answer ended inside them."""

    index: int


ToolEvent = ContentDelta | CallBegin | CallDelta | CallEnd


class ToolCallParser:
    """Splits one answer's text into content and calls.

    White space around calls is dropped, except a little between two pieces of content with calls between
    them. A call whose arguments break off, or whose brackets do not match, keeps them as far as they go: to
    the end marker if the format has one, otherwise to the end of the answer.

    Args:
        format: how the model writes calls.
        tools: those that may be called; a call of anything else is content.
        max_calls: the answer is `done` after so many calls; the text after them is left out.
        stream_arguments: False holds each call back until it is complete; a call that is not valid JSON is
            content then.

    Raises:
        InvalidRequest: a tool is malformed.
    """

    def __init__(
        self, format: ToolFormat, tools: Tools, *, max_calls: int | None = None, stream_arguments: bool = True
    ) -> None:
        self._format = format
        self._names = frozenset(tool_names(tools))
        self._max_calls = max_calls
        self._streams = stream_arguments
        self._marker = (
            format.begin
        )  # its first character occurs in it once: after a mismatch, no earlier character can begin another
        self._separator = {"llama3": ";", "mistral": ",", "mistral-args": ","}.get(format.value)
        self._words = re.compile(rf"[^\s{re.escape(self._marker[0])}]+")
        self._state: Callable[[str], bool] = self._in_content
        self._body: CallBody | None = None
        self._in_list = False
        self._held: list[str] = []  # content if it turns out to be no call
        self._gap: list[
            str
        ] = []  # the latest white space: content if content follows, dropped next to a call
        self._call_in_gap = False
        self._has_content = False
        self._num_calls = 0  # calls that have begun
        self._num_ended = 0
        self._position = 0  # characters fed
        self._call_stop = 0  # position of the last call's last bracket
        self._done = False
        self._closing = ""
        self._events: list[ToolEvent] = []
        self._pieces: list[str] = []  # of the delta that is being put together
        self._pieces_of: int | None = None  # the call that they belong to; None for content

    @property
    def num_calls(self) -> int:
        """Calls that have begun so far."""
        return self._num_calls

    @property
    def done(self) -> bool:
        """Whether `max_calls` calls are complete: the answer may be stopped."""
        return self._done

    @property
    def taken(self) -> int:
        """Leading characters of the input that belong to the answer: fewer than all only if it is `done`."""
        return self._position

    @property
    def closing(self) -> str:
        """The text that completes an answer cut where it is `done`, such as a list's bracket."""
        return self._closing

    def feed(self, text: str) -> list[ToolEvent]:
        """Take the next piece of the answer; returns the events that are settled now."""
        at = 0
        while at < len(text) and not self._done:
            if (
                self._state == self._in_content
                and self._has_content
                and (words := self._words.match(text, at))
            ):
                self._say(words[0])
                self._position += len(words[0])
                at = words.end()
            else:
                self._position += 1
                self._step(text[at])
                at += 1
        return self._drain()

    def finish(self) -> list[ToolEvent]:
        """End the answer; returns text held back that is no call, or the end of a broken call."""
        if self._done:
            return []
        if self._body is not None:
            self._judge(self._body.stop(), self._position)
        if self._state == self._in_broken:
            self._write(self._num_calls - 1, "".join(self._held))
            self._end_call()
        elif (
            self._state != self._in_opening or not self._num_calls or self._held[0] != self._separator
        ):  # a lone separator has no meaning
            self._say("".join(self._held))
        if not self._call_in_gap:
            self._write(None, "".join(self._gap))
        self._held, self._gap, self._state = [], [], self._in_content
        return self._drain()

    # -- states: each takes a character, or has gone to another state that is to look at it

    def _step(self, char: str) -> None:
        while not self._done and not self._state(char):
            pass

    def _in_content(self, char: str) -> bool:
        if (
            char == "{"
            and self._format is ToolFormat.LLAMA3
            and not self._has_content
            and not self._num_calls
        ):
            self._state = self._in_opening  # an answer may be only a call, without a marker
            return False
        if char == self._marker[0]:
            self._state = self._in_marker
            return False
        self._say(char)
        return True

    def _in_marker(self, char: str) -> bool:
        if char != self._marker[len(self._held)]:
            return self._refuse()
        self._held.append(char)
        if len(self._held) == len(self._marker):
            self._in_list, self._state = False, self._in_opening
        return True

    def _in_opening(self, char: str) -> bool:
        """Before a call, after its marker or the separator behind another call."""
        is_mistral = self._marker == "[TOOL_CALLS]"
        if char in JSON_SPACE:
            self._held.append(char)
            return True
        if char == "[" and is_mistral and not self._in_list:
            self._held.append(char)
            self._in_list = True
            return True
        if char == "{":
            self._body = ObjectBody(
                self._names, self._streams, needs_arguments=self._format is ToolFormat.LLAMA3
            )
        elif is_mistral and not self._in_list:
            self._body = NamedBody(self._names, self._streams)
        else:
            return self._refuse()
        self._state = self._in_call
        return False

    def _in_call(self, char: str) -> bool:
        assert self._body is not None
        verdict = self._body.push(char)
        if self._body.name is None and verdict is Verdict.MORE:
            self._held.append(char)
        self._judge(verdict, self._position - (verdict is Verdict.DONE_BEFORE))
        return verdict in (Verdict.MORE, Verdict.DONE)

    def _in_broken(self, char: str) -> bool:
        """In arguments that are not JSON: everything up to an end marker belongs to them."""
        if self._format is ToolFormat.HERMES and char == _END_MARKER[len(self._held)]:
            self._held.append(char)
            if len(self._held) == len(_END_MARKER):
                self._call_stop = self._position
                self._end_call()
                self._leave(self._position)
            return True
        if self._held:
            self._write(self._num_calls - 1, "".join(self._held))
            self._held = []
            return False
        self._write(self._num_calls - 1, char)
        return True

    def _behind_call(self, char: str) -> bool:
        if char in JSON_SPACE and not self._held:
            self._say(char)
            return True
        if self._format is ToolFormat.HERMES:
            if char == _END_MARKER[len(self._held)]:
                self._held.append(char)
                if len(self._held) == len(_END_MARKER):
                    self._leave(self._position)
                return True
        elif char == "]" and self._in_list:
            self._leave(self._position)
            return True
        elif char == self._separator and (self._in_list or self._format is ToolFormat.LLAMA3):
            self._leave(self._call_stop)
            self._held, self._state = [char], self._in_opening
            return True
        held = self._held
        self._leave(self._call_stop)
        for earlier in held:  # what looked like the end may be the next call's marker
            self._step(earlier)
        return False

    # -- what states do

    def _judge(self, verdict: Verdict, position: int) -> None:
        """Act on what a call's parser says of its newest character, or of the end of the answer.

        A call that is complete ends at `position`.
        """
        body = self._body
        assert body is not None
        if verdict is Verdict.REFUSED:
            self._refuse()
            return
        if body.name is not None:
            if self._num_calls == self._num_ended:
                self._begin_call(body.name)
            self._write(self._num_calls - 1, body.take())
        if verdict is Verdict.BROKEN:
            self._body, self._state = None, self._in_broken
        elif verdict is not Verdict.MORE:
            self._call_stop = position
            self._end_call()

    def _refuse(self) -> bool:
        """The text held back is content after all; the character that showed it is read again."""
        held, self._held, self._body, self._state = self._held, [], None, self._in_content
        self._say("".join(held))
        return False

    def _begin_call(self, name: str) -> None:
        self._flush()
        self._events.append(CallBegin(self._num_calls, f"call_{secrets.token_hex(12)}", name))
        self._num_calls += 1
        self._held, self._call_in_gap = [], True

    def _end_call(self) -> None:
        self._flush()
        self._events.append(CallEnd(self._num_ended))
        self._num_ended += 1
        if self._format is not ToolFormat.HERMES and not self._in_list:
            self._leave(self._call_stop)  # no marker closes it
        self._held, self._body, self._state = [], None, self._behind_call

    def _leave(self, position: int) -> None:
        """A call and its closing marker are complete."""
        self._held, self._state = [], self._in_content
        if self._max_calls is not None and self._num_ended >= self._max_calls:
            self._done, self._position = True, position
            self._closing = "]" if self._in_list and position == self._call_stop else ""

    def _say(self, text: str) -> None:
        """Pass content on; white space waits for the text after it."""
        for run in _RUNS.findall(text):
            if not run.isspace():
                if self._has_content or not self._call_in_gap:
                    self._write(None, "".join(self._gap))
                self._write(None, run)
                self._gap, self._call_in_gap, self._has_content = [], False, True
            elif not self._call_in_gap:
                self._gap.append(run)
            elif not self._gap:
                self._gap = [run[0]]

    def _write(self, call: int | None, text: str) -> None:
        if text:
            if call != self._pieces_of:
                self._flush()
            self._pieces_of = call
            self._pieces.append(text)

    def _flush(self) -> None:
        if self._pieces:
            text = "".join(self._pieces)
            self._events.append(
                ContentDelta(text) if self._pieces_of is None else CallDelta(self._pieces_of, text)
            )
            self._pieces = []

    def _drain(self) -> list[ToolEvent]:
        self._flush()
        events, self._events = self._events, []
        return events
