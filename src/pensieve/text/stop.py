"""Stop strings in a stream of text.

Knows text pieces and, for the cut, a detokeniser; never requests or models.
"""

from __future__ import annotations

from collections.abc import Sequence

from pensieve.errors import InvalidRequest
from pensieve.text.detokenize import Detokenizer


class StopStrings:
    """Looks for the first stop string in text that arrives in pieces.

    The stop string that is complete first wins, so the result does not depend on where the pieces are cut; of
    several that end at the same character, the one that begins first. Text that may be the beginning of a
    stop string is held back, no more than that, and less than the longest stop string.

    Args:
        stops: the strings; may be empty, then everything passes.

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
        """The stop string that was found, if any."""
        return self._hit

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take the next piece of text.

        Returns:
            What may be shown now, and the stop string if it is complete now or was before. The stop string
            itself and what follows it are never shown.
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
        """The text ended: what was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Follows a text for one stop string, in the same time for each character, whatever the two look like
    (Knuth, Morris, Pratt).

    Attributes:
        stop: the string.
        matched: how many characters the longest end of the text has that the string begins with.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._shorter = [0] * len(stop)  # of each beginning: the longest shorter one that it ends with
        for length in range(1, len(stop)):
            self._shorter[length] = self._go_on(self._shorter[length - 1], stop[length])

    def push(self, char: str) -> bool:
        """Take a character; whether the string is complete with it."""
        self.matched = self._go_on(self.matched, char)
        return self.matched == len(self.stop)

    def _go_on(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._shorter[matched - 1]
        return matched + (self.stop[matched] == char)


def keep_tokens(detokenizer: Detokenizer, output_ids: Sequence[int], kept_text: str) -> tuple[int, str]:
    """How much of an answer cut at a stop string can stay in the token log as it was sampled.

    Args:
        detokenizer: a fresh one of the tokenizer that made the answer.
        output_ids: the answer's token ids, all of them.
        kept_text: the beginning of the answer's text that is kept.

    Returns:
        The number of leading tokens that lie wholly inside the kept text, and the rest of the kept text,
        which shares a token with what was cut and has to be encoded anew (often empty).
    """
    num_tokens, num_chars = 0, 0  # the longest cut at which no character is half done
    text = ""
    for count, token_id in enumerate(output_ids, start=1):
        text += detokenizer.push((token_id,))
        if len(text) > len(kept_text):
            break
        if not detokenizer.holds_back:
            num_tokens, num_chars = count, len(text)
    return num_tokens, kept_text[num_chars:]
