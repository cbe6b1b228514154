"""From a body's bytes to JSON values, within limits.

Knows JSON's grammar and its costs; never fields, models or answers.

Python objects for every value of a body take fifty times its bytes, and all other requests wait while they
are made. So the values are counted first, at the speed of `bytes.count`, and a body with too many is refused
before it is parsed.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.responses import Response

from pensieve.server.errors import ApiError

MAX_VALUES = (1 << 20) + (1 << 12)  # of a body: a prompt of a million token ids, and other fields
MAX_STRINGS = 1 << 18  # including the names of fields
MAX_CONTAINERS = 1 << 16  # objects and lists
MAX_DEPTH = 100  # of nested objects and lists; JSON encoders give up at several hundred
# digits in a row: no float has more, and the time to parse an integer is quadratic in them
MAX_DIGITS = 308
LARGE_BYTES = 1 << 16  # bodies from this size on are parsed one at a time
PIECE_BYTES = 1 << 20  # of a large body, counted before other requests get the event loop

_STEPS = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}
_NO_BRACKETS = bytes(set(range(256)) - set(_STEPS))
_AS_NINES = bytes.maketrans(b"012345678", b"9" * 9)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class BoundedRoute(APIRoute):
    """A route whose JSON body is read within the limits of this module."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, preceded by parsing the body."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def bounded(request: Request) -> Response:
            body = await request.body()
            if body and _is_json(request.headers.get("content-type", "")):
                request._json = (
                    read_json(body)
                    if len(body) < LARGE_BYTES
                    else await _read_large(body, request.app.state.context.reading)
                )
            return await handle(request)

        return bounded


def read_json(body: bytes) -> Any:
    """The values of a body.

    Raises:
        ApiError: it is not JSON in UTF-8, exceeds the limits, or holds what JSON cannot encode: half a
        surrogate
            pair (which no tokenizer takes), NaN and infinite numbers.
    """
    count = _Count()
    for _ in count.take(body):
        pass
    return _parse(body, count)


async def _read_large(body: bytes, reading: asyncio.Lock) -> Any:
    """`read_json`, one body at a time, in steps between which other requests get the event loop."""
    async with reading:
        count = _Count()
        for _ in count.take(body):
            await asyncio.sleep(0)
        value = _parse(body, count)
        await asyncio.sleep(0)
        return value


class _Count:
    """What a body holds, counted piece by piece."""

    def __init__(self) -> None:
        self._values = self._strings = self._containers = self._depth = 0
        self._in_string = False
        self._escapes = b""  # a backslash at the end of the last piece, if it escapes the next character
        self.not_json = False  # whether it may hold numbers that JSON lacks: infinite ones, or words for them

    def take(self, body: bytes) -> Iterator[None]:
        """Count, with a pause after each piece.

        Raises:
            ApiError: the body exceeds the limits.
        """
        for start in range(0, len(body), PIECE_BYTES):
            self._take(body[start : start + PIECE_BYTES])
            yield

    def _take(self, piece: bytes) -> None:
        piece = self._escapes + piece
        self._escapes = b""
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
            if piece.endswith(b"\\"):
                piece, self._escapes = piece[:-1], b"\\"
        parts = piece.split(b'"', 2 * MAX_STRINGS + 1)
        outside = b"".join(parts[self._in_string :: 2])
        self._strings += len(parts) - 1  # two quotation marks each
        self._in_string ^= len(parts) % 2 == 0
        if self._strings > 2 * MAX_STRINGS:
            raise _too_many("texts", MAX_STRINGS)
        self._values += outside.count(b",")
        if self._values >= MAX_VALUES:
            raise _too_many("values", MAX_VALUES)
        self._take_containers(outside)
        if b"9" * (MAX_DIGITS + 1) in outside.translate(_AS_NINES):
            raise _wrong(
                f"a number in the body has more than {MAX_DIGITS} digits in a row: "
                "write it with an exponent, or as text"
            )
        words = outside.count(b"true") + outside.count(
            b"false"
        )  # one that the end of a piece cuts counts as a number, which only costs a check
        self.not_json |= (
            outside.count(b"e") + outside.count(b"E") != words or b"N" in outside or b"I" in outside
        )

    def _take_containers(self, outside: bytes) -> None:
        begun = outside.count(b"{") + outside.count(b"[")
        self._containers += begun
        if self._containers > MAX_CONTAINERS:
            raise _too_many("objects and lists", MAX_CONTAINERS)
        steps = list(map(_STEPS.__getitem__, outside.translate(None, _NO_BRACKETS)))
        if (
            self._depth + begun > MAX_DEPTH
            and max(itertools.accumulate(steps, initial=self._depth)) > MAX_DEPTH
        ):
            raise _wrong(f"objects and lists in the body are nested more than {MAX_DEPTH} deep: flatten them")
        self._depth += sum(steps)


def _parse(body: bytes, count: _Count) -> Any:
    try:
        value = from_json(body, cache_strings="keys")
    except ValueError as error:
        if "hex escape" in str(error) and _SURROGATE.search(body):
            raise _wrong(
                "a text in the body is not valid Unicode: it holds half of a surrogate pair"
            ) from None
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if count.not_json:
        _check_numbers(value)
    return value


def _check_numbers(value: Any) -> None:
    """Refuse numbers that JSON cannot write."""
    stack = [[value]]
    while stack:
        items = stack.pop()
        kinds = set(map(type, items))
        if kinds & {dict, list}:
            stack += [
                list(item.values()) if isinstance(item, dict) else item
                for item in items
                if isinstance(item, (dict, list))
            ]
        numbers = items if kinds <= {float, int} else [item for item in items if isinstance(item, float)]
        if float in kinds and not all(map(math.isfinite, numbers)):
            wrong = next(number for number in numbers if not math.isfinite(number))
            raise _wrong(f"a number in the body is {wrong}: JSON has finite numbers only")


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _wrong(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_value")


def _too_many(what: str, limit: int) -> ApiError:
    return ApiError(
        400, f"the body holds more than {limit} {what}: send less at a time", code="body_too_complex"
    )
