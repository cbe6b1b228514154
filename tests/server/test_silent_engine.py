"""An engine that does not answer: every limit of time holds by the server's own clock, and what is deleted is
deleted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest
from serving import Serving, serving

from pensieve.core.plan import StepPlan, StepResult
from pensieve.service.turn_runner import TurnRunner

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
LIMITS = {
    "queue_timeout_s": 0.5,
    "request_timeout_s": 1.0,
    "operation_timeout_s": 0.5,
    "drain_timeout_s": 0.5,
}
SOON_S = 5.0  # far beyond every limit above, on a machine with other work


class Hold:
    """Stops a server's worker in the middle of its steps."""

    def __init__(self, server: Serving) -> None:
        self._go_on = threading.Event()
        self._go_on.set()
        run = server.worker.run

        def held(plan: StepPlan) -> StepResult:
            assert self._go_on.wait(60)
            return run(plan)

        server.worker.run = held  # type: ignore[method-assign]

    def stop(self, server: Serving) -> None:
        self._go_on.clear()
        # the loop goes into a step that does not end
        server.context.service.engine.warm("unknown", namespace="unknown")
        time.sleep(0.05)

    def release(self) -> None:
        self._go_on.set()


@contextmanager
def holding(**config: Any) -> Iterator[tuple[Serving, Hold]]:
    with serving(config=LIMITS | config) as server:
        hold = Hold(server)
        try:
            yield server, hold
        finally:
            hold.release()


def body(content: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
    } | more


def soon(request: Callable[[], httpx.Response]) -> httpx.Response:
    began_s = time.monotonic()
    response = request()
    assert time.monotonic() - began_s < SOON_S
    return response


def until(what: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_turns_end_when_their_time_is_up_whatever_the_engine_does() -> None:
    with holding() as (server, hold):
        hold.stop(server)
        queued = soon(lambda: server.post(CHAT, body("nothing comes")))
        assert code(queued) == (503, "queue_timeout") and queued.headers["retry-after"]
        streamed = soon(
            lambda: server.post(RESPONSES, {"model": "tiny", "input": "nothing either", "stream": True})
        )
        assert code(streamed) == (503, "queue_timeout")
        assert len(server.context.answers.open) == 2  # the engine has them still
        hold.release()
        server.until_idle()
        assert server.ask("and now")["usage"]["completion_tokens"] == 8


def test_a_stream_under_way_ends_with_an_error_when_the_engine_stops_in_the_middle() -> None:
    with holding(queue_timeout_s=30.0, request_timeout_s=1.5) as (server, hold):
        server.worker.pause_s = 0.02
        with server.client.stream("POST", CHAT, json=body("go on", max_tokens=300, stream=True)) as response:
            lines = response.iter_lines()
            while '"content":' not in next(lines):
                pass
            hold.stop(server)
            began_s = time.monotonic()
            rest = "\n".join(lines)
            assert time.monotonic() - began_s < SOON_S
        assert '"request_timeout"' in rest and "[DONE]" not in rest
        hold.release()
        server.until_idle()


OPERATIONS = (
    ("GET", "/v1/pensieve/map"),
    ("GET", "/v1/pensieve/conversations"),
    ("GET", "/v1/pensieve/conversations/{}"),
    ("POST", "/v1/pensieve/conversations/{}/warm"),
    ("POST", "/v1/pensieve/conversations/{}/idle"),
    ("POST", "/v1/pensieve/conversations/{}/pin"),
    ("POST", "/v1/pensieve/conversations/{}/unpin"),
    ("POST", "/v1/pensieve/check"),
)


def test_operations_end_when_their_time_is_up() -> None:
    with holding() as (server, hold):
        conversation = server.ask("hello")["pensieve"]["conversation"]
        hold.stop(server)
        for method, path in OPERATIONS:
            response = soon(partial(server.client.request, method, path.format(conversation)))
            assert code(response) == (503, "engine_timeout") and response.headers["retry-after"], path
        assert soon(lambda: server.client.get("/metrics")).status_code == 200
        hold.release()
        for method, path in OPERATIONS:
            assert server.client.request(method, path.format(conversation)).status_code == 200, path


def test_a_conversation_is_deleted_though_the_engine_does_not_answer_and_its_kv_goes_later() -> None:
    with holding() as (server, hold):
        conversation = server.ask("a secret")["pensieve"]["conversation"]
        hold.stop(server)
        response = soon(lambda: server.client.delete(f"/v1/conversations/{conversation}"))
        assert response.status_code == 200 and response.json()["deleted"]
        assert (
            response.json()["turns"] == 1
            and not response.json()["complete"]
            and response.json()["kv_bytes"] == 0
        )
        assert soon(lambda: server.client.get(f"/v1/conversations/{conversation}")).status_code == 404
        hold.release()
        server.until_idle()
        assert conversation not in [row["id"] for row in server.client.get("/v1/pensieve/map").json()["rows"]]


def test_a_conversation_is_deleted_with_a_turn_under_way_that_the_engine_does_not_end() -> None:
    with holding(queue_timeout_s=30.0, request_timeout_s=30.0) as (server, hold):
        made = server.post("/v1/conversations", {}).json()["id"]
        server.worker.pause_s = 0.02
        answers: list[httpx.Response] = []
        asking = {"model": "tiny", "conversation": made, "input": "a secret", "max_output_tokens": 200}
        thread = threading.Thread(target=lambda: answers.append(server.post(RESPONSES, asking)))
        thread.start()
        until(lambda: any(answer.num_pieces for answer in server.context.answers.open.values()))
        hold.stop(server)
        response = soon(lambda: server.client.delete(f"/v1/conversations/{made}"))
        assert response.status_code == 200 and not response.json()["complete"]
        thread.join(SOON_S)
        assert code(answers[0]) == (404, "conversation_not_found")
        assert not server.context.answers.open  # it is no longer owned
        hold.release()
        server.until_idle()
        assert soon(lambda: server.client.get(f"/v1/conversations/{made}")).status_code == 404


def test_what_an_unknown_conversation_is_cannot_be_said_by_a_silent_engine() -> None:
    with holding() as (server, hold):
        hold.stop(server)
        assert code(soon(lambda: server.client.delete("/v1/conversations/conv_x"))) == (503, "engine_timeout")
        hold.release()
        assert server.client.delete("/v1/conversations/conv_x").status_code == 404


def test_a_key_whose_first_try_ran_out_of_time_is_answered_once_and_anew() -> None:
    with holding() as (server, hold):
        server.worker.pause_s = 0.05
        key = {"Idempotency-Key": "once"}
        asking = body("only once", max_tokens=100)
        late = soon(lambda: server.post(CHAT, asking, **key))
        assert code(late) == (504, "request_timeout")  # it had said something by then
        server.until_idle()
        conversations = server.client.get("/v1/pensieve/conversations").json()["data"]
        assert conversations == []  # what was told as failed is stored nowhere
        hold.stop(server)
        late = soon(lambda: server.post(CHAT, asking, **key))
        assert code(late) == (503, "queue_timeout")
        still = soon(
            lambda: server.post(CHAT, asking, **key)
        )  # it is not known yet what became of the try before
        assert code(still) == (409, "conflict") and still.headers["retry-after"]
        hold.release()
        server.until_idle()
        server.worker.pause_s = 0.0
        done = server.post(CHAT, asking, **key)
        assert done.status_code == 200 and done.json()["usage"]["completion_tokens"] == 100
        again = server.post(CHAT, asking, **key)
        assert again.json()["id"] == done.json()["id"]
        assert len(server.client.get("/v1/pensieve/conversations").json()["data"]) == 1


def test_a_turn_that_is_stored_when_its_time_is_up_is_what_a_retry_gets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with holding(request_timeout_s=1.0) as (server, _):
        stored = threading.Event()
        acknowledge = TurnRunner._acknowledge

        def late(self: TurnRunner, *arguments: Any) -> None:
            if not stored.is_set():
                stored.set()
                time.sleep(2.0)  # whole and durable, but its client hears nothing in time
            acknowledge(self, *arguments)

        monkeypatch.setattr(TurnRunner, "_acknowledge", late)
        first = server.post(CHAT, body("slow to say"), **{"Idempotency-Key": "k"})
        assert code(first) == (504, "request_timeout") and stored.is_set()
        server.until_idle()
        second = server.post(CHAT, body("slow to say"), **{"Idempotency-Key": "k"})
        assert second.status_code == 200 and second.json()["usage"]["completion_tokens"] == 8
        assert len(server.client.get("/v1/pensieve/conversations").json()["data"]) == 1


def test_a_drain_ends_in_time_with_words_though_the_engine_says_nothing() -> None:
    import asyncio

    with holding(queue_timeout_s=60.0, request_timeout_s=60.0) as (server, hold):
        hold.stop(server)
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.post(CHAT, body("last words"))))
        thread.start()
        until(lambda: bool(server.context.answers.open))
        loop = server.context.answers._loop
        began_s = time.monotonic()
        asyncio.run_coroutine_threadsafe(server.context.answers.drain(0.5), loop).result(SOON_S)
        thread.join(SOON_S)
        assert time.monotonic() - began_s < SOON_S
        assert code(answers[0]) == (503, "shutting_down")
        hold.release()


def test_a_response_that_cannot_be_cancelled_now_says_so() -> None:
    with holding(queue_timeout_s=30.0, request_timeout_s=30.0) as (server, hold):
        hold.stop(server)
        made = server.post(RESPONSES, {"model": "tiny", "input": "later", "background": True}).json()["id"]
        assert code(soon(lambda: server.client.post(f"{RESPONSES}/{made}/cancel"))) == (503, "engine_timeout")
        hold.release()
        until(lambda: server.client.get(f"{RESPONSES}/{made}").json()["status"] == "cancelled")
