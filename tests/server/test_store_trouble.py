"""A server whose store fails, is lost, holds erasures up or has conversations to expire: what clients and
/ready are told, and how it ends.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from serving import Serving, serving

from pensieve.server import sweeper
from pensieve.store.schema import connect

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def swept_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "SWEEP_S", 0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "private-folder").mkdir()
    return tmp_path / "private-folder" / "c.db"


@pytest.fixture
def server(path: Path) -> Iterator[Serving]:
    with serving(store_path=path) as running:
        yield running


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def own(conversation: str, what: str = "") -> str:
    return f"/v1/pensieve/conversations/{conversation}" + (f"/{what}" if what else "")


def body(text: str, n: int = 8) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": n,
        "temperature": 0,
    }


def ready(server: Serving) -> tuple[int, dict[str, str]]:
    told = server.client.get("/ready")
    return told.status_code, told.json().get("troubles", {})


def set_room(server: Serving, pages: int) -> None:
    server.store._writer.call(
        lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchone(), alone=True
    )


# -- a store that cannot be written to


def test_a_full_disk_makes_the_server_unready_until_there_is_room(server: Serving, path: Path) -> None:
    server.ask("before")
    assert ready(server) == (200, {})
    set_room(server, 1)  # (as many pages as there are)
    failed = server.post(CHAT, body("much " * 60, 100), **{"Idempotency-Key": "k"})
    deadline = time.monotonic() + 10
    while failed.status_code == 200:  # there was room in the last pages
        failed = server.post(CHAT, body("much " * 60, 100), **{"Idempotency-Key": f"k{time.monotonic()}"})
        assert time.monotonic() < deadline
    assert (
        failed.status_code == 503
        and failed.json()["error"]["code"] == "store_error"
        and failed.headers["retry-after"]
    )
    assert "disk is full" in failed.text and "private-folder" not in failed.text
    status, troubles = ready(server)
    assert status == 503 and "disk is full" in troubles["store"] and "private-folder" not in troubles["store"]
    set_room(server, 1 << 30)
    until(lambda: ready(server) == (200, {}))
    assert server.post(CHAT, body("much " * 60, 100), **{"Idempotency-Key": "k"}).status_code == 200
    server.until_idle()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_store_file_that_is_lost_takes_no_more_turns(server: Serving, path: Path, how: str) -> None:
    conversation = server.ask("before")["pensieve"]["conversation"]
    if how == "deleted":
        for file in path.parent.iterdir():
            file.unlink()
    else:
        shutil.copy(path, path.with_name("copy"))
        path.with_name("copy").replace(path)
    for answer in (
        server.post(CHAT, body("after")),
        server.post("/v1/conversations", {}),
        server.client.get("/v1/pensieve/conversations"),
        server.client.get(own(conversation)),
        server.client.delete(own(conversation)),
    ):
        assert (
            answer.status_code == 503
            and answer.json()["error"]["code"] == "store_error"
            and answer.headers["retry-after"]
        ), answer.text
        assert "while it was open" in answer.text and "private-folder" not in answer.text
    status, troubles = ready(server)
    assert status == 503 and "while it was open" in troubles["store"]
    if how == "deleted":
        assert (
            list(path.parent.iterdir()) == []
        )  # reading made no file that the next start would take for a store
    time.sleep(0.5)
    assert ready(server)[0] == 503  # it does not pass by itself


def test_a_store_that_is_moved_back_is_taken_up_again(server: Serving, path: Path) -> None:
    first = server.ask("before")
    path.parent.rename(path.parent.with_name("elsewhere"))
    assert server.post(CHAT, body("between")).status_code == 503
    path.parent.with_name("elsewhere").rename(path.parent)
    until(lambda: ready(server) == (200, {}))
    server.ask("before", first["choices"][0]["message"]["content"], "after")
    assert len(server.client.get(own(first["pensieve"]["conversation"])).json()["messages"]) == 4


def test_a_damaged_conversation_is_refused_and_no_other(server: Serving) -> None:
    damaged, whole = server.ask("damaged"), server.ask("whole")
    server.store._writer.call(
        lambda connection: (
            connection.execute(
                "UPDATE turns SET token_ids = zeroblob(length(token_ids)) WHERE messages LIKE '%damaged%'"
            )
            and None
        )
    )
    server.context.service._prompts.forget("default")  # as after a restart
    refused = server.client.get(own(damaged["pensieve"]["conversation"]))
    assert (
        refused.status_code == 500
        and "is not what was written" in refused.text
        and "retry-after" not in refused.headers
    )
    going_on = body("damaged")
    going_on["messages"] += [
        {"role": "assistant", "content": damaged["choices"][0]["message"]["content"]},
        {"role": "user", "content": "on"},
    ]
    assert server.post(CHAT, going_on).status_code == 500
    server.ask("whole", whole["choices"][0]["message"]["content"], "on")
    assert server.client.get(own(whole["pensieve"]["conversation"])).status_code == 200
    assert ready(server) == (200, {})
    assert server.client.delete(own(damaged["pensieve"]["conversation"])).status_code == 200


# -- erasing


def test_an_erasure_that_a_reader_holds_up_is_completed_when_it_has_gone(server: Serving, path: Path) -> None:
    def remains() -> bool:
        return any(b"xylophone-quagga" in file.read_bytes() for file in path.parent.iterdir())

    def pending() -> str:
        (line,) = [
            line
            for line in server.client.get("/metrics").text.splitlines()
            if line.startswith("pensieve_erasures_pending")
        ]
        return line.split()[1]

    server.store._busy_timeout_s = 0.2
    conversation = server.ask("the word is xylophone-quagga")["pensieve"]["conversation"]
    reader = connect(path, 1, read_only=True)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM turns").fetchone()
    erased = server.client.delete(own(conversation)).json()
    assert erased["deleted"] and not erased["complete"]
    assert server.client.get(own(conversation)).status_code == 404 and remains()
    until(lambda: pending() == "1.0")
    reader.execute("ROLLBACK")
    reader.close()
    until(lambda: not remains())
    until(lambda: pending() == "0.0")


def test_an_expired_conversation_is_overwritten_too(server: Serving, path: Path) -> None:
    conversation = server.ask("the word is xylophone-quagga")["pensieve"]["conversation"]
    server.post(own(conversation, "ttl"), {"seconds": 0.01})
    until(lambda: server.client.get(own(conversation)).status_code == 404)
    until(lambda: not any(b"xylophone-quagga" in file.read_bytes() for file in path.parent.iterdir()))
    until(lambda: server.store.erasures() == 0)


def test_a_deletion_that_hangs_holds_no_other(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "DELETE_S", 0.2)
    monkeypatch.setattr(sweeper, "MAX_SWEPT", 3)
    stuck, free = (server.post("/v1/conversations", {}).json()["id"] for _ in range(2))
    erase, hung = server.context.service.erase, Future[Any]()

    def hanging(id: str, **more: Any) -> Any:
        return hung if id == stuck else erase(id, **more)

    monkeypatch.setattr(server.context.service, "erase", hanging)
    server.post(own(stuck, "ttl"), {"seconds": 0.01})
    time.sleep(0.3)
    server.post(own(free, "ttl"), {"seconds": 0.01})
    until(lambda: server.client.get(own(free)).status_code == 404)
    assert server.client.get(own(stuck)).status_code == 200
    more = [
        server.post("/v1/conversations", {}).json()["id"] for _ in range(8)
    ]  # more than are deleted at a time
    for conversation in more:
        server.post(own(conversation, "ttl"), {"seconds": 0.01})
    until(lambda: all(server.client.get(own(conversation)).status_code == 404 for conversation in more))
    hung.set_result(None)


# -- time to live


def test_a_conversation_lives_while_it_is_used(server: Serving) -> None:
    conversation = server.post("/v1/conversations", {}).json()["id"]
    told = server.post(own(conversation, "ttl"), {"seconds": 1.0}).json()
    assert told["ttl_seconds"] == 1.0 and abs(told["expires_at"] - time.time() - 1.0) < 0.5
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < 2.5:
        answer = server.post(
            "/v1/responses", {"input": "still here", "conversation": conversation, "max_output_tokens": 2}
        )
        assert answer.status_code == 200, answer.text
        time.sleep(0.2)
    shown = server.client.get(own(conversation)).json()
    assert shown["ttl_seconds"] == 1.0 and shown["expires_at"] > time.time()
    until(lambda: server.client.get(own(conversation)).status_code == 404)


def test_a_turn_under_way_holds_its_conversation(server: Serving) -> None:
    conversation = server.post("/v1/conversations", {}).json()["id"]
    server.post("/v1/responses", {"input": "hi", "conversation": conversation, "max_output_tokens": 2})
    server.post(own(conversation, "ttl"), {"seconds": 0.5})
    server.worker.pause_s = 0.05
    long = server.post(
        "/v1/responses", {"input": "take your time", "conversation": conversation, "max_output_tokens": 40}
    )
    assert long.status_code == 200 and long.json()["usage"]["output_tokens"] == 40  # two seconds
    until(lambda: server.client.get(own(conversation)).status_code == 404)


def test_a_turn_that_waits_for_its_first_token_holds_its_conversation(server: Serving) -> None:
    conversation = server.post("/v1/conversations", {}).json()["id"]
    server.post("/v1/responses", {"input": "hi", "conversation": conversation, "max_output_tokens": 2})
    server.worker.pause_s = 1.5
    waiting: list[int] = []
    request = {"input": "slow", "conversation": conversation, "max_output_tokens": 1}
    thread = threading.Thread(
        target=lambda: waiting.append(server.post("/v1/responses", request).status_code)
    )
    server.post(own(conversation, "ttl"), {"seconds": 0.3})
    thread.start()
    thread.join(30)
    assert waiting == [200]
    server.worker.pause_s = 0.0


def test_a_chat_in_memory_lives_an_hour_after_its_last_turn(server: Serving) -> None:
    first = server.ask("in memory", store=False)
    conversation = first["pensieve"]["conversation"]
    ephemeral = server.context.service.stores.ephemeral
    assert ephemeral is not None
    before = ephemeral.get("default", conversation)
    assert before.ttl_s == 3600.0 and before.expires_s is not None
    server.ask("in memory", first["choices"][0]["message"]["content"], "more", store=False)
    after = ephemeral.get("default", conversation)
    assert after.expires_s is not None and before.expires_s < after.expires_s <= time.time() + 3600.0
