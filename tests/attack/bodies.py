"""Bodies that cost more than they say: lists of a million wrong entries, nesting, huge numbers, escapes, at every endpoint that takes one.

An input is a path and a function that makes the body, of nearly what --max-body allows. Knows OpenAI's field names; never how they are checked.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from typing import Any

from promises import MAX_REPLY_BYTES, Check, Notes, add
from served import Served
from wire import Reply, post
from world import World

SIZE = 15_800_000  # bytes; the usual --max-body is 16 MiB
ANSWER_S = 20.0  # to a refusal, with the sending
Make = Callable[[], bytes]

CHAT, TEXT, RESPONSES, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"
ONE = '"messages":[{"role":"user","content":"hi"}],"max_tokens":1'


def many(before: str, item: str, after: str, size: int = SIZE) -> Make:
    """As many of an item as fit, with commas between."""
    return lambda: (
        before + ",".join([item] * ((size - len(before) - len(after)) // (len(item) + 1))) + after
    ).encode()


def numbered(before: str, item: Callable[[int], str], after: str, count: int) -> Make:
    """Items that differ."""
    return lambda: (before + ",".join(item(i) for i in range(count)) + after).encode()[:SIZE]


def chat(field: str) -> tuple[str, str]:
    """Before and after a field's value, in an else right chat."""
    return f'{{"model":"tiny",{ONE},"{field}":', "}"


def nested(before: str, opening: str, closing: str, after: str, depth: int) -> Make:
    """Depth without width."""
    return lambda: (before + opening * depth + closing * depth + after).encode()


def long(before: str, character: str, after: str) -> Make:
    """One long string or number."""
    return lambda: (
        before + character * ((SIZE - len(before) - len(after)) // len(character)) + after
    ).encode()


MESSAGES = '{"model":"tiny","messages":'
INPUTS: dict[str, tuple[str, Make]] = {
    "chat-zeros": (CHAT, many(MESSAGES + "[", "0", "]}")),
    "chat-objects": (CHAT, many(MESSAGES + "[", "{}", "]}")),
    "chat-empty-parts": (CHAT, many(MESSAGES + '[{"role":"user","content":[', "{}", "]}]}")),
    "chat-text-parts": (
        CHAT,
        many(MESSAGES + '[{"role":"user","content":[', '{"type":"text","text":"a"}', "]}]}"),
    ),
    "chat-right-messages": (CHAT, many(MESSAGES + "[", '{"role":"user","content":"a"}', "]}")),
    "chat-tool-calls": (CHAT, many(MESSAGES + '[{"role":"assistant","tool_calls":[', "{}", "]}]}")),
    "chat-right-tool-calls": (
        CHAT,
        many(
            MESSAGES + '[{"role":"assistant","tool_calls":[',
            '{"id":"a","type":"function","function":{"name":"a","arguments":""}}',
            "]}]}",
        ),
    ),
    "chat-annotations": (
        CHAT,
        many(MESSAGES + '[{"role":"user","content":"a","annotations":[', "0", ']}],"max_tokens":1}'),
    ),
    "chat-unknown-fields": (
        CHAT,
        numbered(f'{{"model":"tiny",{ONE},', lambda i: f'"f{i}":0', "}", 1_100_000),
    ),
    "chat-part-fields": (
        CHAT,
        numbered(
            MESSAGES + '[{"role":"user","content":[{"type":"text","text":"a",',
            lambda i: f'"f{i}":0',
            '}]}],"max_tokens":1}',
            1_100_000,
        ),
    ),
    "chat-one-key-again": (CHAT, many("{", '"model":"tiny"', "}")),
    "chat-stops": (CHAT, many(chat("stop")[0] + "[", '"a"', "]}")),
    "chat-stop-numbers": (CHAT, many(chat("stop")[0] + "[", "0", "]}")),
    "chat-long-stops": (
        CHAT,
        lambda: (chat("stop")[0] + json.dumps(["a" * 980_000 + str(i) for i in range(16)]) + "}").encode(),
    ),
    "chat-logit-bias": (CHAT, numbered(chat("logit_bias")[0] + "{", lambda i: f'"{i}":1', "}}", 1_200_000)),
    "chat-wrong-bias": (CHAT, numbered(chat("logit_bias")[0] + "{", lambda i: f'"{i}":[]', "}}", 1_100_000)),
    "chat-metadata": (CHAT, numbered(chat("metadata")[0] + "{", lambda i: f'"k{i}":"v"', "}}", 1_000_000)),
    "chat-wrong-metadata": (
        CHAT,
        numbered(chat("metadata")[0] + "{", lambda i: f'"k{i}":0', "}}", 1_100_000),
    ),
    "chat-tools": (CHAT, many(chat("tools")[0] + "[", "{}", "]}")),
    "chat-tool-numbers": (CHAT, many(chat("tools")[0] + "[", "0", "]}")),
    "chat-tool-fields": (
        CHAT,
        numbered(chat("tools")[0] + '[{"type":"function",', lambda i: f'"f{i}":0', "}]}", 1_100_000),
    ),
    "chat-modalities": (CHAT, many(chat("modalities")[0] + "[", "0", "]}")),
    "chat-functions": (CHAT, many(chat("functions")[0] + "[", "{}", "]}")),
    "chat-schema-keys": (
        CHAT,
        numbered(
            chat("tools")[0] + '[{"type":"function","function":{"name":"f","parameters":{"properties":{',
            lambda i: f'"p{i}":{{}}',
            "}}}}]}",
            1_000_000,
        ),
    ),
    "chat-schema-enum": (
        CHAT,
        many(
            chat("tools")[0] + '[{"type":"function","function":{"name":"f","parameters":{"enum":[',
            "0",
            "]}}}]}",
        ),
    ),
    "chat-schema-deep": (
        CHAT,
        nested(
            chat("tools")[0] + '[{"type":"function","function":{"name":"f","parameters":',
            '{"a":',
            "}",
            "}}]}",
            2_000_000,
        ),
    ),
    "chat-response-format": (
        CHAT,
        many(
            chat("response_format")[0] + '{"type":"json_schema","json_schema":{"schema":{"enum":[',
            "0",
            "]}}}}",
        ),
    ),
    "chat-deep-lists": (CHAT, nested("", "[", "]", "", SIZE // 2)),
    "chat-deep-below-limit": (CHAT, many(MESSAGES + "[", "[" * 90 + "]" * 90, "]}")),
    "chat-deep-open": (CHAT, long('{"a":', "[", "")),
    "chat-huge-integer": (CHAT, long(chat("seed")[0], "9", "}")),
    "chat-huge-fraction": (CHAT, long(chat("temperature")[0] + "0.", "1", "}")),
    "chat-huge-exponent": (CHAT, long(chat("temperature")[0] + "1e", "9", "}")),
    "chat-integers": (CHAT, many(chat("seed")[0] + "[", "9" * 4000, "]}")),
    "chat-escapes": (CHAT, long(MESSAGES + '[{"role":"user","content":"', "\\u0041", '"}]}')),
    "chat-backslashes": (CHAT, long(MESSAGES + '[{"role":"user","content":"', "\\\\", '"}]}')),
    "chat-half-surrogates": (CHAT, long(MESSAGES + '[{"role":"user","content":"', "\\ud800", '"}]}')),
    "chat-late-surrogate": (CHAT, long(MESSAGES + '[{"role":"user","content":"', "a", '\\ud800"}]}')),
    "chat-blanks": (CHAT, long("{", " ", "}")),
    "chat-no-utf8": (CHAT, lambda: b'{"model":"' + b"\xff" * SIZE),
    "chat-utf16": (CHAT, lambda: ("{" + " " * (SIZE // 2 - 10) + "}").encode("utf-16")),
    "chat-utf32": (CHAT, lambda: ("[" + "0," * (SIZE // 8 - 10) + "0]").encode("utf-32")),
    "chat-long-model": (CHAT, long('{"messages":[{"role":"user","content":"a"}],"model":"', "m", '"}')),
    "chat-long-role": (CHAT, long(MESSAGES + '[{"content":"a","role":"', "r", '"}]}')),
    "chat-long-field": (CHAT, long('{"', "f", '":0}')),
    "chat-long-part-type": (
        CHAT,
        long(MESSAGES + '[{"role":"user","content":[{"text":"a","type":"', "t", '"}]}]}'),
    ),
    "chat-long-tool-name": (
        CHAT,
        long(chat("tools")[0] + '[{"type":"function","function":{"name":"', "a", '"}}]}'),
    ),
    "chat-long-user": (CHAT, long(chat("user")[0] + '"', "u", '"}')),
    "chat-long-effort": (CHAT, long(chat("reasoning_effort")[0] + '"', "e", '"}')),
    "text-fractions": (TEXT, many('{"model":"tiny","prompt":[', "0.5", "]}")),
    "text-lists": (TEXT, many('{"model":"tiny","prompt":[', "[0.5]", "]}")),
    "text-empty-lists": (TEXT, many('{"model":"tiny","prompt":[', "[]", "]}")),
    "text-mixed": (TEXT, many('{"model":"tiny","prompt":[', '"a",0,[0]', "]}")),
    "text-tokens": (TEXT, many('{"model":"tiny","max_tokens":1,"prompt":[', "5", "]}")),
    "text-one-list": (TEXT, many('{"model":"tiny","max_tokens":1,"prompt":[[', "5", "]]}")),
    "text-long-suffix": (TEXT, long('{"model":"tiny","prompt":"a","suffix":"', "s", '"}')),
    "responses-zeros": (RESPONSES, many('{"input":[', "0", "]}")),
    "responses-objects": (RESPONSES, many('{"input":[', "{}", "]}")),
    "responses-parts": (RESPONSES, many('{"input":[{"role":"user","content":[', "{}", "]}]}")),
    "responses-messages": (RESPONSES, many('{"input":[', '{"role":"user","content":"a"}', "]}")),
    "responses-include": (RESPONSES, many('{"input":"a","include":[', "0", "]}")),
    "responses-tools": (RESPONSES, many('{"input":"a","tools":[', "{}", "]}")),
    "responses-metadata": (
        RESPONSES,
        numbered('{"input":"a","metadata":{', lambda i: f'"k{i}":[]', "}}", 1_000_000),
    ),
    "responses-prompt": (RESPONSES, many('{"input":"a","prompt":[', "{}", "]}")),
    "responses-long-id": (RESPONSES, long('{"input":"a","previous_response_id":"', "r", '"}')),
    "tokenize-zeros": (TOKENIZE, many('{"messages":[', "0", "]}")),
    "tokenize-parts": (
        TOKENIZE,
        many('{"messages":[{"role":"user","content":[', '{"type":"text","text":"a"}', "]}]}"),
    ),
    "detokenize-fractions": ("/detokenize", many('{"tokens":[', "0.5", "]}")),
    "detokenize-tokens": ("/detokenize", many('{"tokens":[', "9", "]}")),
    "detokenize-a-million": ("/detokenize", many('{"tokens":[', "9", "]}", 2 * (1 << 20))),
    "conversation-items": ("/v1/conversations", many('{"items":[', "0", "]}")),
    "conversation-metadata": (
        "/v1/conversations",
        numbered('{"metadata":{', lambda i: f'"k{i}":0', "}}", 1_100_000),
    ),
    "items-objects": ("/v1/conversations/none/items", many('{"items":[', "{}", "]}")),
    "items-parts": (
        "/v1/conversations/none/items",
        many('{"items":[{"role":"user","content":[', "{}", "]}]}"),
    ),
    "ttl-list": ("/v1/pensieve/conversations/none/ttl", many('{"seconds":[', "0", "]}")),
    "fork-long-id": ("/v1/pensieve/conversations/none/fork", long('{"at":"', "a", '"}')),
    "warm-with-a-body": ("/v1/pensieve/conversations/none/warm", many("[", "0", "]")),
    "no-such-path": ("/v1/none", many("[", "0", "]")),
}
QUICK = {
    "chat-zeros", "chat-empty-parts", "chat-unknown-fields", "chat-long-stops", "chat-schema-deep", "chat-huge-integer", "chat-escapes",
    "chat-long-model", "text-fractions", "responses-objects", "tokenize-zeros", "detokenize-fractions", "items-objects", "conversation-metadata",
}  # fmt: skip


def judge(notes: Notes, reply: Reply) -> None:
    """A refusal is one: soon, in words, without the input."""
    notes.say(str(reply), answer_s=round(reply.seconds, 3))
    notes.hold(reply.how == "answered", f"no answer within {ANSWER_S:g} s ({reply.how})")
    notes.hold(reply.status < 500, f"answered {reply.status}: {reply.body[:200]!r}")
    if reply.status >= 400:
        notes.hold(
            len(reply.body) <= MAX_REPLY_BYTES,
            f"a refusal of {len(reply.body)} bytes, at most {MAX_REPLY_BYTES} may be",
        )


def run(path: str, make: Make) -> Callable[[World, Notes], None]:
    """The check of one body."""

    def check(world: World, notes: Notes) -> None:
        server = world.shared()
        body = make()
        with world.watched(server, notes):
            judge(notes, post(server.address, path, body, server.keys["mallory"], ANSWER_S))

    return check


PROMISE = "A body of any content is answered soon, in bounded memory, and delays no other request."
for _name, (_path, _make) in INPUTS.items():
    add(Check(f"body/{_name}", PROMISE, run(_path, _make), quick=_name in QUICK))


def at_once(server: Served, path: str, bodies: list[bytes], **headers: str) -> list[Reply]:
    """The same endpoint from several connections at once."""
    replies: list[Reply] = []

    def one(body: bytes) -> None:
        replies.append(post(server.address, path, body, server.keys["mallory"], ANSWER_S, **headers))

    threads = [threading.Thread(target=one, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def several(world: World, notes: Notes) -> None:
    """Eight such bodies at once, of 4 MB each."""
    server = world.shared()
    made = [
        many(MESSAGES + "[", item, "]}", 4_000_000)()
        for item in ("0", "{}", '{"role":0}', '{"role":"user","content":"a"}')
    ] * 2
    with world.watched(server, notes):
        replies = at_once(server, CHAT, made)
        for reply in replies:
            notes.hold(reply.how == "answered" and 400 <= reply.status < 500, f"one of eight: {reply}")
        notes.say(f"{len(replies)} answers, worst after {max(reply.seconds for reply in replies):.2f} s")


def other_types(world: World, notes: Notes) -> None:
    """Compressed, form and multipart bodies are refused as they are: nothing is unpacked."""
    server = world.shared()
    bomb = gzip.compress(b'{"model":"tiny","messages":[' + b"0," * 30_000_000 + b"0]}", 1)
    form = b"&".join([b"a=1"] * 3_900_000)
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    sent: list[tuple[str, bytes, dict[str, Any]]] = [
        ("gzip", bomb, {"Content_Encoding": "gzip"}),
        ("form", form, {"Content_Type": "application/x-www-form-urlencoded"}),
        (
            "multipart",
            part * (SIZE // len(part)) + b"--x--\r\n",
            {"Content_Type": "multipart/form-data; boundary=x"},
        ),
    ]
    with world.watched(server, notes):
        for what, body, headers in sent:
            reply = post(server.address, CHAT, body, server.keys["mallory"], ANSWER_S, **headers)
            notes.say(f"{what}: {reply}")
            notes.hold(reply.how == "answered" and 400 <= reply.status < 500, f"{what}: {reply}")


add(Check("body/eight-at-once", PROMISE, several))
add(Check("body/other-types", "What is compressed or no JSON is refused and not unpacked.", other_types))
