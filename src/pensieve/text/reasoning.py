"""Splits a model's reasoning from its answer. Knows text pieces; never tokens or templates."""

from __future__ import annotations

from dataclasses import dataclass

from pensieve.text.tools import ContentDelta

BEGIN_REASONING = "<think>"
END_REASONING = "</think>"


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of reasoning."""

    text: str


class ReasoningSplitter:
    """Splits an answer that begins `<think>...</think>` into reasoning and content.

    White space around the markers belongs to neither. An answer that does not begin with `<think>` is
    content, every character of it, and so are later markers. Only text that may still become a marker is held
    back.

    Args:
        enabled: if not, everything is content.
        inside: whether the template wrote `<think>` already, so that the answer begins with reasoning.
    """

    def __init__(self, enabled: bool = True, inside: bool = False) -> None:
        self._state = "content" if not enabled else "reasoning" if inside else "start"
        self._trims = enabled and inside  # whether the next white space belongs to a marker
        self._held = ""

    def feed(self, text: str) -> list[ReasoningDelta | ContentDelta]:
        """Take the next piece; returns the pieces that are settled now."""
        self._held += text
        out: list[ReasoningDelta | ContentDelta] = []
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(BEGIN_REASONING):
                self._go_on("reasoning", begun[len(BEGIN_REASONING) :])
            elif not BEGIN_REASONING.startswith(begun):
                self._state = "content"
        if self._state == "reasoning":
            self._trim()
            thought, ended, said = self._held.partition(END_REASONING)
            settled = thought.rstrip() if ended else self._held[: len(self._held) - _may_end(self._held)]
            if settled:
                out.append(ReasoningDelta(settled))
            self._held = self._held[len(settled) :]
            if ended:
                self._go_on("content", said)
        if self._state == "content":
            self._trim()
            if self._held:
                out.append(ContentDelta(self._held))
                self._held = ""
        return out

    def finish(self) -> list[ReasoningDelta | ContentDelta]:
        """End the answer; returns the text that was held back and is no marker."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            held = held.rstrip()
            return [ReasoningDelta(held)] if held else []
        return [ContentDelta(held)] if held else []

    def _go_on(self, state: str, rest: str) -> None:
        self._state, self._held, self._trims = state, rest, True

    def _trim(self) -> None:
        if self._trims:
            self._held = self._held.lstrip()
            self._trims = not self._held


def _may_end(text: str) -> int:
    """Length of the end of the reasoning that may belong to its end marker, white space included."""
    marker = next(
        (n for n in range(min(len(END_REASONING) - 1, len(text)), 0, -1) if text.endswith(END_REASONING[:n])),
        0,
    )
    rest = text[: len(text) - marker]
    return marker + len(rest) - len(rest.rstrip())
