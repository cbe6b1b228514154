"""Recordings of traffic: lengths, times and salted hashes of finished turns.

Knows answers and tokens; never text, HTTP or files.

A recorder slows no request: a turn's end costs an append, and hashing happens when the recording is sent.
Turns that a recorder does not take in time are left out and counted.
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
from pensieve.server.answer import Answer
from pensieve.server.open_answers import OpenAnswers
from pensieve.server.sse import event

MAX_WAITING = 256  # finished turns that wait for a recorder; each holds the tokens of its prompt
MAX_RECORDERS = 16  # at once, of one server
MAX_RECORDERS_PER_TENANT = 4
LOOK_S = 0.25  # how often an idle recorder checks whether it has to end
DIGEST_BYTES = 8


class Recorder:
    """One recording under way. Used by the event loop only, except for `line`."""

    def __init__(self, tenant: str, block_tokens: int) -> None:
        """Record the turns of `tenant` that begin from now on."""
        self._tenant = tenant
        self._block_tokens = block_tokens
        # new for each recording and stored nowhere, so that a hash cannot be found by trying out tokens
        self._salt = secrets.token_bytes(32)
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

    async def events(self, answers: OpenAnswers, duration_s: float | None) -> AsyncIterator[bytes]:
        """The recording as events until its time or the server ends:

        `begin`, a `turn` each, `lost` if some were, `end`.
        """
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
            if over or (answers.draining and not answers.open):
                break
            self._came.clear()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._came.wait()
            except TimeoutError:
                continue
        yield event("end", {"turns_lost": self.lost})

    def line(self, answer: Answer) -> dict[str, Any]:
        """A turn as recorded.

        `blocks` has a hash for each whole block of its prompt, each of all tokens up to there.
        """
        done = answer.done
        assert done is not None
        root = self._hash(answer.namespace.encode("utf-8", "surrogatepass"))
        tokens, blocks, before = array("q", done.prompt).tobytes(), [], root
        width = 8 * self._block_tokens
        for start in range(0, len(tokens) - width + 1, width):
            before = self._hash(before + tokens[start : start + width])
            blocks.append(before.hex())
        name = answer.turn.conversation_id or answer.id  # a prompt of token ids belongs to no conversation
        return {
            "conversation": self._hash(root + name.encode("utf-8", "surrogatepass")).hex(),
            "arrival_s": round(answer.turn.submitted_s - self._begun_s, 6),
            "prompt_tokens": len(done.prompt),
            "output_tokens": done.receipt.output_tokens,
            "blocks": blocks,
        }

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=self._salt).digest()
