"""Strangers' web pages, other hosts' names, what is open without a key, and where keys may be read. Knows headers and logs; no texts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from promises import Notes, attack
from served import Served, help_text
from wire import get, head, post, send
from world import World

EVIL = "https://evil.example"


def count(server: Served) -> int:
    """How many conversations there are."""
    return int(get(server.address, "/v1/pensieve/conversations").json["total"])


@attack("page/cross-site-posts")
def cross_site(world: World, notes: Notes) -> None:
    """Requests that change something are refused from another site's page, and taken from our own."""
    with world.server() as server:
        port = server.address.port
        made = post(server.address, "/v1/conversations", None).json["id"]
        before = count(server)
        foreign: dict[str, dict[str, Any]] = {
            "origin": {"Origin": EVIL},
            "origin and type": {"Origin": EVIL, "Content_Type": "text/plain"},
            "null origin": {"Origin": "null"},
            "other port": {"Origin": "http://127.0.0.1:9"},
            "other scheme": {"Origin": f"https://127.0.0.1:{port}"},
            "prefix": {"Origin": f"http://127.0.0.1:{port}.evil.example"},
            "name within": {"Origin": f"http://evil.example/127.0.0.1:{port}"},
            "no origin but cross-site": {"Sec_Fetch_Site": "cross-site"},
            "upper case": {"Sec_Fetch_Site": "Cross-Site", "Origin": "HTTPS://EVIL.EXAMPLE"},
            "both": {"Origin": EVIL, "Sec_Fetch_Site": "cross-site"},
            "form": {"Origin": EVIL, "Content_Type": "application/x-www-form-urlencoded"},
        }
        paths = [
            "/v1/conversations",
            *(
                f"/v1/pensieve/conversations/{made}/{verb}"
                for verb in ("pin", "unpin", "warm", "idle", "fork")
            ),
        ]
        taken = []
        for what, headers in foreign.items():
            for path in paths:
                reply = post(server.address, path, None, **headers)
                if reply.status < 400:
                    taken.append(f"{path.rpartition('/')[2]} ({what})")
        notes.say(
            f"{len(foreign) * len(paths) - len(taken)} of {len(foreign) * len(paths)} refused; {count(server) - before} conversations made"
        )
        notes.hold(not taken, f"taken from other sites: {len(taken)}, among them {', '.join(taken[:4])}")
        notes.hold(count(server) == before, f"{count(server) - before} conversations were made")
        own = {
            "no page": {},
            "our page": {
                "Origin": f"http://127.0.0.1:{port}",
                "Sec_Fetch_Site": "same-origin",
                "Host": f"127.0.0.1:{port}",
            },
            "our page by name": {
                "Origin": f"http://localhost:{port}",
                "Sec_Fetch_Site": "same-origin",
                "Host": f"localhost:{port}",
            },
        }
        for what, headers in own.items():
            host = headers.pop("Host", "localhost")
            lines = [(name.replace("_", "-"), value) for name, value in headers.items()]
            data = head(
                "POST",
                "/v1/conversations",
                None,
                [*lines, ("Content-Length", "0"), ("Connection", "close")],
                host,
            )
            reply = send(server.address, [data], 10.0)
            notes.hold(reply.status == 200, f"{what}: {reply}")


@attack("page/cross-site-record")
def cross_site_record(world: World, notes: Notes) -> None:
    """Another site's page cannot take the recorders, or a model's time."""
    with world.server() as server:
        for path in ("/v1/pensieve/record?duration_s=1",):
            reply = get(
                server.address, path, timeout_s=8.0, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors"
            )
            notes.say(f"{path}: {reply}")
            notes.hold(400 <= reply.status < 500, f"{path} of another site: {reply}")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        reply = post(server.address, "/v1/chat/completions", body, Origin=EVIL)
        notes.hold(400 <= reply.status < 500, f"a chat of another site: {reply}")
        reply = get(
            server.address,
            "/health",
            Sec_Fetch_Site="cross-site",
            Sec_Fetch_Mode="navigate",
            Sec_Fetch_Dest="document",
        )
        notes.hold(reply.status == 200, f"a link from another site: {reply}")


@attack("page/hosts")
def hosts(world: World, notes: Notes) -> None:
    """A server without keys answers to its own names, in any case, and to none that a page may have made up; two Host headers are wrong."""
    with world.server() as server:
        port = server.address.port
        right = [
            "localhost",
            "LOCALHOST",
            "Localhost",
            f"localhost:{port}",
            f"LocalHost:{port}",
            "127.0.0.1",
            f"127.0.0.1:{port}",
            "[::1]",
            f"[::1]:{port}",
        ]
        wrong = [
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "evil.example:80",
            "localhost@evil.example",
            "",
            "127.0.0.1:80:80",
        ]
        for host in right:
            reply = send(
                server.address, [head("GET", "/ready", None, [("Connection", "close")], host)], 10.0, "GET"
            )
            notes.hold(reply.status == 200, f"Host {host!r}: {reply}")
        for host in wrong:
            reply = send(
                server.address, [head("GET", "/ready", None, [("Connection", "close")], host)], 10.0, "GET"
            )
            notes.hold(400 <= reply.status < 500, f"Host {host!r}: {reply}")
        twice = head("GET", "/ready", None, [("Host", "evil.example"), ("Connection", "close")])
        reply = send(server.address, [twice], 10.0, "GET")
        notes.say(f"two Host headers: {reply}")
        notes.hold(reply.status == 400, f"two Host headers: {reply}, expected 400")


OPEN = ("/metrics", "/openapi.json", "/", "/version")


def closing_options(notes: Notes) -> list[str] | None:
    """The option that closes what is open without a key, as `--help` names it."""
    told = help_text()
    found = re.findall(
        r"--(?:private|closed|metrics-key|metrics-port|admin-port|no-page|no-metrics|require-key)\b", told
    )
    notes.say(f"options: {', '.join(dict.fromkeys(found)) or 'none'}")
    if "--private" in found:
        return ["--private"]
    notes.hold(False, "`pensieve serve` has nothing that closes /metrics, /openapi.json and the page")
    return None


@attack("page/closed")
def closed(world: World, notes: Notes) -> None:
    """/metrics, /openapi.json, /version and the page can be closed to those without a key."""
    options = closing_options(notes)
    if options is None:
        return
    with world.server(*options, tenants=("bob",)) as server:
        for path in (*OPEN, "/static/index.html", "/metrics/"):
            reply = get(server.address, path)
            notes.hold(reply.status in (401, 403, 404), f"{path} without a key: {reply}")
        reply = get(server.address, "/health")
        notes.hold(reply.status == 200, f"/health: {reply}")


def logged(server: Served) -> str:
    return server.log_path.read_text(encoding="utf-8", errors="replace")


@attack("page/keys-in-logs")
def keys_in_logs(world: World, notes: Notes) -> None:
    """No key stands in a log line, wherever a client put it."""
    with world.server("--access-log", tenants=("bob",)) as server:
        key = server.keys["bob"]
        tail = key[-20:]
        secret = "the-secret-prompt-4711"
        get(server.address, f"/v1/models?api_key={key}")
        get(server.address, f"/v1/models/{key}", key)
        get(server.address, f"/v1/conversations/{key}?after={key}", key)
        get(server.address, f"/{key}")
        get(server.address, "/v1/models", key, X_API_Key=key, Referer=f"http://x/?key={key}")
        post(server.address, "/v1/chat/completions", {"model": "tiny", "messages": secret}, key)
        post(
            server.address,
            "/v1/chat/completions",
            {"model": key, "messages": [{"role": "user", "content": secret}]},
            key,
        )
        send(server.address, [head("GET", f"http://{key}@localhost/v1/models", key)], 5.0, "GET")
        send(
            server.address,
            [
                f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nbad header {key}\r\n\r\n".encode()
            ],
            5.0,
            "GET",
        )
        world.chat(server.address, key, secret)
        time.sleep(0.5)
        lines = [line for line in logged(server).splitlines() if tail in line]
        notes.say(f"{len(lines)} lines with the key, {logged(server).count(secret)} with a prompt")
        notes.hold(
            not lines,
            f"{len(lines)} lines hold the key, the first: {lines[0].replace(tail, '...') if lines else ''}",
        )
        notes.hold(secret not in logged(server), "a prompt stands in the log")


@attack("page/key-file")
def key_file(world: World, notes: Notes) -> None:
    """A key file that cannot be read is said loudly, /ready included, and a file that others may read is closed when a key is added."""
    with world.server(tenants=("bob",)) as server:
        key, path = server.keys["bob"], server.key_path
        good = path.read_text(encoding="utf-8")

        def make_a_folder() -> None:
            path.unlink()
            path.mkdir()

        changes: dict[str, Callable[[], object]] = {
            "a line that is none": lambda: path.write_text(good + "not a key\n", encoding="utf-8"),
            "gone": path.unlink,
            "empty": lambda: path.write_text("", encoding="utf-8"),
            "a folder": make_a_folder,
        }
        for what, change in changes.items():
            log_size = len(logged(server))
            change()
            loud = _until(server, 503, 8.0)
            get(server.address, "/v1/models", key)
            said = any(word in logged(server)[log_size:] for word in ("key", "WARNING", "ERROR"))
            metric = re.search(
                r"^pensieve\S*key\S* (?!0(?:\.0)?$)\S+",
                get(server.address, "/metrics").body.decode(),
                re.MULTILINE,
            )
            notes.say(
                f"{what}: /ready {'503' if loud else '200'}, log {'yes' if said else 'no'}, metric {metric[0] if metric else 'no'}"
            )
            notes.hold(loud, f"{what}: /ready stays 200")
            notes.hold(said, f"{what}: nothing in the log")
            notes.hold(metric is not None, f"{what}: no metric of keys above 0")
            if path.is_dir():
                path.rmdir()
            path.write_text(good, encoding="utf-8")
            notes.hold(_until(server, 200, 8.0), f"{what}: /ready is not 200 again with the file as it was")
        other = server.add_key("carol")
        os.chmod(path, 0o644)
        server.add_key("dave")
        mode = path.stat().st_mode & 0o777
        notes.say(f"mode after `keys add`: {mode:o}")
        notes.hold(mode == 0o600, f"`pensieve keys add` left the file {mode:o}")
        notes.hold(
            get(server.address, "/v1/models", other).status == 200, "a key that was added is not taken"
        )
        path.write_text(
            "\n".join(
                line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("carol")
            )
            + "\n",
            encoding="utf-8",
        )
        time.sleep(1.0)
        notes.hold(
            get(server.address, "/v1/models", other).status == 401, "a key that was taken out is still taken"
        )


def _until(server: Served, status: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if get(server.address, "/ready").status == status:
            return True
        time.sleep(0.2)
    return False


@attack("page/store-password")
def password(world: World, notes: Notes) -> None:
    """A password in `--store postgresql://…` stands in no error, and an environment variable can hold it."""
    secret = "hunter2-4711"
    command = [
        sys.executable,
        "-m",
        "pensieve",
        "serve",
        "--port",
        "0",
        "--model",
        str(world.model),
        "--store",
    ]
    for url in (
        f"postgresql://user:{secret}@127.0.0.1:9/none",
        f"postgresql://user:{secret}@[bad/none",
        f"postgresql://127.0.0.1:9/none?password={secret}",
    ):
        ended = subprocess.run([*command, url], capture_output=True, text=True, timeout=60, check=False)
        told = ended.stdout + ended.stderr
        notes.say(f"exit {ended.returncode}")
        notes.hold(
            ended.returncode != 0 and secret not in told,
            f"the output holds the password: {told.replace(secret, '***')[-300:]}",
        )
