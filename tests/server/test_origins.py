"""Pages of other origins change nothing, whatever a browser lets them send; programs and the server's own
page do.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Serving, serving

from pensieve.errors import ConfigError
from pensieve.server.origins import host_fault, is_foreign, name_of, parse_origin

EVIL = {"Origin": "https://evil.example"}
FOREIGN = (
    EVIL,
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "file://"},
    {"Origin": "http://127.0.0.1:1"},  # another program of this machine
    {"Origin": "http://127.0.0.1"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "Cross-Site"},
    EVIL | {"Sec-Fetch-Site": "cross-site"},
)
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(rules={"origins": frozenset({"https://app.example"})}) as running:
        yield running
        running.until_idle()


def own(conversation: str, action: str) -> str:
    return f"/v1/pensieve/conversations/{conversation}/{action}"


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda headers: " ".join(headers.values()) or "empty")
def test_foreign_pages_change_nothing(server: Serving, headers: dict[str, str]) -> None:
    name = server.client.post("/v1/conversations", json={}).json()["id"]
    before = server.client.get("/v1/pensieve/conversations").json()["total"]
    tried = [
        server.client.post("/v1/conversations", headers=headers | {"Content-Type": "text/plain"}),
        server.client.post("/v1/conversations", json={}, headers=headers),
        server.client.post("/v1/conversations/", json={}, headers=headers),
        server.client.post("/v1/chat/completions", json=CHAT, headers=headers),
        *(
            server.client.post(own(name, action), headers=headers)
            for action in ("pin", "unpin", "warm", "idle", "fork")
        ),
        server.client.post(own(name, "ttl"), json={"seconds": 1}, headers=headers),
        server.client.post("/v1/responses/resp_x/cancel", headers=headers),
        server.client.post("/tokenize", json={"prompt": "x"}, headers=headers),
        server.client.delete(f"/v1/conversations/{name}", headers=headers),
        server.client.get("/v1/pensieve/record", headers=headers),
        server.client.get("/v1/pensieve/%72ecord/", headers=headers),
    ]
    assert [answer.status_code for answer in tried] == [403] * len(tried), [
        answer.text for answer in tried if answer.status_code != 403
    ]
    assert all(answer.json()["error"]["code"] == "origin_not_allowed" for answer in tried)
    assert "--allow-origin" in tried[0].json()["error"]["message"]
    assert server.client.get("/v1/pensieve/conversations").json()["total"] == before
    assert not server.context.recorders.num_held


def test_programs_and_the_own_page_go_on(server: Serving) -> None:
    port = server.url.rpartition(":")[2]
    for headers in (
        {},
        {"Origin": server.url},
        {"Origin": f"http://LOCALHOST:{port}", "Host": f"localhost:{port}"},
        {"Origin": "https://localhost", "Host": "localhost:443"},
        {"Sec-Fetch-Site": "same-origin", "Origin": server.url},
        {"Sec-Fetch-Site": "none"},
        {
            "Sec-Fetch-Site": "same-origin",
            "Origin": "https://public.example",
        },  # behind a proxy that gives the server another name
        {"Origin": "https://app.example"},
        {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"},
    ):
        assert server.client.post("/v1/conversations", json={}, headers=headers).status_code == 200, headers
    for headers in FOREIGN:  # reading tells a foreign page nothing: there are no CORS headers
        answer = server.client.get("/v1/models", headers=headers)
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_pages_of_allowed_origins_may_ask_first(server: Serving) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    allowed = server.client.options("/v1/chat/completions", headers=asked | {"Origin": "https://app.example"})
    assert (
        allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://app.example"
    )
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert (
        "access-control-allow-origin"
        not in server.client.options("/v1/chat/completions", headers=asked | EVIL).headers
    )
    answer = server.client.post(
        "/v1/chat/completions",
        json=CHAT,
        headers={"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"},
    )
    assert (
        answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    )


def test_without_allowed_origins_there_are_no_cors_headers() -> None:
    with serving() as server:
        asked = {"Access-Control-Request-Method": "POST", "Origin": "https://app.example"}
        answer = server.client.options("/v1/chat/completions", headers=asked)
        assert answer.status_code == 405 and not [
            name for name in answer.headers if name.startswith("access-control")
        ]


def test_hosts_are_compared_as_names() -> None:
    for host in ("LocalHost", "localhost:80", "localhost.", "LOCALHOST.:8000", " localhost "):
        assert name_of(host) == "localhost", host
    assert name_of("[::1]:8000") == name_of("[::1]") == "[::1]"
    assert name_of("") == "" and name_of("localhost:evil") == "localhost:evil"
    assert host_fault(["a"], "1.1") is None and host_fault([], "1.0") is None
    assert (
        host_fault([], "1.1") is not None
        and host_fault(["a", "a"], "1.1") is not None
        and host_fault(["a", "b"], "1.0") is not None
    )


def test_origins_as_given_on_the_command_line() -> None:
    assert parse_origin("https://App.Example/") == "https://app.example"
    assert (
        parse_origin("http://localhost:80") == "http://localhost"
        and parse_origin("http://[::1]:3000") == "http://[::1]:3000"
    )
    for wrong in (
        "app.example",
        "*",
        "https://",
        "https://a/path",
        "ftp://a",
        "https://a:b",
        "null",
        "https://user@a",
    ):
        with pytest.raises(ConfigError, match="https://host"):
            parse_origin(wrong)
    assert is_foreign([(b"origin", b"https://a.example"), (b"host", b"b.example")], frozenset())
    assert is_foreign(
        [(b"origin", b"https://a.example"), (b"origin", b"https://b.example"), (b"host", b"b.example")],
        frozenset(),
    )
    assert is_foreign([(b"origin", b"https://a.example")], frozenset())
