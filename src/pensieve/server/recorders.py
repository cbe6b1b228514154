"""What a finished turn is to those who record traffic: lengths, times and salted hashes. Knows answers and tokens; never text, HTTP or files.

Nobody is slowed by a recorder: a turn's end costs an append, hashing is done when the recorder is written to, and what one does not take in
time is left out and counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from pensieve.engine.messages import tenant_of
from pensieve.server.sse import event
from pensieve.server.turns import Answer, Turns

MAX_WAITING = 256  # finished turns that a recorder has not taken yet; each holds its prompt's tokens
MAX_RECORDERS = 16  # of one server
MAX_RECORDERS_PER_TENANT = 4
LOOK_S = 0.25  # how often a recorder with nothing to write looks whether it is over
DIGEST_BYTES = 8


class Recorder:
    """One recording under way. Used by the event loop alone, but for `line`."""

    def __init__(self, tenant: str, block_tokens: int) -> None:
        """Record the turns of `tenant` that begin from now on."""
        self._tenant = tenant
        self._block_tokens = block_tokens
        self._salt = secrets.token_bytes(
            32
        )  # of this recording alone, and nowhere kept: nobody can try out what a hash might stand for
        self._begun_s = time.monotonic()
        self._waiting: deque[Answer] = deque()
        self._came = asyncio.Event()
        self.lost = 0  # turns left out

    def take(self, answer: Answer) -> None:
        """A turn ended."""
        done = answer.done
        if done is None or done.receipt.output_tokens < 1 or answer.turn.submitted_s < self._begun_s:
            return
        if tenant_of(answer.namespace) != self._tenant:
            return
        if len(self._waiting) >= MAX_WAITING:
            self.lost += 1
            return
        self._waiting.append(answer)
        self._came.set()

    async def events(self, turns: Turns, duration_s: float | None) -> AsyncIterator[bytes]:
        """The recording as events, until its time or the server ends: `begin`, a `turn` for each, `lost` whenever some were, `end`."""
        told = 0
        yield event("begin", {"block_tokens": self._block_tokens})
        while True:
            while self._waiting:
                answer = self._waiting.popleft()
                yield event("turn", await asyncio.to_thread(self.line, answer))
            if self.lost > told:
                told = self.lost
                yield event("lost", {"turns": told})
            if self._waiting:
                continue
            over = duration_s is not None and time.monotonic() - self._begun_s >= duration_s
            if over or (turns.draining and not turns.open):
                break
            self._came.clear()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._came.wait()
            except TimeoutError:
                continue
        yield event("end", {"turns_lost": self.lost})

    def line(self, answer: Answer) -> dict[str, Any]:
        """What is told of a turn. `blocks`: a hash for each whole block of its prompt, each of all tokens up to there."""
        done = answer.done
        assert done is not None
        root = self._hash(answer.namespace.encode("utf-8", "surrogatepass"))
        tokens, blocks, before = array("q", done.prompt).tobytes(), [], root
        width = 8 * self._block_tokens
        for start in range(0, len(tokens) - width + 1, width):
            before = self._hash(before + tokens[start : start + width])
            blocks.append(before.hex())
        name = (
            answer.turn.conversation_id or answer.id
        )  # (what is asked by tokens alone is nobody's conversation)
        return {
            "conversation": self._hash(root + name.encode("utf-8", "surrogatepass")).hex(),
            "arrival_s": round(answer.turn.submitted_s - self._begun_s, 6),
            "prompt_tokens": len(done.prompt),
            "output_tokens": done.receipt.output_tokens,
            "blocks": blocks,
        }

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=self._salt).digest()
