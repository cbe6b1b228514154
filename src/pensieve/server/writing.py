"""Encodes large answers in a thread, one at a time, so that the event loop goes on.

Knows JSON; never what an answer means.

500 tokens with 20 log-probabilities each are about 10,000 JSON objects and 100 ms of the interpreter; sixteen
such answers at once delayed every other request by more than a second.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from pensieve.core.request import SamplingParams

FEW = 1_000  # log-probabilities that are encoded on the event loop


def is_long(sampling: SamplingParams, num_tokens: int) -> bool:
    """Whether an answer of `num_tokens` has many log-probabilities."""
    return sampling.logprobs is not None and num_tokens * (1 + sampling.logprobs) > FEW


class Writing:
    """Encodes large answers one after another."""

    def __init__(self) -> None:
        self._one = asyncio.Lock()

    async def reply(
        self, make: Callable[[], Mapping[str, Any]], long: bool, headers: Mapping[str, str] | None = None
    ) -> Response:
        """A response with the JSON of what `make` returns, in a thread if it is long."""
        if not long:
            return JSONResponse(make(), headers=headers)
        return Response(await self.text(make), media_type="application/json", headers=headers)

    async def text(self, make: Callable[[], Any]) -> bytes:
        """The JSON of what `make` returns; both made in a thread."""
        async with self._one:
            return await asyncio.to_thread(lambda: _written(make()))

    async def made(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, made in a thread."""
        async with self._one:
            return await asyncio.to_thread(make)


def _written(value: Any) -> bytes:
    # Piece by piece, in Python: the encoder in C is faster, but lets no other thread run until it is done.
    return "".join(
        json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).iterencode(value)
    ).encode()
