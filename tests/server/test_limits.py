"""Bodies that would take a server's time or memory: refused at the first wrong value or at a limit, while
others are answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import text_worker_models as models
from hypothesis import given
from hypothesis import strategies as st
from serving import Serving, serving, tool_server

from pensieve.server import bodies, chat_messages, completion_request
from pensieve.server.bodies import read_json
from pensieve.server.errors import ApiError
from pensieve.service import prompt
from pensieve.text.nursery import Nursery, new_nursery
from pensieve.text.workers import TextWorkers

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ANSWERED_S, OTHERS_S = 5.0, 1.5  # generous: each took minutes, or a second a megabyte


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with tool_server() as running:
        yield running


def filled(unit: str, megabytes: float) -> str:
    """A list of so many bytes with one value again and again."""
    return "[" + (unit + ",") * int(megabytes * 1e6 / (len(unit) + 1)) + unit + "]"


def numbered(unit: str, count: int) -> str:
    return "{" + ",".join(f'"k{i}":{unit}' for i in range(count)) + "}"


def chat(**more: str) -> str:
    """A chat's body; the values are JSON text."""
    fields = {"model": '"tiny"', "messages": '[{"role":"user","content":"hi"}]', "max_tokens": "2"} | more
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def post(server: Serving, path: str, body: str) -> httpx.Response:
    return server.client.post(path, content=body.encode(), headers={"Content-Type": "application/json"})


@contextmanager
def watching(server: Serving) -> Iterator[list[float]]:
    """How long others wait for an answer, the longest first in the list."""
    waits, ended = [0.0], threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not ended.is_set():
                begun = time.perf_counter()
                assert client.get("/health").status_code == 200
                waits[0] = max(waits[0], time.perf_counter() - begun)
                ended.wait(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield waits
    finally:
        ended.set()
        thread.join()


TOO_LARGE = {
    "messages that are numbers": (CHAT, chat(messages=filled("0", 15.8)), "body_too_complex"),
    "messages that are empty": (CHAT, chat(messages=filled("{}", 15)), "body_too_complex"),
    "messages that are empty, within the body's limits": (CHAT, chat(messages=filled("{}", 0.19)), "missing_required_parameter"),
    "messages without end": (CHAT, chat(messages=filled('{"role":"user","content":"a"}', 1.8)), "too_many_messages"),
    "parts that are empty": (CHAT, chat(messages='[{"role":"user","content":' + filled("{}", 2) + "}]"), "body_too_complex"),
    "parts that are empty, within the body's limits": (CHAT, chat(messages='[{"role":"user","content":' + filled("{}", 0.19) + "}]"), "invalid_value"),
    "calls without end": (CHAT, chat(messages='[{"role":"assistant","tool_calls":' + filled("{}", 0.19) + "}]"), "missing_required_parameter"),
    "a prompt of fractions": (COMPLETIONS, f'{{"model":"tiny","prompt":{filled("0.5", 2)}}}', "invalid_value"),
    "a prompt of a million fractions": (COMPLETIONS, f'{{"model":"tiny","prompt":{filled("0.5", 4)}}}', "invalid_value"),
    "a prompt of a million ids": (COMPLETIONS, f'{{"model":"tiny","prompt":{filled("77", 3)}}}', "context_length_exceeded"),
    "prompts without end": (COMPLETIONS, f'{{"model":"tiny","prompt":{filled("[1]", 0.2)}}}', "invalid_value"),
    "input that is empty": (RESPONSES, f'{{"input":{filled("{}", 2)}}}', "body_too_complex"),
    "input that is empty, within the body's limits": (RESPONSES, f'{{"input":{filled("{}", 0.19)}}}', "invalid_value"),
    "tools without end": (CHAT, chat(tools=filled('{"type":"function"}', 1)), "invalid_value"),
    "stop strings without end": (CHAT, chat(stop=filled('"a"', 0.9)), "invalid_value"),
    "a long stop string": (CHAT, chat(stop='"' + "a" * 2000 + '"'), "invalid_value"),
    "a bias for every token": (CHAT, chat(logit_bias=numbered("0", 250_000)), "invalid_value"),
    "metadata without end": (CHAT, chat(metadata=numbered('"0"', 120_000)), "invalid_value"),
    "unknown fields without end": (CHAT, chat(**{f"u{i}": "0" for i in range(200_000)}), "unknown_parameter"),
    "unknown fields of a message": (CHAT, chat(messages="[" + numbered("0", 200_000) + "]"), "unknown_parameter"),
    "one long unknown field": (CHAT, chat(**{"u" * 15_000_000: "0"}), "unknown_parameter"),
    "one field again and again": (CHAT, chat()[:-1] + ',"seed":1' * 1_000_000 + "}", "body_too_complex"),
    "a schema of a million values": (CHAT, chat(response_format='{"type":"json_schema","s":' + filled("0", 2) + "}"), "unsupported_parameter"),
    "brackets without end": (CHAT, "[" * 15_000_000, "body_too_complex"),
    "brackets in each other": (CHAT, "[" * 60_000, "invalid_value"),
    "a number without end": (CHAT, chat(seed="9" * 15_000_000), "invalid_value"),
    "long numbers": (CHAT, chat(seed=filled("9" * 4300, 15)), "invalid_value"),
    "a long role": (CHAT, chat(messages='[{"role":"' + "x" * 15_000_000 + '","content":"a"}]'), "invalid_value"),
    "escapes": (CHAT, chat(model='"' + "\\n" * 7_900_000 + '"'), "model_not_found"),
    "escaped backslashes": (CHAT, chat(model='"' + "\\\\" * 7_900_000 + '"'), "model_not_found"),
    "escaped quotation marks": (CHAT, chat(model='"' + '\\"' * 7_900_000 + '"'), "model_not_found"),
    "texts without end": (CHAT, '["a' * 3_000_000, "body_too_complex"),
    "items without end": ("/v1/conversations", f'{{"items":{filled("{}", 0.19)}}}', "invalid_value"),
    "messages to count": ("/tokenize", f'{{"messages":{filled("{}", 0.19)}}}', "missing_required_parameter"),
    "ids to decode": ("/detokenize", f'{{"tokens":{filled("-1", 3)}}}', "invalid_value"),
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_LARGE)
def test_a_body_is_refused_at_its_first_fault_or_at_a_limit(server: Serving, what: str) -> None:
    path, body, code = TOO_LARGE[what]
    with watching(server) as waits:
        begun = time.perf_counter()
        response = post(server, path, body)
        took_s = time.perf_counter() - begun
    error = response.json()["error"]
    assert 400 <= response.status_code < 500 and error["code"] == code, (
        response.status_code,
        response.text[:300],
    )
    assert len(response.content) < 10_000, "what was sent is not sent back"
    assert took_s < ANSWERED_S and waits[0] < OTHERS_S


def test_four_large_bodies_at_a_time_are_read_one_after_another(server: Serving) -> None:
    body = chat(messages=filled("0", 2))
    with watching(server) as waits, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: post(server, CHAT, body).status_code, range(12)))
    assert answers == [400] * 12 and waits[0] < OTHERS_S


class Never:
    """A runner that never answers."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, job: Any, tenant: str = "") -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


def test_a_request_whose_prompt_is_not_made_in_time_is_refused_and_its_job_ends() -> None:
    never = Never()
    asked = [
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}),
        (RESPONSES, {"input": "hi"}),
        (COMPLETIONS, {"model": "tiny", "prompt": "hi"}),
        ("/tokenize", {"prompt": "hi"}),
        ("/detokenize", {"tokens": [70]}),
    ]
    with tool_server(runner=never, config={"queue_timeout_s": 0.2}) as server:
        for path, body in asked:
            response = server.post(path, body)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout"), path
            assert "Retry-After" in response.headers
        server.until_idle()
        assert len(never.futures) == len(asked) and all(future.cancelled() for future in never.futures)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system's processes cannot fork")
def test_a_model_whose_template_never_ends_fails_its_own_requests_alone() -> None:
    def start() -> Nursery:
        nursery = new_nursery(models.prepare)
        nursery.load(models.hostile)
        return nursery

    runner = TextWorkers(start, job_s=0.5, memory_bytes=256 << 20)
    try:
        with serving(runner=runner) as server, watching(server) as waits:

            def ask(text: str) -> httpx.Response:
                return server.post(
                    CHAT, {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
                )

            with ThreadPoolExecutor(4) as pool:
                hostile = {text[:6]: pool.submit(ask, text) for text in ("loop", "double", "x" * 60_000)}
                others = [ask("hello").status_code for _ in range(5)]
                answers = {name: future.result() for name, future in hostile.items()}
            assert others == [200] * 5 and waits[0] < OTHERS_S
            for name, answer in answers.items():
                assert (answer.status_code, answer.json()["error"]["code"]) == (400, "prompt_too_costly"), (
                    name,
                    answer.text,
                )
            assert ask("hello").status_code == 200
            server.until_idle()
    finally:
        runner.close()


TOO_LONG = {
    "blanks": (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": " " * 15_900_000}]}),
    "instructions": (RESPONSES, {"input": "hi", "instructions": "\t" * 7_000_000}),
    "tools": (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [
        {"type": "function", "function": {"name": f"f{i}", "description": "word " * 20_000}} for i in range(128)]}),
    "a call's arguments": (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[" + "0," * 7_000_000 + "0]"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "x"}]}),
    "a newest message, truncating": (RESPONSES, {"input": " " * 15_900_000, "truncation": "auto"}),
    "a text": (COMPLETIONS, {"model": "tiny", "prompt": "\u3000" * 5_000_000}),
    "a text to count": ("/tokenize", {"prompt": " " * 15_000_000}),
    "messages to count": ("/tokenize", {"messages": [{"role": "user", "content": " " * 3_000}] * 4000}),
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_LONG)
def test_what_cannot_fit_is_refused_by_its_length(server: Serving, what: str) -> None:
    path, body = TOO_LONG[what]
    data = json.dumps(body, ensure_ascii=False)
    with watching(server) as waits:
        begun = time.perf_counter()
        response = post(server, path, data)
        took_s = time.perf_counter() - begun
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded"), (
        response.text[:300]
    )
    assert took_s < ANSWERED_S and waits[0] < OTHERS_S


def test_a_chat_of_as_many_messages_as_may_be_is_truncated(server: Serving) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 380} for i in range(4095)]
    messages[-1]["content"] = "hi"
    with watching(server) as waits:
        begun = time.perf_counter()
        response = server.post(RESPONSES, {"input": messages, "truncation": "auto", "max_output_tokens": 2})
        took_s = time.perf_counter() - begun
    assert response.status_code == 200, response.text[:300]
    assert response.json()["usage"]["input_tokens"] < 400 and took_s < ANSWERED_S and waits[0] < OTHERS_S


def test_schemas_of_too_many_values_are_refused(server: Serving) -> None:
    schema = {"a": [[] for _ in range(100)], "b": list(range(70_000))}
    for path, tool in ((CHAT, {"type": "function", "function": {"name": "f", "parameters": schema}}), (RESPONSES, {"type": "function", "name": "f", "parameters": schema})):  # fmt: skip
        body = (
            {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
            if path == CHAT
            else {"input": "hi"}
        )
        response = server.post(path, body | {"tools": [tool]})
        assert response.status_code == 400 and "65536 values" in response.json()["error"]["message"]


def test_a_conversation_of_items_has_a_longest_length(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "MAX_STORED_CHARS", 100)
    made = server.post("/v1/conversations", {}).json()["id"]
    items = {"items": [{"role": "user", "content": "x" * 40}]}
    assert [server.post(f"/v1/conversations/{made}/items", items).status_code for _ in range(4)] == [
        200,
        200,
        400,
        400,
    ]
    assert (
        server.post("/v1/conversations", {"items": [{"role": "user", "content": "x" * 101}]}).status_code
        == 400
    )


def test_as_many_values_as_may_be_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_VALUES", 6)
    monkeypatch.setattr(bodies, "MAX_STRINGS", 3)
    monkeypatch.setattr(bodies, "MAX_CONTAINERS", 4)
    assert read_json(b'{"a":[1,2,3,4],"b":",,,,[[[["}') == {"a": [1, 2, 3, 4], "b": ",,,,[[[["}
    for body in (b'{"a":[1,2,3,4,5,6],"b":1}', b'["","","",""]', b"[[],[],[],[]]"):
        with pytest.raises(ApiError) as refused:
            read_json(body)
        assert refused.value.api_code == "body_too_complex"


def test_a_hundred_levels_are_taken() -> None:
    assert read_json(b"[" * 100 + b"]" * 100)
    assert read_json(b"[" + b"[[]]," * 200 + b"1]")
    with pytest.raises(ApiError, match="nested more than 100 deep"):
        read_json(b"[" * 101 + b"]" * 101)


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[1,Infinity]",
        '{"a":[-Infinity]}',
        "1e999",
        '{"a":{"b":[-1e999,"x"]}}',
        "[true,1E400]",
        "1" * 309,
    ],
)
def test_numbers_are_finite(text: str) -> None:
    with pytest.raises(ApiError) as refused:
        read_json(text.encode())
    assert refused.value.api_code in ("invalid_value", "invalid_json")


@pytest.mark.parametrize(
    "text", ["[1e5,true,false,null]", '"1e999 NaN Infinity"', '{"e":"E","true":1.5e-3}', "9" * 308]
)
def test_what_looks_infinite_and_is_not_is_taken(text: str) -> None:
    assert read_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    "body", [b'"\xff"', '"ä"'.encode("utf-16"), b'"\xed\xa0\x80"', b"{", b"", b"[1,]", b'"\n"']
)
def test_what_is_no_json_is_named(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        read_json(body)
    assert refused.value.api_code == "invalid_json"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('"\\a,[{é😀\n'),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('"\\b:]', max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(VALUES, st.booleans(), st.integers(1, 9))
def test_a_body_is_read_as_json_wherever_it_is_cut(value: Any, ascii_only: bool, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "PIECE_BYTES", piece)
        body = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert read_json(body) == value
        assert asyncio.run(bodies._read_large(body, asyncio.Lock())) == value


@given(VALUES, st.integers(1, 9))
def test_what_is_counted_is_what_is_there(value: Any, piece: int) -> None:
    def texts(value: Any) -> int:
        if isinstance(value, dict):
            return sum(1 + texts(item) for item in value.values())
        return sum(map(texts, value)) if isinstance(value, list) else int(isinstance(value, str))

    def containers(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + sum(map(containers, inner))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "PIECE_BYTES", piece)
        count = bodies._Count()
        for _ in count.take(json.dumps(value).encode()):
            pass
    assert (count._strings, count._containers, count._depth) == (2 * texts(value), containers(value), 0)


def test_limits_leave_room_for_what_is_served() -> None:
    """The longest chat with the most parts, and a prompt of a million ids, pass the count of values."""
    longest = [
        {"role": "user", "content": [{"type": "text", "text": "word, word"}] * 4}
    ] * chat_messages.MAX_MESSAGES
    assert read_json(json.dumps({"model": "m", "messages": longest}).encode())["messages"] == longest
    ids = list(range(completion_request.MAX_IDS))
    assert read_json(json.dumps({"model": "m", "prompt": ids}).encode())["prompt"] == ids
