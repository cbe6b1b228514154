"""Follows JSON while it arrives, character by character.

Knows the grammar of brackets and strings; never what the JSON means. Numbers and words inside values are not
checked: a JSON parser checks the complete text.
"""

from __future__ import annotations

import json

JSON_SPACE = " \t\n\r"
_CLOSERS = {"{": "}", "[": "]"}


class Malformed(Exception):
    """The character cannot follow the JSON so far; the scanner did not take it."""


class ContainerScanner:
    """Finds the end of an object or a list. The first character opens it."""

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._in_string = False
        self._escaped = False

    def push(self, char: str) -> bool:
        """Take a character and say whether the container is complete.

        Raises:
            Malformed: a bracket closes one of another kind.
        """
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
        elif char in "}]":
            if char != self._closers[-1]:
                raise Malformed
            self._closers.pop()
        return not self._closers


class MemberScanner:
    """Follows one object and reports its members as soon as they are there.

    Attributes:
        text: the object so far.
        members: key and value text of each complete member; the first of a key wins.
        key: of the member whose value is arriving; None between members.
        value_start: where in `text` that value begins; None until it does.
        done: whether the object is complete.
    """

    def __init__(self) -> None:
        self._chars: list[str] = []
        self._expects = "{"  # or one of: key, first key, :, value, rest (of a value), comma
        self._start = 0  # of the key or value that is arriving
        self._escaped = False
        self._container: ContainerScanner | None = None
        self.members: dict[str, str] = {}
        self.key: str | None = None
        self.value_start: int | None = None
        self.done = False

    @property
    def text(self) -> str:
        """The object so far."""
        return "".join(self._chars)

    @property
    def value_begin(self) -> str:
        """The first character of the value that is arriving; empty if there is none."""
        return "" if self.value_start is None else self._chars[self.value_start]

    @property
    def value_length(self) -> int:
        """Characters so far of the value that is arriving."""
        return 0 if self.value_start is None else len(self._chars) - self.value_start

    def partial_value(self) -> str:
        """The value that is arriving, as far as it goes."""
        return "" if self.value_start is None else "".join(self._chars[self.value_start :])

    def push(self, char: str) -> None:
        """Take a character.

        Raises:
            Malformed: it cannot follow the object so far.
        """
        self._take(char)
        self._chars.append(char)

    def _take(self, char: str) -> None:
        match self._expects:
            case "rest":
                self._take_value(char)
            case "key text":
                if self._ends_string(char):
                    self.key = _unquoted("".join(self._chars[self._start :]) + char)
                    self._expects = ":"
            case _ if char in JSON_SPACE and self._expects != "{":
                pass
            case "{" if char == "{":
                self._expects = "first key"
            case "first key" | "key" if char == '"':
                self._start, self._expects = len(self._chars), "key text"
            case ":" if char == ":":
                self._expects = "value"
            case "value" if char not in ",:}]":
                self.value_start = len(self._chars)
                self._container = ContainerScanner() if char in _CLOSERS else None
                self._expects = "rest"
                if self._container is not None:
                    self._container.push(char)
            case "comma" if char == ",":
                self._expects = "key"
            case "comma" | "first key" if char == "}":
                self._expects, self.done = "nothing", True
            case _:
                raise Malformed

    def _take_value(self, char: str) -> None:
        if self._container is not None:
            if self._container.push(char):
                self._end_value(char)
        elif self.value_begin == '"':
            if self._ends_string(char):
                self._end_value(char)
        elif char in JSON_SPACE or char in ",}":
            self._end_value("")
            self._take(char)
        elif char in '"{[:]':
            raise Malformed

    def _ends_string(self, char: str) -> bool:
        escaped, self._escaped = self._escaped, char == "\\" and not self._escaped
        return char == '"' and not escaped

    def _end_value(self, last: str) -> None:
        assert self.key is not None
        self.members.setdefault(self.key, self.partial_value() + last)
        self.key, self.value_start, self._container, self._expects = None, None, None, "comma"


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        raise Malformed from None
