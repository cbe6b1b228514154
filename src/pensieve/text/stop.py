"""Finds stop strings in a stream of text.

Knows text pieces and, for the cut, a detokeniser; never requests or models.
"""

from __future__ import annotations

from collections.abc import Sequence

from pensieve.errors import InvalidRequest
from pensieve.text.detokenize import Detokenizer


class StopStrings:
    """Finds the first stop string in text that arrives in pieces.

    The stop string that is complete first wins, so that the result does not depend on where the pieces are
    cut; of several that end at the same character, the one that begins first. Only text that may be the
    beginning of a stop string is held back, always less than the longest stop string.

    Args:
        stops: the strings; if there are none, everything passes.

    Raises:
        InvalidRequest: one of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not stop:
                raise InvalidRequest(
                    f"a stop string must have at least one character, got an empty one in {list(stops)!r}"
                )
        self._searches = [_Search(stop) for stop in dict.fromkeys(stops)]
        self._held = ""
        self._hit: str | None = None

    @property
    def hit(self) -> str | None:
        """The stop string that was found; None if none was."""
        return self._hit

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take the next piece of text.

        Returns:
            The text that may be shown now, and the stop string once it is complete. Neither the stop string
            nor the text after it is ever shown.
        """
        if self._hit is not None:
            return "", self._hit
        if not self._searches:
            return text, None
        num_held, text = len(self._held), self._held + text
        for stop in range(num_held + 1, len(text) + 1):
            char = text[stop - 1]
            found = [search.stop for search in self._searches if search.push(char)]
            if found:
                self._hit, self._held = max(found, key=len), ""
                return text[: stop - len(self._hit)], self._hit
        keep = len(text) - max(search.matched for search in self._searches)
        self._held = text[keep:]
        return text[:keep], None

    def finish(self) -> str:
        """End the text; returns what was held back and is no stop string."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Follows a text for one stop string in constant time a character (Knuth, Morris, Pratt).

    Attributes:
        stop: the string.
        matched: length of the longest end of the text that is a beginning of the string.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        # for each beginning: the length of the longest shorter beginning that it ends with
        self._shorter = [0] * len(stop)
        for length in range(1, len(stop)):
            self._shorter[length] = self._go_on(self._shorter[length - 1], stop[length])

    def push(self, char: str) -> bool:
        """Take a character and say whether the string is complete now."""
        self.matched = self._go_on(self.matched, char)
        return self.matched == len(self.stop)

    def _go_on(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._shorter[matched - 1]
        return matched + (self.stop[matched] == char)


def keep_tokens(detokenizer: Detokenizer, output_ids: Sequence[int], kept_text: str) -> tuple[int, str]:
    """How much of an answer cut at a stop string can stay in the token log as sampled.

    Args:
        detokenizer: a fresh one, of the tokenizer of the answer.
        output_ids: all of the answer's token ids.
        kept_text: the beginning of the answer's text that is kept.

    Returns:
        The number of leading tokens that are wholly inside the kept text, and the rest of the kept text. The
        rest shares a token with the text that was cut off and must be encoded anew; it is often empty.
    """
    num_tokens, num_chars = 0, 0  # the longest cut at which no character is incomplete
    text = ""
    for count, token_id in enumerate(output_ids, start=1):
        text += detokenizer.push((token_id,))
        if len(text) > len(kept_text):
            break
        if not detokenizer.holds_back:
            num_tokens, num_chars = count, len(text)
    return num_tokens, kept_text[num_chars:]
