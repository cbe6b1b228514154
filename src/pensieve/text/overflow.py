"""Finds out whether a chat outgrew its context, and which messages to leave out.

Knows messages and a way to count; never tokens themselves.

Lengths are measured in three steps, each more expensive than the one before: characters (`size_of`,
`newest`), the tokens of a beginning (`surely_exceed`), all tokens (`truncate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pensieve.errors import ContextLengthExceeded
from pensieve.message import Message, chars_of

FREE_CHARS, FREE_CHARS_PER_TOKEN = 1 << 16, 16
PIECE_CHARS = 1 << 13
CUT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Truncated:
    """What is left of a chat."""

    messages: tuple[Message, ...]
    dropped: int  # messages left out


def surely_exceed(texts: Iterable[str], max_tokens: int, count: Callable[[str], int]) -> bool:
    """Whether texts have far more than `max_tokens` tokens, in about the time of tokenizing that many.

    Tokenizing 16 MB takes a minute; the beginning is enough to learn that there are too many. Texts are
    counted piece by piece. A token that a cut splits may count as up to `CUT_TOKENS`, which are left out of
    the sum: no text that fits is refused.

    Args:
        texts: texts of a prompt, whatever is written around them.
        max_tokens: the limit.
        count: gives a text's tokens, with nothing added to it.
    """
    texts = list(texts)
    if sum(map(len, texts)) <= max(FREE_CHARS, FREE_CHARS_PER_TOKEN * max_tokens):
        # In most cases: the whole is counted soon then, and that count can say how many there are.
        return False
    num_tokens = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            num_tokens += max(0, count(text[start : start + PIECE_CHARS]) - CUT_TOKENS)
            if num_tokens > max_tokens:
                return True
    return False


def size_of(value: object, limit: int) -> int:
    """The least characters of JSON data when written, with one for each value that is not text.

    Stops counting once they are more than `limit`.
    """
    size, stack = 0, [value]
    while stack and size <= limit:
        item = stack.pop()
        size += len(item) if isinstance(item, str) else 1
        if isinstance(item, Mapping):
            size += sum(map(len, item))
            stack += item.values()
        elif isinstance(item, list | tuple):
            stack += item[: limit + 1]
    return size


def newest(messages: Sequence[Message], max_chars: int) -> Truncated:
    """Leave out the oldest turns until the rest has at most `max_chars` characters.

    What `truncate` always keeps stays, however long it is.
    """
    head, cuts = _cuts(messages)
    size, start = chars_of(messages[:head]), len(messages)
    kept = cuts[-1]
    for cut in reversed(cuts):
        size += chars_of(messages[cut:start])
        if size > max_chars:
            break
        kept = start = cut
    return Truncated((*messages[:head], *messages[kept:]), kept - head)


def truncate(
    messages: Sequence[Message],
    max_tokens: int,
    count: Callable[[Sequence[Message]], int],
    way_out: str = "start with a larger --max-context",
    weigh: Callable[[Message], int] | None = None,
) -> Truncated:
    """Leave out the oldest turns until the rest fits.

    A turn is a user message and everything up to the next one. It is left out as a whole, so that no answer
    stays without its question. The system messages at the beginning and the newest turn always stay.

    Args:
        messages: the chat, oldest first.
        max_tokens: the most tokens that `count` may give.
        count: gives the tokens of the messages' rendering; must not grow when a turn is left out. Raises
            `ContextLengthExceeded` for messages that surely have too many.
        way_out: for the error message: what would make room.
        weigh: gives roughly a message's tokens; with it a few counts are enough, however long the chat is.

    Raises:
        ContextLengthExceeded: not even the system messages and the newest turn fit.
    """
    head, cuts = _cuts(messages)

    def without(cut: int) -> tuple[Message, ...]:
        return (*messages[:head], *messages[cut:])

    def fits(at: int) -> bool:
        try:
            return count(without(cuts[at])) <= max_tokens
        except ContextLengthExceeded:
            return False

    low, high = 0, len(cuts) - 1  # the first cut that fits is in [low, high], if there is one
    smallest = count(without(cuts[high]))
    if smallest > max_tokens:
        raise ContextLengthExceeded(
            f"the system prompt and the newest turn alone have {smallest} tokens, the context holds "
            f"{max_tokens}:"
            f" shorten the message, or {way_out}"
        )
    at = (
        (low + high) // 2
        if weigh is None
        else min(_guess(messages, head, cuts, max_tokens, weigh), max(high - 1, 0))
    )
    step = (
        None if weigh is None else 1
    )  # from the guess in growing steps until the first fitting cut is between two counts; then by halves
    went_down: bool | None = None
    while low < high:
        fit = fits(at)
        low, high = (low, at) if fit else (at + 1, high)
        step = None if step is None or went_down not in (None, fit) else step
        went_down = fit
        if step is None:
            at = (low + high) // 2
        else:
            at = max(low, high - step) if fit else min(high - 1, low + step - 1)
            step *= 2
    return Truncated(without(cuts[low]), cuts[low] - head)


def _cuts(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """The number of system messages that a chat begins with, and where it may be cut.

    A cut leaves out the messages [head, cut).
    """
    head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    return head, [head, *(i for i in range(head + 1, len(messages)) if messages[i].role == "user")]


def _guess(
    messages: Sequence[Message],
    head: int,
    cuts: Sequence[int],
    max_tokens: int,
    weigh: Callable[[Message], int],
) -> int:
    """A guess which cut is the first that fits."""
    weight, stop = sum(map(weigh, messages[:head])), len(messages)
    for at in range(len(cuts) - 1, -1, -1):
        weight += sum(map(weigh, messages[cuts[at] : stop]))
        stop = cuts[at]
        if weight > max_tokens:
            return at + 1
    return 0
