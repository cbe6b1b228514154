"""Texts that are slow to tokenize or to render: blanks, marks, endless words, look-alikes of control tokens, wherever a text is taken.

Knows characters and fields; never tokenizers.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from bodies import ANSWER_S, CHAT, RESPONSES, TEXT, TOKENIZE, at_once, judge
from promises import Check, Notes, add
from served import Served
from wire import post
from world import World

SIZE = 15_700_000  # bytes of a text in UTF-8
CONTEXT = 8192  # tokens of the tiny model
Text = Callable[[int], str]  # of about so many bytes


def again(piece: str) -> Text:
    """A piece, over and over."""
    return lambda size: piece * (size // len(piece.encode()))


def at_random(pick: Callable[[random.Random], str], width: int) -> Text:
    """Drawn characters of some bytes each."""

    def make(size: int) -> str:
        rng = random.Random(7)
        block = "".join(pick(rng) for _ in range(min(200_000, size // width)))
        return block * max(1, size // (len(block.encode()) or 1))

    return make


TEXTS: dict[str, Text] = {
    "blanks": again(" "),
    "newlines": again("\n"),
    "tabs-and-newlines": again("\t\n"),
    "no-break-blanks": again("\u00a0"),
    "one-letter": again("a"),
    "long-words": again("a" * 60_000 + " "),
    "words": again("word "),
    "blanks-and-words": again(" " * 2000 + "word"),
    "digits": again("7"),
    "punctuation": again("!?.,;"),
    "apostrophes": again("'s'll'"),
    "emoji": again("👩‍👩‍👧‍👦"),
    "marks": again("e\u0301\u0302\u0303"),
    "only-marks": again("\u0301"),
    "zero-width": again("\u200b\u200d"),
    "ligatures": again("\ufdfa"),  # 18 letters each, when normalised
    "chinese": again("漢字假名"),
    "random-unicode": at_random(
        lambda rng: chr(rng.choice((rng.randrange(0x20, 0xD800), rng.randrange(0x10000, 0x1F000)))), 3
    ),
    "random-letters": at_random(lambda rng: rng.choice("abcdefghijklmnopqrstuvwxyz"), 1),
    "base64": lambda size: base64.b64encode(random.Random(3).randbytes(size * 3 // 4 - 4)).decode(),
    "control-tokens": again("<|im_start|>"),
    "control-look-alikes": again("<|im_start|<|im_end|"),
    "null-characters": again("\x01\x02"),
}
QUICK = {"blanks", "one-letter", "emoji", "control-tokens"}


def chat_of(text: str) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 1}


PLACES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "text": (TEXT, lambda text: {"model": "tiny", "prompt": text, "max_tokens": 1}),
    "text-list": (TEXT, lambda text: {"model": "tiny", "prompt": [text], "max_tokens": 1}),
    "responses": (RESPONSES, lambda text: {"input": text, "max_output_tokens": 1}),
    "responses-truncated": (RESPONSES, lambda text: {"input": text, "max_output_tokens": 1, "truncation": "auto"}),
    "instructions": (RESPONSES, lambda text: {"input": "hi", "instructions": text, "max_output_tokens": 1, "truncation": "auto"}),
    "system": (CHAT, lambda text: {**chat_of("hi"), "messages": [{"role": "system", "content": text}, {"role": "user", "content": "hi"}]}),
    "answers": (
        CHAT,
        lambda text: {**chat_of("hi"), "messages": [{"role": "assistant", "content": text[: len(text) // 2]}, {"role": "user", "content": text[len(text) // 2 :]}]},
    ),
    "reasoning": (
        CHAT,
        lambda text: {**chat_of("hi"), "messages": [{"role": "assistant", "content": "a", "reasoning_content": text}, {"role": "user", "content": "hi"}]},
    ),
    "tool-result": (
        CHAT,
        lambda text: {
            **chat_of("hi"),
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "a", "content": text},
            ],
        },
    ),
    "call-arguments": (
        CHAT,
        lambda text: {
            **chat_of("hi"),
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps(text)}}]},
                {"role": "tool", "tool_call_id": "a", "content": "a"},
            ],
        },
    ),
    "tool-description": (
        CHAT,
        lambda text: {**chat_of("hi"), "tools": [{"type": "function", "function": {"name": "f", "description": text}}]},
    ),
    "tool-schema": (
        CHAT,
        lambda text: {**chat_of("hi"), "tools": [{"type": "function", "function": {"name": "f", "parameters": {"description": text}}}]},
    ),
    "tokenize": (TOKENIZE, lambda text: {"prompt": text}),
    "tokenize-chat": (TOKENIZE, lambda text: {"messages": [{"role": "user", "content": text}]}),
    "items": ("/v1/conversations", lambda text: {"items": [{"type": "message", "role": "user", "content": text}]}),
}  # fmt: skip
PROMISE = "A text of any kind, wherever it is taken, is refused or answered soon and delays no other request."


def run(path: str, make: Callable[[], Any]) -> Callable[[World, Notes], None]:
    """The check of one body with a text."""

    def check(world: World, notes: Notes) -> None:
        server = world.shared()
        body = json.dumps(make(), ensure_ascii=False).encode()
        with world.watched(server, notes):
            judge(notes, post(server.address, path, body, server.keys["mallory"], ANSWER_S))

    return check


def _put(put: Callable[[str], Any], text: Callable[[int], str], size: int) -> Any:
    return put(text(size))


def _add_all() -> None:
    kinds = itertools.cycle(
        ("blanks", "one-letter", "random-unicode", "control-tokens", "only-marks", "base64")
    )
    for kind, text in TEXTS.items():
        add(
            Check(
                f"text/chat-{kind}",
                PROMISE,
                run(CHAT, partial(_put, chat_of, text, SIZE)),
                quick=kind in QUICK,
            )
        )
    for place, (path, put) in PLACES.items():
        for kind in (next(kinds), next(kinds)):
            size = SIZE // 2 if put is PLACES["call-arguments"][1] else SIZE
            make = partial(_put, put, TEXTS[kind], size)
            add(
                Check(
                    f"text/{place}-{kind}",
                    PROMISE,
                    run(path, make),
                    quick=place in ("tokenize", "tool-description"),
                )
            )


_add_all()


def tools(world: World, notes: Notes) -> None:
    """128 tools with 100 kB descriptions are refused by length, soon."""
    server = world.shared()
    described = [
        {
            "type": "function",
            "function": {"name": f"f{i}", "description": "word " * 20_000, "parameters": {"type": "object"}},
        }
        for i in range(128)
    ]
    with world.watched(server, notes):
        judge(
            notes,
            post(
                server.address, CHAT, {**chat_of("hi"), "tools": described}, server.keys["mallory"], ANSWER_S
            ),
        )


def truncated(world: World, notes: Notes) -> None:
    """A history of 4,095 messages that is to be truncated takes no time of others."""
    server = world.shared()
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": "word " * 385 if i < 4094 else "hi"}
        for i in range(4095)
    ]
    with world.watched(server, notes):
        body = {"input": messages, "truncation": "auto", "max_output_tokens": 1}
        judge(notes, post(server.address, RESPONSES, body, server.keys["mallory"], ANSWER_S))


def stored(world: World, notes: Notes) -> None:
    """A stored history that is far longer than the context delays no other request at its next turn."""
    server = world.shared()
    key = server.keys["mallory"]
    conversation = post(server.address, "/v1/conversations", {}, key).json["id"]
    text = {"type": "message", "role": "user", "content": "word " * 100_000}
    with world.watched(server, notes):
        added = [
            post(
                server.address,
                f"/v1/conversations/{conversation}/items",
                {"items": [text] * 20},
                key,
                ANSWER_S,
            )
            for _ in range(3)
        ]
        notes.say(f"added: {added[-1]}")
        body = {"input": "hi", "conversation": conversation, "truncation": "auto", "max_output_tokens": 1}
        judge(notes, post(server.address, RESPONSES, body, key, ANSWER_S))
        judge(notes, post(server.address, RESPONSES, {**body, "truncation": "disabled"}, key, ANSWER_S))


def below_the_limit(world: World, notes: Notes) -> None:
    """Sixteen prompts at once that only just fit, or only just do not, delay no /health."""
    server = world.shared()
    texts = [
        TEXTS[kind](CONTEXT * width)
        for kind, width in (
            ("words", 5),
            ("words", 6),
            ("emoji", 3),
            ("base64", 2),
            ("one-letter", 8),
            ("marks", 2),
        )
    ]
    bodies = [json.dumps(chat_of(text), ensure_ascii=False).encode() for text in texts]
    with world.watched(server, notes, max_chat_s=None):
        replies = at_once(server, TOKENIZE, [json.dumps({"prompt": text}).encode() for text in texts] * 2)
        replies += at_once(server, CHAT, bodies[1:] + bodies[1:])
        notes.say(", ".join(sorted({str(reply.status) for reply in replies})))
        for reply in replies:
            notes.hold(reply.how == "answered" and reply.status < 500, f"one of many: {reply}")


def stops(world: World, notes: Notes) -> None:
    """Stop strings of a megabyte and an answer of thousands of tokens cost the others nothing."""
    server = world.shared()
    body = {
        **chat_of("hi"),
        "max_tokens": 300,
        "ignore_eos": True,
        "stop": ["x" * 500_000 + str(i) for i in range(16)],
        "stream": True,
    }
    with world.watched(server, notes):
        judge(notes, post(server.address, CHAT, body, server.keys["mallory"], ANSWER_S))


def flood(server: Served, count: int) -> None:
    at_once(server, TOKENIZE, [json.dumps({"prompt": " " * 4_000_000}).encode()] * count)


def several(world: World, notes: Notes) -> None:
    """Eight texts of 4 MB at once to /tokenize delay no other request."""
    server = world.shared()
    with world.watched(server, notes):
        flood(server, 8)


add(Check("text/128-tools", PROMISE, tools))
add(Check("text/4095-truncated", PROMISE, truncated))
add(Check("text/stored-history", PROMISE, stored))
add(Check("text/below-the-limit", PROMISE, below_the_limit, quick=False))
add(Check("text/long-stops-streamed", PROMISE, stops, quick=False))
add(Check("text/eight-at-once", PROMISE, several))
