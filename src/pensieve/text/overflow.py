"""A chat that outgrew its context: whether it did, and which messages to leave out. Knows messages and a way to count; never tokens themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pensieve.chat import Message
from pensieve.errors import ContextLengthExceeded

FREE_CHARS, FREE_CHARS_PER_TOKEN = 1 << 16, 16
PIECE_CHARS = 1 << 13
CUT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Truncated:
    """What is left of a chat."""

    messages: tuple[Message, ...]
    dropped: int  # messages left out


def surely_exceed(texts: Iterable[str], max_tokens: int, count: Callable[[str], int]) -> bool:
    """Whether texts have by far more than `max_tokens` tokens, found out in about the time that so many take.

    Tokenizing 16 MB takes a minute, and to learn that they are too many a look at their beginning is enough. A text is counted piece by
    piece; a token that a cut goes through is counted as up to `CUT_TOKENS`, which is left out of the sum: no text that fits is refused.

    Args:
        texts: what is to be put before a model, whatever stands around it.
        max_tokens: the limit.
        count: text -> its tokens, nothing added to it.
    """
    texts = list(texts)
    if sum(map(len, texts)) <= max(FREE_CHARS, FREE_CHARS_PER_TOKEN * max_tokens):
        return False  # (mostly so; the whole is soon counted then, and whoever does it can say how many they are)
    num_tokens = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            num_tokens += max(0, count(text[start : start + PIECE_CHARS]) - CUT_TOKENS)
            if num_tokens > max_tokens:
                return True
    return False


def truncate(
    messages: Sequence[Message],
    max_tokens: int,
    count: Callable[[Sequence[Message]], int],
    way_out: str = "start with a larger --max-context",
) -> Truncated:
    """Leave out the oldest turns until the rest fits.

    A turn is a user message and everything up to the next one, and goes as a whole, so that no answer is left
    without its question. The system messages at the beginning stay, and so does the newest turn.

    Args:
        messages: the chat, oldest first.
        max_tokens: the most tokens that `count` may say.
        count: messages -> tokens of their rendering; must not grow when a turn is left out.
        way_out: what would make room for more, for the error message.

    Raises:
        ContextLengthExceeded: not even the system messages and the newest turn fit.
    """
    head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    turns = [i for i in range(head, len(messages)) if messages[i].role == "user"]
    cuts = [head, *(i for i in turns if i > head)]  # the messages [head, cut) are left out

    def without(cut: int) -> tuple[Message, ...]:
        return (*messages[:head], *messages[cut:])

    low, high = 0, len(cuts) - 1  # the answer lies in [low, high], if there is one
    smallest = count(without(cuts[high]))
    if smallest > max_tokens:
        raise ContextLengthExceeded(
            f"the system prompt and the newest turn alone have {smallest} tokens, the context holds {max_tokens}:"
            f" shorten the message, or {way_out}"
        )
    while low < high:
        middle = (low + high) // 2
        if count(without(cuts[middle])) <= max_tokens:
            high = middle
        else:
            low = middle + 1
    return Truncated(without(cuts[low]), cuts[low] - head)
