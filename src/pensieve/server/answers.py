"""From a turn to what clients are told of it: usage, receipt, the answer's parts. Knows turns, live and stored; never endpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pensieve.core.request import FinishReason
from pensieve.engine.messages import Miss, Receipt
from pensieve.engine.messages import Token as SampledToken
from pensieve.message import Message
from pensieve.server.output import OutputForm, read_whole
from pensieve.server.turns import Answer
from pensieve.service import Composed, TurnDone, TurnSpec
from pensieve.store import Turn
from pensieve.text import ChatText

ANSWER = "answer"  # a turn's meta: what its client was told


@dataclass(frozen=True, slots=True)
class Completed:
    """An answer that is durable: just now, or long ago."""

    turn_id: str
    conversation_id: str | None
    created: int
    message: Message
    reason: str  # stop, length, abort, interrupted
    usage: Mapping[str, int]  # prompt_tokens, completion_tokens, cached_tokens
    receipt: Mapping[str, Any]
    meta: Mapping[str, Any]
    logprobs: Sequence[SampledToken] = ()


def composer(
    spec: TurnSpec, text: ChatText, form: OutputForm, created: int, meta: Mapping[str, object]
) -> TurnSpec:
    """A turn whose answer is stored as what `form` reads in it, with what its client is told."""

    def compose(done: TurnDone) -> Composed:
        output = read_whole(text, form, spec.turn_id, spec.prefix + done.text)
        told = {
            "created": created,
            "usage": usage_of(done),
            "receipt": receipt_json(done.receipt, done.warning),
        }
        return Composed(output.message(), {**meta, ANSWER: told})

    watch = None
    if form.tools and form.calls and not form.parallel:
        watch = _one_call_only(spec, text, form)
    return replace(spec, compose=compose, watch=watch)


def completed_now(
    answer: Answer, done: TurnDone, form: OutputForm, text: ChatText, meta: Mapping[str, object]
) -> Completed:
    """An answer that has just ended."""
    message = done.message or read_whole(text, form, answer.id, answer.turn.spec.prefix + done.text).message()
    return Completed(
        answer.id,
        answer.turn.conversation_id,
        answer.created,
        message,
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
    """Tokens in, tokens out, and how many of the first were cached."""
    receipt = done.receipt
    return {
        "prompt_tokens": receipt.prompt_tokens,
        "completion_tokens": len(done.output),
        "cached_tokens": receipt.gpu_tokens + receipt.cpu_tokens,
    }


def receipt_json(receipt: Receipt, warning: str | None) -> dict[str, Any]:
    """A receipt for clients: milliseconds, wall-clock times, words for what was missed."""
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
    )  # (one that was cut short is never taken for whole)


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


def _one_call_only(spec: TurnSpec, text: ChatText, form: OutputForm) -> Any:
    from pensieve.server.output import Output

    output = Output(text, form, spec.turn_id)
    if spec.prefix:
        output.feed(spec.prefix)

    def watch(piece: str) -> bool:
        output.feed(piece)
        return output.enough

    return watch
