"""Stop strings in a stream of text. Knows text pieces and, for the cut, a detokeniser; never requests or models."""

from __future__ import annotations

from collections.abc import Sequence

from pensieve.errors import InvalidRequest
from pensieve.text.detokenize import Detokenizer


class StopStrings:
    """Looks for the first stop string in text that arrives in pieces.

    The stop string that is complete first wins, so the result does not depend on where the pieces are cut; of
    several that end at the same character, the one that begins first. Text that may be the beginning of a stop
    string is held back, no more than that, and less than the longest stop string.

    Args:
        stops: the strings; may be empty, then everything passes.

    Raises:
        InvalidRequest: one of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not stop:
                raise InvalidRequest(f"a stop string must have at least one character, got an empty one in {list(stops)!r}")
        self._stops = tuple(dict.fromkeys(stops))
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
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self._hit = min(found)
            self._held = ""
            return text[:start], self._hit
        keep = len(text) - self._longest_beginning(text)
        self._held = text[keep:]
        return text[:keep], None

    def finish(self) -> str:
        """The text ended: what was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def keep_tokens(detokenizer: Detokenizer, output_ids: Sequence[int], kept_text: str) -> tuple[int, str]:
    """How much of an answer cut at a stop string can stay in the token log as it was sampled.

    Args:
        detokenizer: a fresh one of the tokenizer that made the answer.
        output_ids: the answer's token ids, all of them.
        kept_text: the beginning of the answer's text that is kept.

    Returns:
        The number of leading tokens that lie wholly inside the kept text, and the rest of the kept text, which
        shares a token with what was cut and has to be encoded anew (often empty).
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
