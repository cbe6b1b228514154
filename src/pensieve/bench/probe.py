"""What a server is and takes, found out before a run by asking it. Knows requests and counts; nothing of
workloads.

Everything asked here is of words that no measured conversation begins with.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from pensieve.bench.chat_client import LENGTH_FORMS, USAGE_FIELD, Asked, ChatClient, Messages
from pensieve.bench.chat_stream import TurnFailed
from pensieve.bench.http_client import HttpClient
from pensieve.bench.systems import CONTEXT_FULL
from pensieve.errors import ModelUnavailable
from pensieve.workloads.prompts import PromptWriter

SHORT_ANSWERS = (
    "What colour is the sky? Answer with one word.",
    "Say hello.",
    "Is water wet? Answer yes or no.",
)
PROBE_TOKENS = 48  # more than a model says to these by itself
CALIBRATION_WORDS = (20, 320)
SMALL_CALIBRATION_WORDS = 80  # instead of the longer one, where the context is small
TOKENS_PER_WORD = 1.25  # of English where the server counts nothing
_SHOWN_CHARS = 300


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is asked."""

    url: str
    model: str
    server: str | None  # what GET /version or the Server header says
    length_form: tuple[str, ...]  # the fields that fix an answer's length
    fixed_lengths: bool  # answers have exactly the tokens that were asked for
    counts_tokens: bool  # answers end with counts of tokens
    tokens_per_word: float  # of what a PromptWriter writes
    template_tokens: float | None  # that a template adds to one message; None = not known
    notes: tuple[str, ...] = ()  # what a reader of the results must know


async def find_model(http: HttpClient, model: str | None) -> tuple[str, str | None]:
    """The model to ask for (None: the first that the server lists), and what the server says it is.

    Raises:
        ModelUnavailable: the server does not answer, or names no model.
    """
    header = None
    try:
        listed = await http.get("/models")
        header = listed.headers.get("server")
        if model is None:
            if listed.status != 200:
                raise ValueError(
                    f"HTTP {listed.status}: {listed.body[:_SHOWN_CHARS].decode(errors='replace')}"
                )
            model = str(json.loads(listed.body)["data"][0]["id"])
    except (TurnFailed, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelUnavailable(
            f"{http.url}/models does not name a model ({type(error).__name__}: {error}): is the server up? "
            "Name the model with --model if it does not list any, and send a key with --api-key if it wants "
            "one"
        ) from error
    return model, header


async def server_version(http: HttpClient, header: str | None) -> str | None:
    """What `GET /version` says, or else the Server header."""
    try:
        answer = await http.get("/version")
        said = json.loads(answer.body) if answer.status == 200 else None
    except (TurnFailed, ValueError):
        said = None
    return json.dumps(said)[:_SHOWN_CHARS] if isinstance(said, dict) and "version" in said else header


async def probe(
    chat: ChatClient, version: str | None, writer: PromptWriter, *, natural: bool = False
) -> Target:
    """Find out which fields the server takes and how many tokens its words are; sets the client's form for
    that.

    Args:
        chat: the client.
        version: what the server says it is.
        writer: of the run's texts.
        natural: answers end where the model ends them, so no fields are needed for that.

    Raises:
        ModelUnavailable: the server does not answer a plain request.
    """
    notes = []
    plain = await _plain(chat)
    counts = plain.answer.output_tokens is not None and plain.answer.prompt_tokens is not None
    if not counts:
        notes.append(
            "the server reports no token counts: pieces of the stream are counted instead, and lengths "
            "cannot be verified"
        )
    fixed = False
    if not natural:
        chat.length_form = await _find_length_form(chat) if counts else ()
        fixed = bool(chat.length_form)
        if not fixed:
            notes.append(
                "the server does not fix the length of answers: they end where the model ends them, so "
                "output lengths vary"
            )
    tokens_per_word, template_tokens = await _calibrate(chat, writer) if counts else (TOKENS_PER_WORD, None)
    return Target(
        chat.http.url,
        chat.model,
        version,
        chat.length_form,
        fixed,
        counts,
        tokens_per_word,
        template_tokens,
        tuple(notes),
    )


async def warm_up(
    chat: ChatClient, writer: PromptWriter, num_requests: int, num_words: int, num_tokens: int
) -> None:
    """Requests like the run's, at once, whose answers are not counted.

    Raises:
        ModelUnavailable: one fails.
    """
    asked = await asyncio.gather(
        *(
            chat.ask(_user(writer.write(f"warm-up/{index}", num_words)), num_tokens)
            for index in range(num_requests)
        )
    )
    for one in asked:
        _check(chat, one, "a warm-up request")


async def _plain(chat: ChatClient) -> Asked:
    """A request without fields beyond OpenAI's. The one that some servers refuse is left out if they name it."""
    asked = await chat.ask(_user(SHORT_ANSWERS[0]), PROBE_TOKENS, length_form=())
    if asked.failure is not None and _refused(asked.failure) and USAGE_FIELD in asked.failure.message:
        chat.with_usage = False
        asked = await chat.ask(_user(SHORT_ANSWERS[0]), PROBE_TOKENS, length_form=())
    _check(chat, asked, "a plain request")
    return asked


async def _find_length_form(chat: ChatClient) -> tuple[str, ...]:
    """The first form by which answers that the model would end early have the length asked for; () = none."""
    refused: set[str] = set()
    for form in LENGTH_FORMS:
        if refused & set(form):
            continue
        for question in SHORT_ANSWERS:
            asked = await chat.ask(_user(question), PROBE_TOKENS, length_form=form)
            if asked.failure is not None or asked.answer.output_tokens != PROBE_TOKENS:
                break
        else:
            return form
        if asked.failure is not None and _refused(asked.failure):
            refused |= {name for name in form if name in asked.failure.message}
    return ()


async def _calibrate(chat: ChatClient, writer: PromptWriter) -> tuple[float, float]:
    """Tokens a word, and what the template adds to one message: from two lengths, the difference leaves the
    template out.
    """
    short, long = CALIBRATION_WORDS
    few = await _count_prompt(chat, writer, short)
    try:
        many = await _count_prompt(chat, writer, long)
    except _ContextFull:
        long = SMALL_CALIBRATION_WORDS
        many = await _count_prompt(chat, writer, long)
    tokens_per_word = (many - few) / (long - short)
    if not tokens_per_word > 0:
        raise ModelUnavailable(
            f"{chat.http.url} counts {few} tokens in a prompt of {short} words and {many} in one of {long}: "
            "its counts are wrong"
        )
    return tokens_per_word, few - short * tokens_per_word


async def _count_prompt(chat: ChatClient, writer: PromptWriter, num_words: int) -> int:
    asked = await chat.ask(_user(writer.write(f"calibration/{num_words}", num_words)), 1)
    _check(chat, asked, "a calibration request")
    return asked.answer.prompt_tokens or 0


class _ContextFull(ModelUnavailable):
    """A request was longer than the model's context."""


def _check(chat: ChatClient, asked: Asked, what: str) -> None:
    if asked.failure is not None:
        kind = _ContextFull if asked.failure.code == CONTEXT_FULL else ModelUnavailable
        raise kind(f"{chat.http.url} failed {what} ({asked.failure.code}): {asked.failure.message}")


def _refused(failure: TurnFailed) -> bool:
    return failure.status is not None and 400 <= failure.status < 500


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]
