"""Finished answers as clients are told of them: usage, receipt, log-probabilities.

Knows turns, live and stored; never endpoints.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pensieve.core.receipt import Miss, Receipt
from pensieve.core.request import FinishReason
from pensieve.engine.messages import Token as SampledToken
from pensieve.message import Message
from pensieve.server.answer import Answer
from pensieve.service import TurnDone, TurnSpec
from pensieve.store import Turn
from pensieve.text import ChatText

ANSWER = "answer"  # key in a turn's meta: what its client was told


@dataclass(frozen=True, slots=True)
class Completed:
    """A finished answer, just made or read from the store."""

    turn_id: str
    conversation_id: str | None
    created: int
    message: Message
    reason: str  # stop, length, abort, interrupted
    usage: Mapping[str, int]  # prompt_tokens, completion_tokens, cached_tokens
    receipt: Mapping[str, Any]
    meta: Mapping[str, Any]
    logprobs: Sequence[SampledToken] = ()


def with_answer_meta(spec: TurnSpec, created: int, meta: Mapping[str, object]) -> TurnSpec:
    """A turn that is stored with `meta` and with what its client is told: usage, receipt, time."""

    def answer_meta(done: TurnDone) -> Mapping[str, object]:
        told = {
            "created": created,
            "usage": usage_of(done),
            "receipt": receipt_json(done.receipt, done.warning),
        }
        return {**meta, ANSWER: told}

    return replace(spec, answer_meta=answer_meta)


def completed_now(answer: Answer, done: TurnDone, meta: Mapping[str, object]) -> Completed:
    """An answer that has just ended."""
    assert done.message is not None
    return Completed(
        answer.id,
        answer.turn.conversation_id,
        answer.created,
        done.message,
        done.reason.value,
        usage_of(done),
        receipt_json(done.receipt, done.warning),
        meta,
        tuple(answer.turn.sampled[: len(done.output)])
        if answer.turn.spec.sampling.logprobs is not None
        else (),
    )


def completed_before(turn: Turn, conversation_id: str | None) -> Completed:
    """An answer from the store."""
    told = turn.meta.get(ANSWER)
    told = told if isinstance(told, dict) else {}
    message = (
        turn.messages[-1]
        if turn.messages and turn.messages[-1].role == "assistant"
        else Message("assistant", "")
    )
    return Completed(
        turn.id,
        conversation_id,
        int(told.get("created", turn.created_s)),
        message,
        turn.reply_reason or "stop",
        told.get("usage", {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}),
        told.get("receipt", {}),
        turn.meta,
    )


def usage_of(done: TurnDone) -> dict[str, int]:
    """Tokens of the prompt, tokens of the answer, and cache hits among the first."""
    receipt = done.receipt
    return {
        "prompt_tokens": receipt.prompt_tokens,
        "completion_tokens": len(done.output),
        "cached_tokens": receipt.gpu_tokens + receipt.cpu_tokens,
    }


def receipt_json(receipt: Receipt, warning: str | None) -> dict[str, Any]:
    """A receipt for clients: milliseconds, wall-clock times, reasons of misses."""
    shown = asdict(receipt)
    for name in ("resume_cpu_tokens", "resume_recomputed_tokens"):  # (for operators)
        del shown[name]
    for name in ("queue", "first_token", "total"):
        seconds = shown.pop(f"{name}_s")
        shown[f"{name}_ms"] = None if seconds is None else round(1e3 * seconds, 3)
    shown["misses"] = [_miss_json(miss) for miss in receipt.misses]
    return shown | {"warning": warning}


def finish_reason(reason: str, message: Message) -> str:
    """Why an answer ended, in OpenAI's words for completions."""
    if message.tool_calls and reason == FinishReason.STOP.value:
        return "tool_calls"
    return (
        "stop" if reason == FinishReason.STOP.value else "length"
    )  # an answer that was cut short must not be taken for complete


def logprob_items(tokens: Sequence[SampledToken], text: ChatText) -> list[dict[str, Any]]:
    """Log-probabilities as chat completions and responses give them."""

    def item(token_id: int, logprob: float | None) -> dict[str, Any]:
        written = text.token_text(token_id)
        return {
            "token": written,
            "logprob": -9999.0 if logprob is None else logprob,
            "bytes": list(written.encode("utf-8", "replace")),
        }

    return [
        {
            **item(token.token_id, token.logprob),
            "top_logprobs": [item(token_id, logprob) for token_id, logprob in token.top],
        }
        for token in tokens
    ]


def _miss_json(miss: Miss) -> dict[str, Any]:
    at = (
        None if miss.at_s is None else round(time.time() - (time.monotonic() - miss.at_s), 3)
    )  # the engine's clock is this machine's
    return {"start": miss.start, "stop": miss.stop, "why": miss.why, "at": at, "by": miss.by}
