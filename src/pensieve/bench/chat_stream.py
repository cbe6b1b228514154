"""One streamed chat completion as it comes in. Knows server-sent events and OpenAI's chunks; never sockets,
threads or histories.

Shared by everything here that reads answers from servers. Whatever a server does wrong becomes a
`TurnFailed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pensieve.bench.systems import CONTEXT_FULL

_TOO_LONG = re.compile(
    r"context[ _](length|size|window)|maximum context|too many tokens|exceeds? .*context", re.IGNORECASE
)
_ERROR_CHARS = 500  # of a server's own words, in a message
_MAX_EVENT_BYTES = 16 << 20


class TurnFailed(Exception):
    """Why a turn has no answer: a code, words, and the HTTP status if that was it."""

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status


class EventSplitter:
    """Bytes of an event stream in, the data of each event out, wherever the bytes are cut.

    WHATWG HTML, section 9.2: several data lines make one event, other fields and comments are skipped.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that are complete now."""
        text = self._rest + data if self._rest else data
        if b"\r" in text:
            held = text.endswith(b"\r")  # half of a line's end, perhaps
            text = text[: len(text) - held].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\r" * held
        *blocks, self._rest = text.split(b"\n\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise TurnFailed("stream_broken", f"an event has more than {_MAX_EVENT_BYTES} bytes")
        for block in blocks:
            if (event := _data_of(block)) is not None:
                yield event

    def finish(self) -> Iterator[bytes]:
        """The stream ended: a last event that lacks its blank line."""
        rest, self._rest = self._rest.rstrip(b"\r\n"), b""
        if rest and (event := _data_of(rest)) is not None:
            yield event


def _data_of(block: bytes) -> bytes | None:
    """The data of an event's lines; None if it has none."""
    if block.startswith(b"data: ") and b"\n" not in block:  # nearly always
        return block[6:]
    lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


@dataclass(slots=True)
class StreamedAnswer:
    """What came so far. Times are of the caller's clock."""

    pieces: list[str] = field(default_factory=list)  # of the answer's text; reasoning is not part of it
    piece_times_s: list[float] = field(
        default_factory=list
    )  # when each piece with something in it came, reasoning included
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None  # llama.cpp's
    done: bool = False  # the stream said [DONE]

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self.pieces)

    @property
    def num_pieces(self) -> int:
        """Pieces with something in them, the best count of tokens if the server gives none."""
        return len(self.piece_times_s)

    @property
    def first_s(self) -> float | None:
        """When the first piece came."""
        return self.piece_times_s[0] if self.piece_times_s else None

    @property
    def prompt_tokens(self) -> int | None:
        """As the server counts; None = not told."""
        return _count((self.usage or {}).get("prompt_tokens"))

    @property
    def output_tokens(self) -> int | None:
        """As the server counts; None = not told."""
        return _count((self.usage or {}).get("completion_tokens"))

    @property
    def cached_tokens(self) -> int | None:
        """Tokens of the prompt that the server had; None = not told. OpenAI's place for it first, then
        llama.cpp's.
        """
        details = (self.usage or {}).get("prompt_tokens_details")
        told = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
        return told if told is not None else _count((self.timings or {}).get("cache_n"))

    def take(self, event: bytes, now_s: float) -> None:
        """Add one event.

        Raises:
            TurnFailed: the event is none of a chat completion, or says that something went wrong.
        """
        if event.strip() == b"[DONE]":
            self.done = True
            return
        try:
            chunk = json.loads(event)
        except ValueError as error:
            raise TurnFailed("stream_broken", f"an event is not JSON: {_shown(event)}") from error
        if not isinstance(chunk, dict):
            raise TurnFailed("stream_broken", f"an event is not an object: {_shown(event)}")
        if chunk.get("error"):
            raise TurnFailed(*_words(chunk, "server_error"))
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        if chunk.get("timings"):
            self.timings = chunk["timings"]
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            content = delta.get("content") or ""
            if content or delta.get("reasoning_content") or delta.get("reasoning"):
                self.pieces.append(content)
                self.piece_times_s.append(now_s)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def check_complete(self) -> None:
        """Raise if the stream ended in the middle."""
        if not self.done and self.finish_reason is None:
            raise TurnFailed(
                "stream_broken",
                f"the stream ended after {self.num_pieces} pieces without a finish_reason or [DONE]",
            )


def refusal(status: int, body: bytes) -> TurnFailed:
    """What an HTTP error says, by its body where that is OpenAI's form."""
    code = f"http_{status}"
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return TurnFailed(code, f"HTTP {status}: {body.decode(errors='replace')[:_ERROR_CHARS]}", status)
    found, message = _words(value, code)
    return TurnFailed(found, f"HTTP {status}: {message}", status)


def _words(body: dict[str, Any], code: str) -> tuple[str, str]:
    """Code and message of an error body; a prompt that is too long gets our own code, however it is said."""
    error = body.get("error")
    inner = error if isinstance(error, dict) else body
    message = str(inner.get("message") or error or body)[:_ERROR_CHARS]
    said = inner.get("code")
    if said == CONTEXT_FULL or _TOO_LONG.search(message):
        return CONTEXT_FULL, message
    return (said if isinstance(said, str) and said else code), message


def _shown(event: bytes) -> str:
    return repr(event.decode(errors="replace")[:_ERROR_CHARS])


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
