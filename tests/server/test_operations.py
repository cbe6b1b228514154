"""Our own API, limits, keys, and what operators ask."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import CHUNK, Serving, serving

from pensieve.errors import ConfigError
from pensieve.server.keys import KeyFile, digest_of, key_line, new_key


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def _as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running: Serving = request.getfixturevalue("server")
        running.worker.pause_s = 0.0
        running.until_idle()


def own(conversation: str, action: str = "") -> str:
    return f"/v1/pensieve/conversations/{conversation}" + (f"/{action}" if action else "")


# -- where things are


def test_the_map_shows_every_conversation_s_chunks(server: Serving) -> None:
    body = server.ask("map this conversation", n=20)
    conversation = body["pensieve"]["conversation"]
    shown = server.client.get("/v1/pensieve/map").json()
    row = next(row for row in shown["rows"] if row["id"] == conversation)
    assert row["title"] == "map this conversation" and not row["pinned"] and row["active"] == 0
    assert len(row["cells"]) == -(-(body["usage"]["total_tokens"] - 1) // CHUNK) and set(
        row["cells"].lower()
    ) <= set("gbc")
    assert row["resume_ms"] == 0.0  # all of it is where it is needed
    assert shown["chunk_tokens"] == CHUNK and [tier["name"] for tier in shown["tiers"]] == ["gpu", "cpu"]
    assert all(tier["used"] + tier["free"] == tier["num_slots"] for tier in shown["tiers"])
    assert sum(shown["stats"]["hit_rates"].values()) == pytest.approx(1.0)
    listed = server.client.get("/v1/pensieve/conversations").json()
    assert listed["total"] >= 1 and next(one for one in listed["data"] if one["id"] == conversation)["cells"]
    one = server.client.get(own(conversation)).json()
    assert [message["role"] for message in one["messages"]] == ["user", "assistant"]


def test_pins_keep_under_pressure_and_have_a_budget() -> None:
    with serving(slots=(40, 20)) as server:
        small = server.ask("pin me", n=10)["pensieve"]["conversation"]
        assert server.post(own(small, "pin"), {}).json()["pinned"]
        for number in range(30):
            server.ask(f"pressure from number {number}", n=20)
        row = next(row for row in server.client.get("/v1/pensieve/map").json()["rows"] if row["id"] == small)
        assert row["pinned"] and "." not in row["cells"]
        big = server.ask("a long story " * 20, n=20)["pensieve"]["conversation"]
        refused = server.post(own(big, "pin"), {})
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "keep_refused"
        server.post(own(small, "unpin"), {})
        assert not server.client.get(own(small)).json()["pinned"]
        server.until_idle()


def test_misses_say_what_was_swapped_and_which_conversation_chunks_were_dropped_for() -> None:
    with serving(slots=(34, 6)) as server:
        first = server.ask("the one that will be forgotten " * 3, n=10)
        for number in range(12):
            last = server.ask(f"somebody else with a longer text, number {number}", n=20)
        text = first["choices"][0]["message"]["content"]
        back = server.ask("the one that will be forgotten " * 3, text, "back", n=4)
        why = {miss["why"]: miss for miss in back["pensieve"]["misses"]}
        assert "dropped" in why
        resting = [
            row
            for row in server.client.get("/v1/pensieve/map").json()["rows"]
            if set(row["cells"].lower()) & set(".c")
        ]
        assert resting and all(row["resume_ms"] > 0 for row in resting)
        assert abs(why["dropped"]["at"] - time.time()) < 60
        assert why["dropped"]["by"].startswith("chat_") and last["pensieve"]["conversation"].startswith(
            "chat_"
        )
        server.until_idle()


def test_warm_and_idle_move_chunks() -> None:
    with serving(slots=(30, 60)) as server:
        body = server.ask("warm me up please " * 6, n=10)
        conversation = body["pensieve"]["conversation"]
        assert server.post(own(conversation, "idle"), {}).json()["chunks"] > 0
        for number in range(6):
            server.ask(f"others come and go {number} " * 4, n=10)

        def below() -> int:
            rows = server.client.get("/v1/pensieve/map").json()["rows"]
            return sum(
                cell == "c" for cell in next(row["cells"] for row in rows if row["id"] == conversation)
            )

        before = below()
        assert before > 0
        assert server.post(own(conversation, "warm"), {}).json()["chunks"] == before
        deadline = time.monotonic() + 5
        while below() >= before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert below() < before  # as far as there is room that no request needs
        server.until_idle()


def test_forks_share_and_ttls_delete(server: Serving) -> None:
    conversation = server.ask("fork me", n=20)["pensieve"]["conversation"]
    forked = server.post(own(conversation, "fork"), {}).json()
    assert forked["id"] != conversation
    answer = server.post(
        "/v1/responses",
        {"model": "tiny", "input": "in the fork", "conversation": forked["id"], "max_output_tokens": 4},
    ).json()
    assert answer["usage"]["input_tokens_details"]["cached_tokens"] > 0
    soon = server.post(own(forked["id"], "ttl"), {"seconds": 0.05}).json()
    assert soon["expires_at"] is not None
    deadline = time.monotonic() + 15
    while server.client.get(own(forked["id"])).status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.client.get(own(conversation)).status_code == 200


def test_deleting_erases_and_reports(server: Serving, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with serving(store_path=path) as apart:
        conversation = apart.ask("the word is xylophone-quagga", n=12)["pensieve"]["conversation"]
        erased = apart.client.delete(own(conversation)).json()
        assert (
            erased["kv_bytes"] >= 1000
            and erased["store_bytes"] > 0
            and erased["turns"] == 1
            and erased["complete"]
        )
        assert apart.client.get("/v1/pensieve/map").json()["rows"] == []
        for file in tmp_path.iterdir():
            assert b"xylophone" not in file.read_bytes()
        apart.until_idle()


# -- operators


def test_models_tokens_health_and_metrics(server: Serving) -> None:
    server.ask("count me")
    get = server.client.get
    assert get("/v1/models").json()["data"][0]["id"] == "tiny" and get("/v1/models/tiny").status_code == 200
    assert get("/v1/models/other").status_code == 404
    tokens = server.post("/tokenize", {"prompt": "Hello there, how are you"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert (
        server.post("/detokenize", {"tokens": tokens["tokens"]}).json()["prompt"]
        == "Hello there, how are you"
    )
    assert server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()["count"] > 2
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/detokenize", {"tokens": [99_999_999]}).status_code == 400
    assert get("/health").json() == {"status": "ok"} and get("/ready").status_code == 200
    server.state.state = "restarting"
    assert get("/ready").status_code == 503
    server.state.state = "ready"
    text = get("/metrics").text
    for name in (
        'pensieve_tokens_total{source="new"}',
        'pensieve_tier_slots{state="free",tier="gpu"}',
        "pensieve_time_to_first_token_seconds_bucket",
        'pensieve_requests_total{endpoint="/v1/chat/completions",status="200"}',
        "process_resident_memory_bytes",
        'pensieve_engine_requests{state="running"}',
    ):
        assert name in text, name
    assert get("/openapi.json").json()["info"]["title"] == "Pensieve"
    page = get("/")
    assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]
    assert get("/static/../server.py").status_code == 404 and get("/static/%2e%2e/app.py").status_code == 404


def test_text_completions(server: Serving) -> None:
    body = {"model": "tiny", "prompt": "Once upon", "max_tokens": 6, "temperature": 0}
    whole = server.post("/v1/completions", body).json()
    assert whole["object"] == "text_completion" and whole["usage"]["completion_tokens"] == 6
    stream = server.post(
        "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
    )
    chunks = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line.startswith("data: {")]
    assert (
        "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
        == whole["choices"][0]["text"]
    )
    echoed = server.post("/v1/completions", body | {"echo": True, "logprobs": 0}).json()["choices"][0]
    assert (
        echoed["text"] == "Once upon" + whole["choices"][0]["text"] and len(echoed["logprobs"]["tokens"]) == 6
    )
    by_ids = server.post(
        "/v1/completions",
        body | {"prompt": server.post("/tokenize", {"prompt": "Once upon"}).json()["tokens"]},
    ).json()
    assert by_ids["choices"][0]["text"] == whole["choices"][0]["text"]
    for wrong in ({"prompt": ["a", "b"]}, {"prompt": ""}, {"suffix": "x"}, {"best_of": 2}, {"prompt": [-5]}):
        assert server.post("/v1/completions", body | wrong).status_code == 400


# -- limits


def test_a_full_queue_says_when_to_come_back() -> None:
    with serving(config={"max_open": 3}) as server:
        server.worker.pause_s = 0.03
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "busy"}],
            "max_tokens": 50,
            "temperature": 0,
        }
        statuses: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(server.post("/v1/chat/completions", body)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [response for response in statuses if response.status_code == 429]
        assert refused and len(refused) + sum(response.status_code == 200 for response in statuses) == 8
        assert all(
            int(response.headers["retry-after"]) > 0 and response.json()["error"]["code"] == "overloaded"
            for response in refused
        )
        server.until_idle()


def test_bodies_messages_and_tokens_have_limits() -> None:
    with serving(config={"max_body_bytes": 2000, "max_messages": 5}) as server:
        large = server.post(
            "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x" * 3000}]}
        )
        assert large.status_code == 413 and "2000" in large.json()["error"]["message"]

        def endless() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * 1000

        chunked = server.client.post(
            "/v1/chat/completions", content=endless(), headers={"content-type": "application/json"}
        )
        assert chunked.status_code == 413
        many = server.post(
            "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}] * 6}
        )
        assert many.status_code == 400 and many.json()["error"]["code"] == "too_many_messages"
        server.until_idle()


def test_requests_time_out() -> None:
    with serving(config={"request_timeout_s": 0.4, "queue_timeout_s": 0.3}) as server:
        server.worker.pause_s = 0.05
        slow = server.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 300},
        )
        assert slow.status_code == 504 and slow.json()["error"]["code"] == "request_timeout"
        stream = server.post(
            "/v1/chat/completions",
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": "y"}],
                "max_tokens": 300,
                "stream": True,
            },
        )
        assert '"request_timeout"' in stream.text and "[DONE]" not in stream.text
        server.worker.pause_s = 0.5
        queued = server.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "z"}], "max_tokens": 3},
        )
        assert queued.status_code == 503 and queued.json()["error"]["code"] == "queue_timeout"
        server.worker.pause_s = 0.0
        server.until_idle()


def test_a_client_that_stops_reading_is_cut_off_and_costs_no_more_than_its_answer() -> None:
    with serving(config={"stall_timeout_s": 0.5}, max_context=4000, slots=(600, 64)) as server:
        server.worker.pause_s = 0.001
        port = int(server.url.rpartition(":")[2])
        body = json.dumps(
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": "stall"}],
                "max_tokens": 3000,
                "temperature": 0,
                "stream": True,
            }
        ).encode()
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            raw.connect(("127.0.0.1", port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            while not server.context.answers.open:
                time.sleep(0.001)
            server.until_idle(
                60
            )  # either it fitted into the buffers, or it was cut off: in no case does it hang
        server.worker.pause_s = 0.0


def test_a_turn_that_waits_behind_another_ends_at_once_when_its_client_leaves(server: Serving) -> None:
    made = server.post("/v1/conversations", {}).json()["id"]
    server.worker.pause_s = 0.02
    body = {"model": "tiny", "conversation": made, "max_output_tokens": 100, "temperature": 0}
    first = threading.Thread(target=lambda: server.post("/v1/responses", body | {"input": "a long one"}))
    first.start()
    while not server.context.answers.open:
        time.sleep(0.005)
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/responses", json=body | {"input": "never mind"}, timeout=0.2)
    deadline = time.monotonic() + 1
    while len(server.context.answers.open) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.context.answers.open) == 1  # the first goes on
    first.join()


def test_draining_lets_answers_end_and_takes_no_new_ones() -> None:
    with serving() as server:
        server.worker.pause_s = 0.02
        answers: list[httpx.Response] = []
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "last words"}],
            "max_tokens": 20,
            "temperature": 0,
        }
        thread = threading.Thread(target=lambda: answers.append(server.post("/v1/chat/completions", body)))
        thread.start()
        while not server.context.answers.open:
            time.sleep(0.005)
        server.context.answers.draining = True
        refused = server.post("/v1/chat/completions", body)
        assert (
            refused.status_code == 503
            and refused.json()["error"]["code"] == "shutting_down"
            and "retry-after" in refused.headers
        )
        assert server.client.get("/ready").status_code == 503
        thread.join()
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 20


# -- keys


def test_a_server_without_keys_answers_to_its_own_names_only(server: Serving) -> None:
    assert server.client.get("/v1/models", headers={"Host": "localhost:1234"}).status_code == 200
    rebound = server.client.get("/v1/models", headers={"Host": "evil.example"})
    assert rebound.status_code == 403 and rebound.json()["error"]["code"] == "host_not_allowed"


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = new_key()
    path.write_text(f"# keys\n\n{key_line('alice', key, 'laptop')}\n")
    keys = KeyFile(path)
    assert keys.tenant(key) == "alice" and keys.tenant(key + "x") is None
    assert key not in path.read_text() and digest_of(key) in path.read_text()
    other = new_key()
    time.sleep(0.01)
    path.write_text(key_line("bob", other) + "\n")  # rotated, without a restart
    assert keys.tenant(key) is None and keys.tenant(other) == "bob"
    path.write_text("half a li")
    assert keys.tenant(other) == "bob" and keys.error is not None  # a broken file locks no client out
    for text in ("", "alice plain-key\n", "alice sha256:zz\n"):
        path.write_text(text)
        with pytest.raises(ConfigError):
            KeyFile(path)
    with pytest.raises(ConfigError):
        key_line("no spaces", key)


def test_a_key_sees_its_own_only(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    alice, bob = new_key(), new_key()
    path.write_text(key_line("alice", alice) + "\n" + key_line("bob", bob) + "\n")
    with serving(keys=path, key=alice) as server:
        as_bob = {"Authorization": f"Bearer {bob}"}
        anonymous = httpx.get(server.url + "/v1/models")
        assert anonymous.status_code == 401 and anonymous.json()["error"]["code"] == "invalid_api_key"
        assert (
            httpx.get(server.url + "/v1/models", headers={"Authorization": "Bearer nope"}).status_code == 401
        )
        assert httpx.get(server.url + "/health").status_code == 200
        first = server.ask("shared words " * 6)
        conversation, response = first["pensieve"]["conversation"], "resp_" + first["pensieve"]["turn"]
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "shared words " * 6}],
            "max_tokens": 8,
            "temperature": 0,
        }
        theirs = server.post("/v1/chat/completions", body, **as_bob).json()
        assert (
            theirs["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        )  # another tenant's cache speeds nothing up
        assert {miss["why"] for miss in theirs["pensieve"]["misses"]} == {"new"}  # and is not even hinted at
        for method, where in (
            ("GET", own(conversation)),
            ("DELETE", own(conversation)),
            ("POST", own(conversation, "pin")),
            ("POST", own(conversation, "fork")),
            ("GET", f"/v1/conversations/{conversation}"),
            ("DELETE", f"/v1/conversations/{conversation}"),
            ("GET", f"/v1/responses/{response}"),
            ("DELETE", f"/v1/responses/{response}"),
            ("POST", f"/v1/responses/{response}/cancel"),
            ("GET", f"/v1/responses/{response}/input_items"),
        ):
            assert server.client.request(method, where, headers=as_bob).status_code == 404, where
        assert server.client.get(f"/v1/responses/{response}").status_code == 200
        rows = server.client.get("/v1/pensieve/map", headers=as_bob).json()["rows"]
        assert conversation not in {row["id"] for row in rows} and len(rows) == 1
        used = server.post("/v1/chat/completions", body, **{"Idempotency-Key": "same"}).json()
        apart = server.post("/v1/chat/completions", body, **as_bob, **{"Idempotency-Key": "same"}).json()
        assert used["id"] != apart["id"]
        hinted = server.post("/v1/chat/completions", body, **as_bob, **{"X-Session-ID": conversation}).json()
        assert hinted["pensieve"]["conversation"] != conversation  # a hint is no credential
        server.until_idle()


def test_a_tenant_may_separate_its_own_caches(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    alice = new_key()
    path.write_text(key_line("alice", alice) + "\n")
    with serving(keys=path, key=alice) as server:
        body: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "salted words " * 6}],
            "max_tokens": 8,
        }
        server.post("/v1/chat/completions", body)
        salted = server.post("/v1/chat/completions", body, **{"X-Cache-Salt": "customer-7"}).json()
        assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert "other_namespace" in {miss["why"] for miss in salted["pensieve"]["misses"]}
        server.until_idle()
