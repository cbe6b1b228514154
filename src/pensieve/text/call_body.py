"""Parses one tool call while it arrives.

Knows a call's JSON and the tools' names; never the markers around calls, or the text between them.
"""

from __future__ import annotations

import enum
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection

from pensieve.text.json_scan import JSON_SPACE, ContainerScanner, Malformed, MemberScanner

_ARGUMENTS = ("arguments", "parameters")
_BEHIND_NAME = re.compile(r"\[CALL_ID\]\w{0,64}(\[A?R?G?S?\]?)?")


class Verdict(enum.Enum):
    """The parser's state after a character."""

    MORE = "taken; more is to come"
    DONE = "taken; the call is complete"
    DONE_BEFORE = "not taken: the call is complete without it"
    REFUSED = "not taken: this is no call"
    BROKEN = "not taken: the call has begun, but its arguments do not go on like this"


class CallBody(ABC):
    """One call, parsed while it arrives.

    Attributes:
        name: the function's; None until the call has begun. A call begins once the name of a known tool and
            the first character of its arguments are there. A call that does not stream begins when it is
            complete and valid.
    """

    def __init__(self, names: Collection[str], streams: bool) -> None:
        self._names = names
        self._streams = streams
        self._ready: list[str] = []
        self.name: str | None = None

    @abstractmethod
    def push(self, char: str) -> Verdict:
        """Take the next character."""

    @abstractmethod
    def stop(self) -> Verdict:
        """End the answer here: DONE_BEFORE, REFUSED or BROKEN."""

    def take(self) -> str:
        """The arguments' text since the last call of `take`."""
        text, self._ready = "".join(self._ready), []
        return text

    def _begin(self, name: str, arguments: str) -> None:
        self.name = name
        self._ready.append(arguments)


class ObjectBody(CallBody):
    """A call of the form `{"name": "f", "arguments": {}}`, with members in any order.

    `parameters` is accepted for `arguments`.
    """

    def __init__(self, names: Collection[str], streams: bool, needs_arguments: bool) -> None:
        """Without `needs_arguments`, a call may lack arguments: its function takes no parameters."""
        super().__init__(names, streams)
        self._needs_arguments = needs_arguments
        self._scanner = MemberScanner()
        self._known: str | None = None
        self._max_name = 2 + 12 * max(map(len, names), default=0)  # characters, each written as two escapes
        self._in_arguments = False  # of the call that has begun

    def push(self, char: str) -> Verdict:
        """Take the next character."""
        scanner = self._scanner
        try:
            scanner.push(char)
        except Malformed:
            return self.stop()
        if self._in_arguments:
            self._ready.append(char)
            self._in_arguments = scanner.value_start is not None
        elif self.name is None:
            if not self._may_be_known():
                return Verdict.REFUSED
            if self._streams:
                self._begin_early()
        if scanner.done:
            return (
                Verdict.DONE if self.name is not None or self._begin_whole(scanner.text) else Verdict.REFUSED
            )
        return Verdict.MORE

    def stop(self) -> Verdict:
        """End the object here. It is still a call if only its last bracket is missing."""
        if self._in_arguments:
            return Verdict.BROKEN
        if self.name is not None or (
            self._arguments() is not None and self._begin_whole(self._scanner.text + "}")
        ):
            return Verdict.DONE_BEFORE
        return Verdict.REFUSED

    def _may_be_known(self) -> bool:
        """Whether the name so far is the beginning of a known tool's."""
        scanner = self._scanner
        if self._known is not None:
            return True
        if "name" in scanner.members:
            self._known = self._named(scanner.members["name"])
            return self._known is not None
        if scanner.key != "name" or scanner.value_start is None:
            return True
        if scanner.value_begin != '"' or scanner.value_length > self._max_name:
            return False
        so_far = scanner.partial_value()[1:]
        return "\\" in so_far or any(name.startswith(so_far) for name in self._names)

    def _named(self, text: str) -> str | None:
        try:
            name = json.loads(text)
        except ValueError:
            return None
        return name if isinstance(name, str) and name in self._names else None

    def _arguments(self) -> str | None:
        return next((self._scanner.members[key] for key in _ARGUMENTS if key in self._scanner.members), None)

    def _begin_early(self) -> None:
        """Begin the call if its name and the first character of an arguments object are there."""
        if self._known is None:
            return
        arguments, scanner = self._arguments(), self._scanner
        if arguments is not None and arguments[0] == "{":
            self._begin(self._known, arguments)
        elif arguments is None and scanner.key in _ARGUMENTS and scanner.value_begin == "{":
            self._begin(self._known, scanner.partial_value())
            self._in_arguments = True

    def _begin_whole(self, text: str) -> bool:
        """Begin and end the call with the object's whole text, if it is a call."""
        name, arguments = self._known, self._arguments()
        if name is None or not is_object(text) or (arguments is None and self._needs_arguments):
            return False
        if arguments is None or arguments == "null":
            arguments = "{}"
        elif arguments[0] == '"':  # some models write the object as a string
            arguments = str(json.loads(arguments))
        if not is_object(arguments):
            return False
        self._begin(name, arguments)
        return True


class NamedBody(CallBody):
    """A call of the form `f[ARGS]{}`, perhaps with `[CALL_ID]x` before `[ARGS]`."""

    def __init__(self, names: Collection[str], streams: bool) -> None:
        super().__init__(names, streams)
        self._heading = ""
        self._known: str | None = None  # None until the heading is complete
        self._scanner: ContainerScanner | None = None
        self._held: list[str] = []  # arguments so far, if they do not stream

    def push(self, char: str) -> Verdict:
        """Take the next character."""
        if self._known is None:
            return self._push_heading(char)
        if self._scanner is None:
            if char in JSON_SPACE:
                return Verdict.MORE
            if char != "{":
                return Verdict.REFUSED
            self._scanner = ContainerScanner()
            if self._streams:
                self._begin(self._known, "")
        try:
            complete = self._scanner.push(char)
        except Malformed:
            return self.stop()
        (self._ready if self._streams else self._held).append(char)
        if complete and not self._streams:
            arguments = "".join(self._held)
            if not is_object(arguments):
                return Verdict.REFUSED
            self._begin(self._known, arguments)
        return Verdict.DONE if complete else Verdict.MORE

    def stop(self) -> Verdict:
        """End the call here."""
        return Verdict.REFUSED if self.name is None else Verdict.BROKEN

    def _push_heading(self, char: str) -> Verdict:
        heading = self._heading + char
        name, bracket, rest = heading.partition("[")
        tail = bracket + rest
        if not bracket:
            may_be = any(known.startswith(name) for known in self._names) or name.rstrip() in self._names
        else:
            starts = "[ARGS]".startswith(tail) or "[CALL_ID]".startswith(tail) or _BEHIND_NAME.fullmatch(tail)
            may_be = name.rstrip() in self._names and bool(starts)
        if not may_be:
            return Verdict.REFUSED
        if tail.endswith("[ARGS]"):
            self._known = name.rstrip()
        self._heading = heading
        return Verdict.MORE


def is_object(text: str) -> bool:
    """Whether the text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
