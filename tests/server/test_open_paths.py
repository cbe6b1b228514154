"""What a server shows without a key, and what it tells one tenant of the others."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from raw import exchange
from serving import Serving, serving

from pensieve.server.keys import key_line, new_key

OPEN = ("/health", "/ready", "/", "/static/main.js", "/version", "/metrics", "/openapi.json")
NO_KEY = {"Authorization": ""}
CLOSED = (
    "/v1/models",
    "/v1/models/tiny",
    "/v1/pensieve/map",
    "/v1/pensieve/conversations",
    "/v1/pensieve/record",
    "/v1/responses/x",
    "/nothing",
)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str, str]:
    """A key file, and the keys of alice and of bob."""
    path, alice, bob = tmp_path / "keys", new_key(), new_key()
    path.write_text(key_line("alice", alice) + "\n" + key_line("bob", bob) + "\n")
    return path, alice, bob


def statuses(server: Serving, paths: tuple[str, ...]) -> list[int]:
    """Without a key."""
    return [server.client.get(path, headers=NO_KEY).status_code for path in paths]


def test_what_is_open_without_a_key(keys: tuple[Path, str, str]) -> None:
    with serving(keys=keys[0], key=keys[1]) as server:
        assert statuses(server, OPEN) == [200] * len(OPEN)
        assert statuses(server, CLOSED) == [401] * len(CLOSED)
        assert server.client.post("/tokenize", json={"prompt": "x"}, headers=NO_KEY).status_code == 401


def test_a_private_server_answers_only_that_it_lives(keys: tuple[Path, str, str]) -> None:
    with serving(keys=keys[0], key=keys[1], rules={"private": True}) as server:
        assert statuses(server, OPEN) == [200, 200, 401, 401, 401, 403, 401]
        assert statuses(server, CLOSED) == [401] * len(CLOSED)
        assert (
            server.client.head("/version", headers=NO_KEY).status_code == 401
            and server.client.get("/version/", headers=NO_KEY).status_code == 401
        )
        assert [server.client.get(path).status_code for path in ("/version", "/openapi.json", "/")] == [
            200
        ] * 3
        closed = server.client.get("/metrics")  # it counts the other tenants' tokens, too
        assert closed.status_code == 403 and "--metrics-port" in closed.json()["error"]["message"]


def test_metrics_have_a_port_of_their_own(keys: tuple[Path, str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = frozenset({"127.0.0.1", "localhost"})
    with serving(
        keys=keys[0], key=keys[1], rules={"metrics_port": port, "metrics_hosts": names}, more_ports=(port,)
    ) as server:
        server.ask("count me")
        shown = server.client.get(f"http://127.0.0.1:{port}/metrics")
        assert shown.status_code == 200 and "pensieve_tokens_total" in shown.text
        assert (
            server.client.get("/metrics", headers=NO_KEY).status_code == 403
            and server.client.get("/metrics").status_code == 403
        )
        for path in ("/", "/version", "/openapi.json", "/v1/models", "/v1/pensieve/map"):
            assert server.client.get(f"http://127.0.0.1:{port}{path}").status_code == 404
        assert server.client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={}).status_code == 404
        assert server.client.get(f"http://127.0.0.1:{port}/ready").status_code == 200
        assert (
            server.client.get(
                f"http://127.0.0.1:{port}/metrics", headers={"Host": "evil.example"}
            ).status_code
            == 403
        )
        assert (
            exchange(
                server, b"GET /metrics HTTP/1.1\r\nHost: x:%d\r\nConnection: close\r\n\r\n" % port
            ).status
            == 403
        )  # a name is no port


def test_the_map_tells_a_tenant_nothing_of_the_others_requests(keys: tuple[Path, str, str]) -> None:
    path, alice, bob = keys
    as_bob = {"Authorization": f"Bearer {bob}"}
    with serving(keys=path, key=alice, slots=(64, 64)) as server:
        mine = server.client.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": [{"role": "user", "content": "bob's"}], "max_tokens": 3},
            headers=as_bob,
        ).json()["usage"]

        def shown() -> dict[str, object]:
            body = server.client.get("/v1/pensieve/map", headers=as_bob).json()
            return {"tiers": body["tiers"], "stats": body["stats"]}

        before = shown()
        usage = server.ask("alice's own words", n=5)["usage"]  # two chunks of 64: within a sixteenth
        assert usage["prompt_tokens"] + usage["completion_tokens"] > 8
        after = shown()
        assert after["stats"] == before["stats"]
        tiers = after["tiers"]
        assert isinstance(tiers, list)
        assert all(
            tier["used"] % 4 == 0 and tier["used"] + tier["free"] == tier["num_slots"] for tier in tiers
        )
        stats = after["stats"]
        assert isinstance(stats, dict)
        assert stats["output_tokens"] == mine["completion_tokens"] and stats["sequences"] == 1
        assert (
            sum(stats[f"{name}_tokens"] for name in ("gpu", "cpu", "recomputed", "new"))
            == mine["prompt_tokens"]
        )
        assert sum(stats["hit_rates"].values()) == pytest.approx(1.0)
        own = server.client.get("/v1/pensieve/map").json()["stats"]
        assert own["output_tokens"] == usage["completion_tokens"]
        server.until_idle()


def test_a_tenant_alone_sees_all_counters(tmp_path: Path) -> None:
    path, key = tmp_path / "keys", new_key()
    path.write_text(key_line("alice", key) + "\n")
    with serving(keys=path, key=key) as server:
        server.ask("alone")
        assert "steps" in server.client.get("/v1/pensieve/map").json()["stats"]
        server.until_idle()
