"""A chat system without a model: each token is a hash of all before it, so equal contexts give equal answers."""

from __future__ import annotations

import math
import threading
import zlib
from concurrent.futures import Future
from dataclasses import replace

from pensieve.bench.systems import CONTEXT_FULL, TurnRequest, TurnResult, failed_turn
from pensieve.core.receipt import Receipt

VOCAB = 1000


def next_token(path: tuple[int, ...]) -> tuple[int, float]:
    """What the fake says after a path, and how sure it is."""
    word = zlib.crc32(repr(path).encode())
    return word % VOCAB, -0.1 - (word >> 10) % 100 / 100


class FakeSystem:
    """Answers at once, or a moment later from another thread. Keeps what it was asked."""

    def __init__(
        self, name: str = "fake", *, delay_s: float = 0.0, reuse: bool = True, max_context: int = 10**9
    ) -> None:
        self.name = name
        self.delay_s = delay_s
        self.reuse = reuse  # whether its receipts claim a cache
        self.max_context = max_context
        self.asked: list[TurnRequest] = []
        self.ended: list[str] = []
        self.in_flight: set[str] = set()
        self.most_in_flight = 0
        self.overlapped = False  # two turns of one conversation at once
        self._paths: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def start_turn(self, turn: TurnRequest) -> Future[TurnResult]:
        with self._lock:
            self.asked.append(turn)
            self.overlapped |= turn.conversation_id in self.in_flight
            self.in_flight.add(turn.conversation_id)
            self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        future: Future[TurnResult] = Future()
        if self.delay_s:
            threading.Timer(self.delay_s, self._settle, (turn, future)).start()
        else:
            self._settle(turn, future)
        return future

    def end_conversation(self, conversation_id: str) -> None:
        self.ended.append(conversation_id)

    def close(self) -> None:
        pass

    def _settle(self, turn: TurnRequest, future: Future[TurnResult]) -> None:
        try:
            result = self.answer(turn)
        except Exception as error:
            future.set_exception(error)
            return
        finally:
            with self._lock:
                self.in_flight.discard(turn.conversation_id)
        future.set_result(result)

    def answer(self, turn: TurnRequest) -> TurnResult:
        """One answer; tests override it to break something."""
        history = (
            turn.forced_history
            if turn.forced_history is not None
            else self._paths.get(turn.conversation_id, ())
        )
        new = (
            turn.tokens
            if turn.tokens is not None
            else tuple((turn.system_text or "").encode() + (turn.user_text or "").encode())
        )
        prompt = (*history, *new)
        if len(prompt) + turn.max_new_tokens > self.max_context:
            return failed_turn(
                CONTEXT_FULL, f"{len(prompt)} tokens, {self.max_context} fit", submitted_s=0.0, total_s=0.001
            )
        path, logprobs, tops = prompt, [], []
        for _ in range(turn.max_new_tokens):
            token, logprob = next_token(path)
            path = (*path, token)
            logprobs.append(logprob)
            tops.append(((token, logprob), ((token + 1) % VOCAB, logprob - 1.0)))
        self._paths[turn.conversation_id] = path
        found = len(history) if self.reuse else 0
        total_s = 0.01 + 0.001 * (len(prompt) - found) / 10
        receipt = Receipt(
            len(prompt),
            found,
            0,
            len(history) - found,
            len(new),
            turn.max_new_tokens,
            0,
            0,
            0,
            0,
            0,
            0.001,
            total_s / 2,
            total_s,
        )
        output = path[len(prompt) :]
        return TurnResult(
            prompt,
            output,
            f"answer {output[0]}",
            tuple(tops),
            tuple(logprobs),
            0.0,
            0.001,
            total_s / 2,
            total_s,
            receipt,
            "length",
        )


def with_token(result: TurnResult, at: int, token: int, gap: float) -> TurnResult:
    """The same answer, but another token is chosen at `at`, `gap` nats above the old one; what follows is cut."""
    old, logprob = result.output[at], result.logprobs[at]
    top = ((token, logprob), (old, logprob - gap))
    return replace(
        result,
        output=(*result.output[:at], token, *result.output[at + 1 :]),
        logprobs=(*result.logprobs[:at], logprob, *result.logprobs[at + 1 :]),
        tops=(*result.tops[:at], top, *result.tops[at + 1 :]),
    )


def shifted(result: TurnResult, at: int, nats: float) -> TurnResult:
    """The same answer with one log-probability moved."""
    assert math.isfinite(nats)
    logprobs = list(result.logprobs)
    logprobs[at] += nats
    return replace(result, logprobs=tuple(logprobs))
