"""Chat completions of any OpenAI-compatible server, streamed and timed. Knows the request's fields; never who
asks, or why.

What servers take to give an answer of a fixed length, as their sources and manuals say: vLLM, SGLang and
Pensieve `ignore_eos` and `min_tokens`; llama.cpp `ignore_eos`; transformers serve a `generation_config`, in
which the end-of-text token can be one that there is not (it refuses fields that it does not know). OpenAI
itself has none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pensieve.bench.chat_stream import EventSplitter, StreamedAnswer, TurnFailed, refusal
from pensieve.bench.http_client import HttpClient

Messages = list[dict[str, str]]

LENGTH_FORMS: tuple[tuple[str, ...], ...] = (
    ("ignore_eos", "min_tokens"),
    ("ignore_eos",),
    ("min_tokens",),
    ("generation_config",),
)
USAGE_FIELD = "stream_options"


def length_fields(names: Sequence[str], num_tokens: int) -> dict[str, Any]:
    """The named fields, for an answer of exactly `num_tokens` together with `max_tokens`."""
    values: dict[str, Any] = {
        "ignore_eos": True,
        "min_tokens": num_tokens,
        "generation_config": json.dumps(
            {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": -1}
        ),
    }
    return {name: values[name] for name in names}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what came of it. Times are of `time.perf_counter`."""

    submitted_s: float
    ended_s: float
    answer: StreamedAnswer
    failure: TurnFailed | None


@dataclass
class ChatClient:
    """Asks one server, with the fields that it takes."""

    http: HttpClient
    model: str
    length_form: tuple[
        str, ...
    ] = ()  # the fields by which it gives answers of a fixed length; () = it does not
    with_usage: bool = True  # ask for the counts of tokens at the stream's end
    extra: dict[str, Any] = field(default_factory=dict)  # more fields, for every request

    async def ask(
        self, messages: Messages, num_tokens: int, *, length_form: tuple[str, ...] | None = None
    ) -> Asked:
        """One greedy answer of at most `num_tokens` tokens (exactly so many, if the server can). Does not
        raise for what servers do.

        Args:
            messages: the whole history and what is asked.
            num_tokens: of the answer.
            length_form: other fields for the length than the client's own.
        """
        submitted_s = time.perf_counter()
        answer, events = StreamedAnswer(), EventSplitter()

        def on_body(data: bytes) -> None:
            now_s = time.perf_counter()
            for event in events.feed(data):
                answer.take(event, now_s)

        failure: TurnFailed | None = None
        try:
            body = self._body(messages, num_tokens, self.length_form if length_form is None else length_form)
            response = await self.http.post("/chat/completions", body, on_body)
            if response.status != 200:
                raise refusal(response.status, response.body)
            for event in events.finish():
                answer.take(event, time.perf_counter())
            answer.check_complete()
        except TurnFailed as error:
            failure = error
        except Exception as error:  # a server may send anything at all; the turn fails, the run goes on
            failure = TurnFailed("bad_answer", f"{type(error).__name__}: {error}")
        return Asked(submitted_s, time.perf_counter(), answer, failure)

    def _body(self, messages: Messages, num_tokens: int, length_form: tuple[str, ...]) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": num_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self.with_usage:
            body[USAGE_FIELD] = {"include_usage": True}
        return json.dumps(body | length_fields(length_form, num_tokens) | self.extra).encode()
