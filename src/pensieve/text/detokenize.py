"""Decodes token ids to text, a few at a time.

Knows a decoding function and two sets of ids; never templates or requests.

A decoder is not a sum over tokens: a character may be spread over several tokens, and sentencepiece-like
decoders drop the space before the first token. So each push decodes a short window of past tokens again and
returns what is new in the result. The window slides, which keeps the cost of a token constant.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

KEEP = 6  # tokens that stay when the window slides; a UTF-8 character has at most 4 bytes, hence tokens
SLIDE_AT = 24  # tokens at which the window slides
REPLACEMENT = "\ufffd"  # stands for bytes that are not a character, or not yet


class Detokenizer:
    """Decodes one answer's tokens into text that never ends inside a character.

    The texts of all `push` calls and of `finish` together equal `decode` of all ids.

    Args:
        decode: ids to text, of any length. Called with windows of the ids, without special ids.
        special_ids: ids that have no text (left out).
        byte_ids: ids of single bytes in a vocabulary with byte fallback. Their decoder judges a run of them
            as a whole (one invalid byte makes the whole run unreadable), so a run is shown once it is over.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        special_ids: Collection[int] = frozenset(),
        byte_ids: Collection[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._special_ids = special_ids
        self._byte_ids = byte_ids
        self._window: list[int] = []
        self._emitted = 0  # leading characters of the window's text that were returned before
        self._slide_at = SLIDE_AT
        self._holds_back = False

    @property
    def holds_back(self) -> bool:
        """Whether the ids so far end in something that is not shown yet."""
        return self._holds_back

    def push(self, ids: Sequence[int]) -> str:
        """Take the next ids; returns the text that they complete, perhaps empty."""
        fresh = [token_id for token_id in ids if token_id not in self._special_ids]
        if not fresh:
            return ""
        self._window += fresh
        if self._window[-1] in self._byte_ids:
            self._holds_back = True
            return ""
        text = self._decode(self._window)
        # Only the last replacement character can still become another one: the decoder writes one for a whole
        # unfinished character, and bytes that do not continue them follow the others.
        self._holds_back = text.endswith(REPLACEMENT)
        stable = len(text) - self._holds_back
        new = text[self._emitted : stable]
        self._emitted = max(self._emitted, stable)
        if len(self._window) >= self._slide_at:
            self._slide(text)
        return new

    def finish(self) -> str:
        """End the answer; returns the text that was held back."""
        new = self._decode(self._window)[self._emitted :] if self._window else ""
        self._window, self._emitted, self._slide_at, self._holds_back = [], 0, SLIDE_AT, False
        return new

    def _slide(self, text: str) -> None:
        """Shorten the window, whose text is `text`, to its last tokens.

        The tail alone may decode differently at its beginning (a dropped space, half a character) but not
        after it. So lengths tell which part of it was shown, provided that it begins with something that was.
        """
        for start in range(len(self._window) - KEEP, max(0, len(self._window) - SLIDE_AT), -1):
            emitted = self._emitted - (len(text) - len(self._decode(self._window[start:])))
            if emitted > 0:
                self._window, self._emitted, self._slide_at = self._window[start:], emitted, SLIDE_AT
                return
        self._slide_at = 2 * len(self._window)  # only tokens without text: try again after as many more
