"""What one key's owner can learn of another's: nothing, not even from how much work a request makes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Serving, serving

from pensieve.core.misses import ANOTHER_TENANT
from pensieve.core.plan import StepPlan
from pensieve.server.keys import key_line, new_key

PROMPT = "The board met on Tuesday and decided to sell the northern plant. "
NOT_THEIRS = ("id", "message", "param")  # fields that repeat what was asked for


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[tuple[Serving, dict[str, str], dict[str, str], dict[str, str]]]:
    """A server, and the headers of Alice, of Bob and of Carol."""
    path = tmp_path / "keys"
    named = {name: new_key() for name in ("alice", "bob", "carol")}
    path.write_text("".join(key_line(name, key) + "\n" for name, key in named.items()))
    with serving(keys=path, key=named["alice"]) as server:
        alice, bob, carol = ({"Authorization": f"Bearer {key}"} for key in named.values())
        yield server, alice, bob, carol
        server.until_idle()


def test_one_tenant_cannot_take_every_place(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    alice, again, bob = new_key(), new_key(), new_key()
    path.write_text(
        "".join(
            key_line(name, key) + "\n" for name, key in (("alice", alice), ("alice", again), ("bob", bob))
        )
    )
    with serving(keys=path, key=alice, config={"max_open": 4, "max_open_per_key": 2}) as server:
        server.worker.pause_s = 0.03
        body = chat("busy") | {"max_tokens": 60}
        answers: list[httpx.Response] = []

        def ask(key: str, salt: str) -> None:
            headers = {"Authorization": f"Bearer {key}", "X-Cache-Salt": salt}
            answers.append(server.client.post("/v1/chat/completions", json=body, headers=headers))

        threads = [
            threading.Thread(target=ask, args=(key, salt))
            for key in (alice, again)
            for salt in ("", "a", "b")
        ]
        for thread in threads:
            thread.start()
        while len(server.context.answers.open) < 2:
            time.sleep(0.005)
        mine = server.client.post(
            "/v1/chat/completions", json=chat("mine"), headers={"Authorization": f"Bearer {bob}"}
        )
        for thread in threads:
            thread.join()
        assert mine.status_code == 200
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 4, "two keys and three salts are one tenant"
        assert all("--max-open-per-key" in answer.json()["error"]["message"] for answer in refused)
        server.until_idle()
        assert not server.context.answers.places.num_held


def computed(server: Serving, ask: Any) -> tuple[int, int]:
    """Tokens computed and steps taken while something is asked."""
    counts = [0, 0]
    run = server.worker.run

    def counting(plan: StepPlan) -> Any:
        counts[0] += sum(span.stop - span.start for span in plan.spans)
        counts[1] += bool(plan.spans)
        return run(plan)

    server.worker.run = counting  # type: ignore[method-assign]
    try:
        response = ask()
    finally:
        server.worker.run = run  # type: ignore[method-assign]
    assert response.status_code == 200, response.text
    return counts[0], counts[1]


def chat(text: str) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 6,
        "temperature": 0,
    }


ROUTES: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", chat),
    ("/v1/responses", lambda text: {"input": text, "max_output_tokens": 6, "temperature": 0}),
    ("/v1/completions", lambda text: {"model": "tiny", "prompt": text, "max_tokens": 6, "temperature": 0}),
)


@pytest.mark.parametrize(("path", "body"), ROUTES, ids=[path for path, _ in ROUTES])
def test_what_another_has_cached_saves_no_work(keys: Any, path: str, body: Any) -> None:
    server, alice, bob, carol = keys
    asked = body(PROMPT * 4)
    started_s = time.perf_counter()
    cold = computed(server, lambda: server.post(path, asked, **bob))  # no tenant has it
    middle_s = time.perf_counter()
    assert server.post(path, asked, **alice).status_code == 200
    before_s = time.perf_counter()
    probe = computed(server, lambda: server.post(path, asked, **carol))  # two others have it
    ended_s = time.perf_counter()
    assert probe == cold
    print(
        f"{path}: no tenant has it {1e3 * (middle_s - started_s):.1f} ms, "
        f"others have it {1e3 * (ended_s - before_s):.1f} ms"
    )
    assert (
        computed(server, lambda: server.post(path, asked, **alice))[0] < cold[0]
    )  # the probe would show it if there were anything to see


def test_what_another_is_just_computing_is_not_waited_for(keys: Any) -> None:
    """A chunk that is being computed is shared within a namespace only: its end must not be seen from
    outside.
    """
    server, alice, bob, _ = keys
    long = PROMPT * 5
    server.worker.pause_s = 0.05
    first = threading.Thread(target=lambda: server.post("/v1/chat/completions", chat(long), **alice))
    first.start()
    while not server.context.answers.open:
        time.sleep(0.001)
    answer = server.post("/v1/chat/completions", chat(long), **bob).json()
    first.join()
    server.worker.pause_s = 0.0
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert answer["pensieve"]["new_tokens"] == answer["usage"]["prompt_tokens"] and {
        m["why"] for m in answer["pensieve"]["misses"]
    } == {"new"}


def test_a_salt_keeps_one_tenants_own_caches_apart(keys: Any) -> None:
    server, alice, _, _ = keys

    def ask(salt: str) -> tuple[int, int]:
        return computed(
            server,
            lambda: server.post("/v1/chat/completions", chat(PROMPT * 4), **alice, **{"X-Cache-Salt": salt}),
        )

    cold = ask("one")
    assert ask("other") == cold and ask("one")[0] < cold[0]


def same(theirs: httpx.Response, missing: httpx.Response, *ids: str) -> None:
    """Two answers that differ in the id that was asked for, and in nothing else."""
    assert theirs.status_code == missing.status_code, (theirs.text, missing.text)

    def form(response: httpx.Response) -> str:
        text = response.text
        for id in ids:
            text = text.replace(id, "ID")
        return text

    assert form(theirs) == form(missing)
    assert {name for name in theirs.headers if name != "date"} == {
        name for name in missing.headers if name != "date"
    }


def test_what_belongs_to_another_tenant_looks_like_what_does_not_exist(keys: Any) -> None:
    server, alice, bob, _ = keys
    made = server.post("/v1/chat/completions", chat(PROMPT), **alice, **{"X-Session-ID": "s"}).json()[
        "pensieve"
    ]
    conversation, response = made["conversation"], "resp_" + made["turn"]
    stranger, nowhere = conversation[:-6] + "abcdef", response[:-6] + "abcdef"
    item = server.client.get(f"/v1/conversations/{conversation}/items", headers=alice).json()["data"][0]["id"]
    begun = server.post(
        "/v1/responses", {"input": "x", "max_output_tokens": 300, "background": True}, **alice
    ).json()["id"]
    requests: list[tuple[str, str, Any]] = [
        ("GET", "/v1/conversations/{}", None),
        ("POST", "/v1/conversations/{}", {"metadata": {}}),
        ("DELETE", "/v1/conversations/{}", None),
        ("GET", "/v1/conversations/{}/items", None),
        ("POST", "/v1/conversations/{}/items", {"items": [{"role": "user", "content": "x"}]}),
        ("GET", f"/v1/conversations/{{}}/items/{item}", None),
        ("DELETE", f"/v1/conversations/{{}}/items/{item}", None),
        ("GET", "/v1/pensieve/conversations/{}", None),
        ("DELETE", "/v1/pensieve/conversations/{}", None),
        *(
            ("POST", f"/v1/pensieve/conversations/{{}}/{action}", None)
            for action in ("warm", "idle", "pin", "unpin", "fork")
        ),
        ("POST", "/v1/pensieve/conversations/{}/ttl", {"seconds": 5}),
        ("POST", "/v1/responses", {"input": "x", "conversation": "{}"}),
    ]
    for method, path, body in requests:

        def ask(id: str, method: str = method, path: str = path, body: Any = body) -> httpx.Response:
            sent = {name: id if value == "{}" else value for name, value in body.items()} if body else None
            response: httpx.Response = server.client.request(method, path.format(id), json=sent, headers=bob)
            return response

        same(ask(conversation), ask(stranger), conversation, stranger)
    for method, path in (
        ("GET", "/v1/responses/{}"),
        ("GET", "/v1/responses/{}?stream=true"),
        ("DELETE", "/v1/responses/{}"),
        ("POST", "/v1/responses/{}/cancel"),
        ("GET", "/v1/responses/{}/input_items"),
    ):
        for id in (response, begun):
            theirs = server.client.request(method, path.format(id), headers=bob)
            same(theirs, server.client.request(method, path.format(nowhere), headers=bob), id, nowhere)
    for field, known, unknown in (
        ("previous_response_id", response, nowhere),
        ("previous_response_id", begun, nowhere),
    ):
        bodies = [{"input": "x", field: id} for id in (known, unknown)]
        same(*(server.post("/v1/responses", body, **bob) for body in bodies), known, unknown)
    bobs = server.post("/v1/conversations", {}, **bob).json()["id"]
    forks = [
        server.post(f"/v1/pensieve/conversations/{bobs}/fork", {"at": id}, **bob)
        for id in (response, nowhere)
    ]
    same(*forks, response, nowhere, response.removeprefix("resp_"), nowhere.removeprefix("resp_"))
    # Alice's things are as they were
    assert (
        server.client.get(f"/v1/pensieve/conversations/{conversation}", headers=alice).json()["expires_at"]
        is None
    )
    server.post(f"/v1/responses/{begun}/cancel", {}, **alice)


def test_what_a_key_may_see_of_the_whole_server(keys: Any) -> None:
    """The map's rows are the caller's own; its tiers and counters are the server's, as in `/metrics`."""
    server, alice, bob, _ = keys
    server.post("/v1/chat/completions", chat(PROMPT), **alice)
    for path in ("/v1/pensieve/map", "/v1/pensieve/conversations"):
        shown = server.client.get(path, headers=bob).json()
        assert not shown.get("rows") and not shown.get("data") and shown["total"] == 0


def test_without_a_key_nothing_is_read(keys: Any) -> None:
    """Not even whether a body would have been right, or whether there is such a path."""
    server = keys[0]
    for headers in (
        {},
        {"Authorization": "Bearer nope"},
        {"Authorization": "Basic x"},
        {"Authorization": "Bearer \u00e9"},
    ):
        for method, path, body in (
            ("POST", "/v1/responses", "{"),
            ("POST", "/v1/chat/completions", "{}"),
            ("DELETE", "/v1/pensieve/conversations/x", ""),
            ("POST", "/nowhere", ""),
            ("PUT", "/v1/models", ""),
        ):
            sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            sent.append((b"Content-Type", b"application/json"))
            answer = httpx.request(method, server.url + path, content=body, headers=sent)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", (
                method,
                path,
                answer.text,
            )


def test_room_made_for_another_tenant_names_no_tenant(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    alice, bob = new_key(), new_key()
    path.write_text(key_line("alice", alice) + "\n" + key_line("bob", bob) + "\n")
    with serving(keys=path, key=alice, slots=(34, 6)) as server:
        first = server.ask("the one that will be forgotten " * 3, n=10)
        ids = set()
        for number in range(12):
            answer = server.post(
                "/v1/chat/completions",
                chat(f"Bob has a longer text, number {number} " * 3),
                Authorization=f"Bearer {bob}",
            ).json()
            ids.add(answer["pensieve"]["conversation"])
        back = server.ask(
            "the one that will be forgotten " * 3, first["choices"][0]["message"]["content"], "back", n=4
        )
        by = {miss["by"] for miss in back["pensieve"]["misses"] if miss["why"] == "dropped"}
        assert ANOTHER_TENANT in by and by <= {ANOTHER_TENANT, back["pensieve"]["conversation"]}, by
        assert not any(id in str(back) for id in ids)
        server.until_idle()
