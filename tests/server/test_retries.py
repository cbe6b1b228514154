"""What a retry with the same Idempotency-Key gets, for every way in which the first try can end, on one
server and on two that share a store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Serving, serving

from pensieve.errors import AnswerLost, StoreUnavailable
from pensieve.server import idempotency
from pensieve.store import INTERRUPTED

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    with serving(store_path=tmp_path / "c.db") as running:
        yield running


def key(name: str) -> dict[str, str]:
    return {"Idempotency-Key": name}


def chat(*contents: str, n: int = 8, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"model": "tiny", "messages": messages, "max_tokens": n, "temperature": 0} | more


def words(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def messages_of(server: Serving, conversation: str) -> list[tuple[str, str]]:
    told = server.client.get(f"/v1/pensieve/conversations/{conversation}").json()
    return [(message["role"], message["content"]) for message in told["messages"]]


def forget_ended(server: Serving) -> None:
    """As after a restart: only the store remembers."""
    turns = server.context.answers
    turns.find = lambda namespace, turn_id: turns.open.get(turn_id)  # type: ignore[method-assign]


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_background(server: Serving, path: str, body: dict[str, Any], name: str) -> Future[httpx.Response]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lambda: httpx.post(server.url + path, json=body, headers=key(name), timeout=60.0))
    pool.shutdown(wait=False)
    return future


def begun(server: Serving) -> str:
    """The turn that is under way, once its draft is in the store."""
    found: list[str] = []

    def drafted() -> bool:
        rows = server.store._read(
            lambda connection: connection.execute("SELECT turn_id FROM drafts").fetchall()
        )
        found[:] = [row[0] for row in rows]
        return bool(found)

    until(drafted)
    return found[0]


# -- whole answers


@pytest.mark.parametrize("how", ["stop", "length"])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_whole_answer_is_the_answer_for_ever(server: Serving, path: str, how: str) -> None:
    if how == "stop":
        server.say("whole")
    body = chat("once") if path == CHAT else {"input": "once", "max_output_tokens": 8, "temperature": 0}
    first = server.post(path, body, **key("k"))
    assert server.post(path, body, **key("k")).json() == first.json()
    forget_ended(server)
    again = server.post(path, body, **key("k"))
    assert again.json() == first.json()  # the usage, the receipt, and which conversation it is in
    assert again.headers.get("x-pensieve-conversation") == first.headers.get("x-pensieve-conversation")
    assert len(server.store.list("default")) == 1


def test_an_answer_that_was_stored_before_a_crash_but_not_told_is_the_answer(tmp_path: Path) -> None:
    """A crash between the commit and the acknowledgement, seen from the store: all is there, the owner is
    dead.
    """
    with serving(store_path=tmp_path / "c.db", owner="dead") as server:
        first = server.post(CHAT, chat("once"), **key("k")).json()
    with serving(store_path=tmp_path / "c.db", owner="next") as server:
        server.store.recover_drafts("dead")
        again = server.post(CHAT, chat("once"), **key("k")).json()
        assert again == first and again["usage"]["completion_tokens"] == 8
        streamed = server.post(CHAT, chat("once", stream=True), **key("k")).text
        assert f'"conversation":"{first["pensieve"]["conversation"]}"' in streamed.replace(": ", ":")


def test_a_chat_that_is_kept_in_memory_only_is_answered_once_too(server: Serving) -> None:
    first = server.post(CHAT, chat("once", store=False), **key("k"))
    forget_ended(server)
    again = server.post(CHAT, chat("once", store=False), **key("k"))
    assert again.json() == first.json() and again.json()["pensieve"]["conversation"].startswith("temp_")


def test_a_response_that_was_cancelled_stays_cancelled(server: Serving) -> None:
    server.worker.pause_s = 0.02
    body = {"input": "long", "max_output_tokens": 200, "background": True}
    first = server.post(RESPONSES, body, **key("k")).json()
    begun(server)
    cancelled = server.client.post(f"{RESPONSES}/{first['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    forget_ended(server)
    again = server.post(RESPONSES, body, **key("k")).json()
    assert (again["id"], again["status"], again["output"]) == (first["id"], "cancelled", cancelled["output"])


# -- fragments


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_an_answer_that_a_crash_cut_short_is_made_anew_once(tmp_path: Path, path: str) -> None:
    """The store as a killed server leaves it: a draft, and a key that stands for it."""
    with serving(store_path=tmp_path / "c.db", owner="dead") as server:
        conversation = server.post("/v1/conversations", {}).json()["id"]
        if path == CHAT:
            body = chat("hello", words(server.post(CHAT, chat("hello"))), "go on", n=60)
        else:
            body = {"input": "go on", "conversation": conversation, "max_output_tokens": 60, "temperature": 0}
        server.worker.pause_s = 0.01
        dying = in_background(server, path, body, "k")
        fragment = begun(server)
        connection = server.store._writer
        connection.call(
            lambda c: c.execute("UPDATE drafts SET owner = 'killed'") and None
        )  # what is left when all else is gone
        connection.call(lambda c: c.execute("UPDATE claims SET owner = 'killed'") and None)
        assert server.store.recover_drafts("killed") == 1
        lost = dying.result(30)
        assert (
            lost.status_code == 503 and lost.json()["error"]["code"] == AnswerLost.code
        )  # its server had only been frozen
        assert lost.headers["retry-after"]
    with serving(store_path=tmp_path / "c.db", owner="next") as server:
        before = server.store.turn("default", fragment)
        assert before.reply_reason == INTERRUPTED
        first = server.post(path, body, **key("k"))
        assert first.status_code == 200 and fragment not in first.text
        told = first.json()
        if path == CHAT:
            assert (
                told["choices"][0]["finish_reason"] == "length" and told["usage"]["completion_tokens"] == 60
            )
            conversation, answer = told["pensieve"]["conversation"], words(first)
        else:
            assert (
                told["incomplete_details"] == {"reason": "max_output_tokens"}
                and told["usage"]["output_tokens"] == 60
            )
            answer = told["output"][0]["content"][0]["text"]
        assert messages_of(server, conversation)[-2:] == [("user", "go on"), ("assistant", answer)]
        assert [role for role, _ in messages_of(server, conversation)] == ["user", "assistant"] * (
            2 if path == CHAT else 1
        )
        forget_ended(server)
        assert server.post(path, body, **key("k")).json() == told
        kept = server.client.get(
            f"{RESPONSES}/resp_{fragment}"
        ).json()  # the fragment is a branch, under its own name
        assert (kept["status"], kept["incomplete_details"]) == ("incomplete", {"reason": "interrupted"})
        assert server.store.turn("default", fragment) == before


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_took_too_long_is_made_anew_and_appended(stream: bool) -> None:
    with serving(config={"request_timeout_s": 0.5, "queue_timeout_s": 0.4}) as server:
        conversation = server.post("/v1/conversations", {}).json()["id"]
        body = {
            "input": "take your time",
            "conversation": conversation,
            "max_output_tokens": 60,
            "temperature": 0,
        }
        server.worker.pause_s = 0.03
        late = server.post(RESPONSES, body | {"stream": stream}, **key("k"))
        assert "request_timeout" in late.text and (late.status_code == 504 or stream)
        server.worker.pause_s = 0.0
        server.until_idle()
        again = server.post(RESPONSES, body, **key("k"))
        assert again.status_code == 200 and again.json()["usage"]["output_tokens"] == 60
        answer = again.json()["output"][0]["content"][0]["text"]
        assert messages_of(server, conversation) == [("user", "take your time"), ("assistant", answer)]
        forget_ended(server)
        assert server.post(RESPONSES, body, **key("k")).json() == again.json()


def test_a_retry_that_comes_while_the_first_try_is_given_up_waits_for_that() -> None:
    with serving(config={"request_timeout_s": 0.3, "queue_timeout_s": 0.25}) as server:
        server.worker.pause_s = 0.4  # the engine hears of the end a step later
        late = server.post(CHAT, chat("slow", n=60), **key("k"))
        assert late.status_code in (503, 504)
        server.worker.pause_s = 0.0
        again = server.post(CHAT, chat("slow", n=60), **key("k"))
        assert again.status_code == 200 and again.json()["usage"]["completion_tokens"] == 60


def test_what_a_shutdown_cuts_short_fails_and_is_not_taken_for_whole(tmp_path: Path) -> None:
    with serving(store_path=tmp_path / "c.db", config={"drain_timeout_s": 0.3}) as server:
        server.worker.pause_s = 0.02
        cut = in_background(server, CHAT, chat("long", n=300), "k")
        begun(server)
        loop = server.context.answers._loop
        loop.call_soon_threadsafe(lambda: loop.create_task(server.context.answers.drain(0.3)))
        answer = cut.result(30)
        assert (
            answer.status_code == 503
            and answer.json()["error"]["code"] == "shutting_down"
            and answer.headers["retry-after"]
        )
    with serving(store_path=tmp_path / "c.db", owner="next") as server:
        again = server.post(CHAT, chat("long", n=300), **key("k"))
        assert again.status_code == 200 and again.json()["usage"]["completion_tokens"] == 300


# -- failures


def test_a_request_that_is_refused_lets_its_key_go_on_every_server(tmp_path: Path) -> None:
    with serving(store_path=tmp_path / "c.db", config={"max_open": 1}, owner="full") as full:
        full.worker.pause_s = 0.02
        first = in_background(full, CHAT, chat("long", n=100), "other")
        begun(full)
        assert full.post(CHAT, chat("short"), **key("k")).status_code == 429
        with serving(store_path=tmp_path / "c.db", owner="free") as free:
            assert words(free.post(CHAT, chat("short"), **key("k")))
        full.worker.pause_s = 0.0
        assert first.result(30).status_code == 200


@pytest.mark.parametrize("conversation_lives", [True, False])
def test_an_answer_whose_conversation_is_deleted_frees_its_key(
    server: Serving, conversation_lives: bool
) -> None:
    conversation = server.post("/v1/conversations", {}).json()["id"]
    body = {"input": "go on", "conversation": conversation, "max_output_tokens": 8, "temperature": 0}
    if conversation_lives:
        server.worker.pause_s = 0.02
        first = in_background(server, RESPONSES, body | {"max_output_tokens": 200}, "k")
        begun(server)
        assert server.client.delete(f"/v1/conversations/{conversation}").json()["deleted"]
        gone = first.result(30)
        assert (
            gone.status_code == 404 and "was deleted" in gone.json()["error"]["message"]
        )  # not a fragment that looks whole
        server.worker.pause_s = 0.0
    else:
        assert server.post(RESPONSES, body, **key("k")).status_code == 200
        assert server.client.delete(f"/v1/conversations/{conversation}").json()["deleted"]
    forget_ended(server)
    retried = server.post(
        RESPONSES, body | ({"max_output_tokens": 200} if conversation_lives else {}), **key("k")
    )
    assert retried.status_code == 404
    assert (
        server.post(CHAT, chat("another request"), **key("k")).status_code == 200
    )  # nothing is left of the key


def test_a_deleted_response_is_not_brought_back_by_its_key(server: Serving) -> None:
    body = {"input": "secret", "max_output_tokens": 8, "temperature": 0}
    first = server.post(RESPONSES, body, **key("k")).json()
    server.post(RESPONSES, {"input": "more", "previous_response_id": first["id"], "max_output_tokens": 4})
    assert server.client.delete(f"{RESPONSES}/{first['id']}").json()["deleted"]
    forget_ended(server)
    assert server.post(RESPONSES, body, **key("k")).json()["id"] != first["id"]


def test_a_store_that_failed_under_the_answer_gets_it_again(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = server.store.append

    def fail(*_: Any, **__: Any) -> Future[Any]:
        failed: Future[Any] = Future()
        failed.set_exception(
            StoreUnavailable(
                "the conversation store failed: database or disk is full; take what was being written as not stored"
            )
        )
        return failed

    monkeypatch.setattr(server.store, "append", fail)
    lost = server.post(CHAT, chat("once"), **key("k"))
    assert (
        lost.status_code == 503
        and lost.json()["error"]["code"] == "store_error"
        and lost.headers["retry-after"]
    )
    monkeypatch.setattr(server.store, "append", append)
    assert words(server.post(CHAT, chat("once"), **key("k")))
    server.until_idle()


def test_an_answer_whose_draft_is_gone_is_not_made_to_its_end(server: Serving) -> None:
    server.worker.pause_s = 0.01
    lost = in_background(server, CHAT, chat("long", n=350), "k")
    begun(server)
    server.store.recover_drafts("test")
    assert lost.result(30).json()["error"]["code"] == "answer_lost"
    server.until_idle()
    stats = server.client.get("/v1/pensieve/map").json()["stats"]
    assert stats["output_tokens"] < 200  # it ended with the next piece of its draft


# -- two servers


def test_a_key_under_way_on_another_server_is_waited_for(tmp_path: Path) -> None:
    with (
        serving(store_path=tmp_path / "c.db", owner="one") as one,
        serving(store_path=tmp_path / "c.db", owner="two") as two,
    ):
        one.worker.pause_s = 0.01
        first = in_background(one, CHAT, chat("once", n=60), "k")
        begun(one)
        with ThreadPoolExecutor(4) as pool:
            answers = list(
                pool.map(
                    lambda _: httpx.post(
                        two.url + CHAT, json=chat("once", n=60), headers=key("k"), timeout=30.0
                    ),
                    range(4),
                )
            )
        assert [answer.json() for answer in answers] == [first.result(30).json()] * 4
        assert len(one.store.list("default")) == 1


def test_a_key_that_another_server_holds_for_long_is_a_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "ELSEWHERE_S", 0.3)
    with (
        serving(store_path=tmp_path / "c.db", owner="one") as one,
        serving(store_path=tmp_path / "c.db", owner="two") as two,
    ):
        one.worker.pause_s = 0.02
        first = in_background(one, CHAT, chat("once", n=100), "k")
        begun(one)
        refused = two.post(CHAT, chat("once", n=100), **key("k"))
        assert (
            refused.status_code == 409
            and "still being answered" in refused.json()["error"]["message"]
            and refused.headers["retry-after"]
        )
        other = two.post(CHAT, chat("another request"), **key("k"))
        assert other.status_code == 422
        one.worker.pause_s = 0.0
        whole = first.result(30).json()
        assert two.post(CHAT, chat("once", n=100), **key("k")).json() == whole


def test_a_key_whose_server_dies_is_answered_by_the_other_that_waits(tmp_path: Path) -> None:
    with serving(store_path=tmp_path / "c.db", owner="two") as two:
        body = chat("once")
        with serving(store_path=tmp_path / "c.db", owner="one") as one:
            one.worker.pause_s = 0.05
            first = in_background(one, CHAT, body, "key")
            fragment = begun(one)
            waiting = in_background(two, CHAT, body, "key")
            time.sleep(0.1)
            assert not waiting.done()
            assert two.store.recover_drafts("one") == 1  # its lease has lapsed
            answer = waiting.result(30)
            assert words(answer) and fragment not in answer.text
            lost = first.result(30)
            assert lost.status_code == 503 and lost.json()["error"]["code"] == "answer_lost"
        two.until_idle()
        assert words(two.post(CHAT, body, **key("key"))) == words(answer)


def test_two_servers_do_not_append_to_one_leaf(tmp_path: Path) -> None:
    with (
        serving(store_path=tmp_path / "c.db", owner="one") as one,
        serving(store_path=tmp_path / "c.db", owner="two") as two,
    ):
        conversation = one.post("/v1/conversations", {}).json()["id"]
        body = {"input": "both", "conversation": conversation, "max_output_tokens": 40, "temperature": 0}
        one.worker.pause_s = two.worker.pause_s = 0.01
        barrier = threading.Barrier(2)

        def ask(server: Serving) -> httpx.Response:
            barrier.wait()
            return server.post(RESPONSES, body)

        with ThreadPoolExecutor(2) as pool:
            statuses = sorted(answer.status_code for answer in pool.map(ask, (one, two)))
        assert statuses == [200, 409]
        assert len(messages_of(one, conversation)) == 2
