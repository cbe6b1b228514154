"""What befalls a store: a full disk, a file that is gone or altered, readers and writers beside the server, a second server on it.

Knows SQLite's files and the API; of the tables only `turns` and what a kept text looks like.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from bodies import CHAT, RESPONSES
from promises import Notes, attack
from served import Served
from wire import Reply, events, get, post
from world import World

TENANTS = ("bob",)
NOTICED_S = 15.0  # until /ready tells of a store that fails
LEASE_S = 60.0  # until what a dead server left is recovered by another


def ready(server: Served, status: int, timeout_s: float) -> float | None:
    """Seconds until /ready had a status; None: it had not."""
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < timeout_s:
        if get(server.address, "/ready", timeout_s=5.0).status == status:
            return time.monotonic() - begun_s
        time.sleep(0.2)
    return None


def copies(store: Path, words: str) -> int:
    """How often words stand in the store's files."""
    found = 0
    for path in (store, Path(f"{store}-wal"), Path(f"{store}-shm"), Path(f"{store}-journal")):
        with contextlib.suppress(FileNotFoundError):
            found += path.read_bytes().count(words.encode())
    return found


def texts(server: Served, conversation: str) -> list[str]:
    """The words of a conversation's messages."""
    found = get(server.address, f"/v1/pensieve/conversations/{conversation}", server.keys["bob"]).json
    return [message["content"] for message in found["messages"]] if found and "messages" in found else []


@attack("store/full-disk")
def full(world: World, notes: Notes) -> None:
    """A store that cannot grow loses nothing acknowledged, tells /ready, and is written again once there is room."""
    with world.server("--max-context", "4096", tenants=TENANTS) as server:
        key = server.keys["bob"]
        before = [
            world.chat(server.address, key, f"before {i}", Idempotency_Key=f"before-{i}") for i in range(3)
        ]
        largest = max(path.stat().st_size for path in server.store.parent.glob(f"{server.store.name}*"))
        server.front.rlimit(psutil.RLIMIT_FSIZE, (largest + 200_000, resource_hard(server)))
        long_text = "word " * 1500
        turns: list[Reply] = []
        until = time.monotonic() + 40
        while time.monotonic() < until and sum(reply.status != 200 for reply in turns) < 6:
            turns.append(
                world.chat(
                    server.address, key, f"{len(turns)} {long_text}", Idempotency_Key=f"full-{len(turns)}"
                )
            )
        noticed = ready(server, 503, NOTICED_S)
        bad = [reply for reply in turns if reply.status != 200]
        notes.say(
            f"{len(turns) - len(bad)} turns before it was full, then {sorted({str(reply.status) for reply in bad})}; /ready 503 after {noticed} s"
        )
        notes.hold(bool(bad), "no turn failed: the disk was not full")
        notes.hold(noticed is not None, f"/ready stays 200 for {NOTICED_S:g} s while every write fails")
        notes.hold(
            all(reply.status == 503 and "retry-after" in reply.headers for reply in bad),
            f"a failing store: {bad[-1] if bad else ''}, expected 503 with Retry-After",
        )
        told = b" ".join(reply.body for reply in bad).decode()
        notes.hold(
            str(server.store) not in told and str(server.folder) not in told,
            "an error tells clients the store's path",
        )
        shown = get(server.address, "/ready").json
        notes.hold(bool(shown and shown.get("troubles")), f"/ready names no trouble: {shown}")
        server.front.rlimit(psutil.RLIMIT_FSIZE, (resource_hard(server), resource_hard(server)))
        again = ready(server, 200, NOTICED_S)
        notes.hold(again is not None, f"/ready is not 200 again {NOTICED_S:g} s after there was room")
        retried = [
            world.chat(server.address, key, f"{i} {long_text}", Idempotency_Key=f"full-{i}")
            for i in range(len(turns))
        ]
        lost = sum(
            one.status == 200 and two.json["id"] != one.json["id"]
            for one, two in zip(turns, retried, strict=True)
            if two.status == 200
        )
        lost += sum(
            world.chat(server.address, key, f"before {i}", Idempotency_Key=f"before-{i}").json["id"]
            != one.json["id"]
            for i, one in enumerate(before)
        )
        unanswered = sum(reply.status != 200 for reply in retried)
        notes.say(
            f"{len(retried) - unanswered} of {len(retried)} retries answered, {lost} lost",
            acknowledged=len(turns) - len(bad) + 3,
            retried=len(retried),
            lost=lost,
        )
        notes.hold(lost == 0, f"{lost} acknowledged turns were lost")
        notes.hold(
            unanswered == 0,
            f"{unanswered} retries were not answered once there was room: {[str(one) for one in retried if one.status != 200][:2]}",
        )


def resource_hard(server: Served) -> int:
    return int(server.front.rlimit(psutil.RLIMIT_FSIZE)[1])


@attack("store/full-from-the-start", quick=False)
def full_reads(world: World, notes: Notes) -> None:
    """A store that cannot be written at all still reads: conversations are listed and shown, /health answers."""
    with world.server(tenants=TENANTS) as server:
        key = server.keys["bob"]
        conversation = world.chat(server.address, key, "remember me").json["pensieve"]["conversation"]
        server.front.rlimit(psutil.RLIMIT_FSIZE, (0, resource_hard(server)))
        bad = world.chat(server.address, key, "no room", timeout_s=20.0)
        made = post(server.address, "/v1/conversations", {}, key)
        gone = post(server.address, f"/v1/pensieve/conversations/{conversation}/ttl", {"seconds": 9000}, key)
        notes.say(f"turn {bad}, create {made}, ttl {gone}")
        for what, reply in {"a turn": bad, "create": made, "ttl": gone}.items():
            notes.hold(
                reply.status == 503 and "retry-after" in reply.headers,
                f"{what} on a full disk: {reply}, expected 503 with Retry-After",
            )
            notes.hold(
                str(server.folder) not in reply.body.decode(), f"{what}: the error tells the store's path"
            )
        notes.hold(get(server.address, "/health").status == 200, "/health fails")
        notes.hold(texts(server, conversation)[:1] == ["remember me"], "a conversation is not shown")
        server.front.rlimit(psutil.RLIMIT_FSIZE, (resource_hard(server), resource_hard(server)))
        notes.hold(ready(server, 200, NOTICED_S) is not None, "/ready is not 200 again")


def _unlinked(world: World, notes: Notes, change: Any) -> None:
    with world.server(tenants=TENANTS) as server:
        key = server.keys["bob"]
        world.chat(server.address, key, "before")
        change(server)
        begun_s = time.monotonic()
        acknowledged = 0
        while time.monotonic() - begun_s < NOTICED_S:
            listed = get(server.address, "/v1/pensieve/conversations", key)
            acknowledged += world.chat(server.address, key, f"after {time.monotonic()}").status == 200
            if get(server.address, "/ready").status == 503:
                break
            time.sleep(0.3)
        noticed_s = time.monotonic() - begun_s
        late = [world.chat(server.address, key, f"late {i}") for i in range(3)]
        size = server.store.stat().st_size if server.store.is_file() else None
        notes.say(
            f"noticed after {noticed_s:.1f} s, {acknowledged} turns acknowledged until then; late turns {[reply.status for reply in late]}; the path holds {size} bytes; listing {listed.status}"
        )
        notes.hold(noticed_s < NOTICED_S, f"/ready stays 200 for {NOTICED_S:g} s")
        notes.hold(
            all(reply.status == 503 for reply in late),
            f"turns are acknowledged into a file that is gone: {[reply.status for reply in late]}",
        )
        notes.hold(size is None or size > 0, "an empty file was made in the place of the one that is gone")
        tables: list[Any] = []
        if size:
            with (
                contextlib.closing(sqlite3.connect(f"file:{server.store}?mode=ro", uri=True)) as connection,
                contextlib.suppress(sqlite3.Error),
            ):
                tables = connection.execute("SELECT name FROM sqlite_master WHERE name = 'turns'").fetchall()
            notes.hold(bool(tables), "a file without tables was made in the place of the one that is gone")


@attack("store/unlinked")
def unlinked(world: World, notes: Notes) -> None:
    """A store whose file was deleted acknowledges nothing more, tells /ready, and no reader makes a new file."""
    _unlinked(
        world,
        notes,
        lambda server: [path.unlink() for path in server.store.parent.glob(f"{server.store.name}*")],
    )


@attack("store/replaced", quick=False)
def replaced(world: World, notes: Notes) -> None:
    """The same for a file that was moved away and another put in its place."""

    def change(server: Served) -> None:
        for path in server.store.parent.glob(f"{server.store.name}*"):
            shutil.copy(path, f"{path}.copy")
            path.rename(f"{path}.old")
            os.rename(f"{path}.copy", path)

    _unlinked(world, notes, change)


@attack("store/delete-beside-a-reader")
def delete(world: World, notes: Notes) -> None:
    """A DELETE that could not be completed beside a reader of the file is completed once the reader has gone: words and titles, log included."""
    with world.server(tenants=TENANTS) as server:
        key, words = server.keys["bob"], "zebra-4711-quagga"
        made = world.chat(server.address, key, f"{words} is the word", Idempotency_Key=words[:8])
        conversation = made.json["pensieve"]["conversation"]
        notes.hold(copies(server.store, words) > 0, "the words were not stored")
        with contextlib.closing(
            sqlite3.connect(f"file:{server.store}?mode=ro", uri=True, isolation_level=None)
        ) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM turns").fetchone()
            world.chat(server.address, key, "something else")
            deleted = post(
                server.address, f"/v1/pensieve/conversations/{conversation}", None, key, 30.0, "DELETE"
            )
            during = copies(server.store, words)
            shown = get(server.address, f"/v1/pensieve/conversations/{conversation}", key).status
        begun_s = time.monotonic()
        while (left := copies(server.store, words)) and time.monotonic() - begun_s < 30:
            time.sleep(0.3)
        told = deleted.json or {}
        notes.say(
            f"{deleted}, complete {told.get('complete')}; {during} copies beside the reader, {left} {time.monotonic() - begun_s:.1f} s after it had gone"
        )
        notes.hold(deleted.status == 200, f"{deleted}")
        notes.hold(not (told.get("complete") and during), f"complete was said beside {during} copies")
        notes.hold(left == 0, f"{left} copies of the words are left 30 s after the reader has gone")
        notes.hold(shown == 404, f"the conversation is still shown: {shown}")


@attack("store/deleted-is-gone")
def gone(world: World, notes: Notes) -> None:
    """What is deleted is in no file: messages, instructions, answers, tools, metadata, titles, keys of retries, drafts."""
    with world.server(tenants=TENANTS) as server:
        key, words = server.keys["bob"], "zebra-0815"
        made = post(
            server.address, "/v1/conversations", {"metadata": {f"{words}-key": f"{words}-value"}}, key
        ).json["id"]
        body = {
            "input": f"{words} asked", "instructions": f"{words} told", "conversation": made, "max_output_tokens": 4, "ignore_eos": True,
            "metadata": {"a": f"{words}-meta"}, "user": f"{words}-user", "tools": [{"type": "function", "name": "f", "description": f"{words}-tool"}],
        }  # fmt: skip
        first = post(server.address, RESPONSES, body, key, Idempotency_Key=f"{words}-retry")
        post(
            server.address,
            f"/v1/conversations/{made}/items",
            {"items": [{"type": "message", "role": "user", "content": f"{words} item"}]},
            key,
        )
        post(server.address, f"/v1/conversations/{made}", {"metadata": {"b": f"{words}-changed"}}, key)
        running = post(
            server.address,
            RESPONSES,
            {
                "input": f"{words} cancelled",
                "conversation": made,
                "background": True,
                "max_output_tokens": 4000,
                "ignore_eos": True,
            },
            key,
        )
        post(server.address, f"/v1/responses/{(running.json or {}).get('id')}/cancel", None, key)
        titled = world.chat(server.address, key, f"{words} as a title")
        before = copies(server.store, words)
        for conversation in (made, titled.json["pensieve"]["conversation"]):
            deleted = post(
                server.address, f"/v1/pensieve/conversations/{conversation}", None, key, 30.0, "DELETE"
            )
            notes.hold(
                deleted.status == 200 and bool(deleted.json.get("complete")),
                f"{deleted} {deleted.body[:200]!r}",
            )
        time.sleep(0.5)
        left = copies(server.store, words)
        in_log = server.log().count(words)
        notes.say(f"{first}; copies in the files {before} -> {left}, in the log {in_log}")
        notes.hold(left == 0, f"{left} copies are left in the store's files")
        notes.hold(in_log == 0, f"{in_log} copies stand in the log")


@attack("store/flipped-bytes")
def flipped(world: World, notes: Notes) -> None:
    """Bytes that were altered in the file are never served as what was said."""
    with world.server(tenants=TENANTS) as server:
        key = server.keys["bob"]
        made = [
            world.chat(server.address, key, f"the number of the lighthouse is {4711 + i}").json["pensieve"][
                "conversation"
            ]
            for i in range(4)
        ]
        server.terminate()
        with contextlib.closing(sqlite3.connect(server.store)) as connection, connection:
            rows = connection.execute(
                "SELECT id, messages, token_ids FROM turns ORDER BY created_s"
            ).fetchall()
            altered = rows[0][1].replace("4711", "4712")
            connection.execute("UPDATE turns SET messages = ? WHERE id = ?", (altered, rows[0][0]))
            tokens = bytearray(rows[1][2])
            tokens[8] ^= 1
            connection.execute("UPDATE turns SET token_ids = ? WHERE id = ?", (bytes(tokens), rows[1][0]))
            connection.execute("UPDATE turns SET token_ids = ? WHERE id = ?", (rows[2][2][:-4], rows[2][0]))
        server.start()
        for what, conversation in zip(
            ("a message's digit", "a token's bit", "a token less", "nothing"), made, strict=True
        ):
            shown = get(server.address, f"/v1/pensieve/conversations/{conversation}", key)
            turn = post(
                server.address,
                RESPONSES,
                {"input": "Go on.", "conversation": conversation, "max_output_tokens": 4, "ignore_eos": True},
                key,
            )
            notes.say(f"{what}: shown {shown.status}, next turn {turn.status}")
            if what == "nothing":
                notes.hold(
                    shown.status == 200 and turn.status == 200, f"an unaltered conversation: {shown}, {turn}"
                )
            else:
                notes.hold(turn.status >= 400, f"{what} altered: the next turn went on from it ({turn})")
                if what == "a message's digit":
                    notes.hold(b"4712" not in shown.body, "an altered message is shown as what was said")


@attack("store/two-servers")
def two(world: World, notes: Notes) -> None:
    """A second server on the same store leaves the first one's answers under way alone, and one key is answered once."""
    with world.server(tenants=TENANTS) as first:
        key = first.keys["bob"]
        asked = [
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": f"Stream {i}."}],
                "max_tokens": 5000,
                "ignore_eos": True,
                "stream": True,
            }
            for i in range(6)
        ]
        ended: list[str] = []
        counts: list[int] = []

        def read(body: dict[str, Any]) -> None:
            told, pieces = "broken off", 0
            try:
                for event in events(first.address, CHAT, body, key, 240.0):
                    if "error" in event:
                        told = str(event["error"].get("code"))
                    for choice in event.get("choices", ()):
                        pieces += 1
                        told = choice["finish_reason"] or told
            except (OSError, ValueError) as error:
                told = type(error).__name__
            ended.append(told)
            counts.append(pieces)

        with (
            world.server(tenants=TENANTS, start=False, store=first.store) as second,
            ThreadPoolExecutor(6) as pool,
        ):
            shutil.copy(first.key_path, second.key_path)
            second.keys = first.keys
            jobs = [pool.submit(read, body) for body in asked]
            time.sleep(0.8)
            under_way = not any(job.done() for job in jobs)
            second.start()
            for job in jobs:
                job.result()
            stored = interrupted(first.store)
            notes.say(
                f"{ended.count('length')} of 6 answers came to their end, {sorted(set(ended))}; {stored} stored as interrupted"
            )
            notes.hold(under_way, "the answers ended before the second server began: nothing was tried")
            notes.hold(
                ended.count("length") == 6,
                f"{6 - ended.count('length')} of 6 answers were broken: {sorted(set(ended))}",
            )
            notes.hold(stored == 0, f"{stored} turns are stored as interrupted")
            _one_key(world, notes, first, second)


def interrupted(store: Path) -> int:
    """Turns that a store holds as interrupted."""
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        return int(
            connection.execute("SELECT count(*) FROM turns WHERE reply_reason = 'interrupted'").fetchone()[0]
        )


def whole_turns(store: Path, words: str) -> int:
    """Turns with an answer to a question that holds these words."""
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
        rows = connection.execute(
            "SELECT messages, reply_reason FROM turns WHERE instr(messages, ?) > 0", (words,)
        ).fetchall()
    return sum(
        reason not in (None, "interrupted") and words in json.dumps(json.loads(messages)[:-1])
        for messages, reason in rows
    )


def _one_key(world: World, notes: Notes, first: Served, second: Served) -> None:
    """The same request with the same key at both servers at once, twelve times."""
    key = first.keys["bob"]
    doubled = unanswered = different = 0
    for i in range(12):
        question = f"only-once-{i:03d}"
        with ThreadPoolExecutor(4) as pool:
            servers = [first, second, first, second]
            replies = list(
                pool.map(
                    lambda server, question=question: world.chat(
                        server.address, key, question, 60, Idempotency_Key=question
                    ),
                    servers,
                )
            )
        for index, server in enumerate(servers):
            until = time.monotonic() + 20
            while replies[index].status in (409, 429, 503) and time.monotonic() < until:
                time.sleep(0.2)
                replies[index] = world.chat(server.address, key, question, 60, Idempotency_Key=question)
        unanswered += sum(reply.status != 200 for reply in replies)
        different += len({(reply.json or {}).get("id") for reply in replies}) > 1
        doubled += whole_turns(first.store, question) != 1
    notes.say(
        f"one key at both, 12 times: {doubled} doubled, {different} with two answers, {unanswered} unanswered",
        doubled=doubled,
    )
    notes.hold(
        not (doubled or different or unanswered),
        f"one key at two servers: {doubled} doubled, {different} with two answers, {unanswered} unanswered",
    )


@attack("store/recovered-by-another")
def recovered(world: World, notes: Notes) -> None:
    """What a killed server had under way is recovered by another server on the store, on another port, also one that runs already."""
    with world.server(tenants=TENANTS) as first:
        key = first.keys["bob"]
        with world.server(tenants=TENANTS, start=False, store=first.store) as second:
            shutil.copy(first.key_path, second.key_path)
            second.keys = first.keys
            second.start()
            made = post(
                first.address,
                RESPONSES,
                {"input": "Count.", "background": True, "max_output_tokens": 8000, "ignore_eos": True},
                key,
            )
            response = made.json["id"]
            time.sleep(1.2)
            first.kill()
            begun_s = time.monotonic()
            while time.monotonic() - begun_s < LEASE_S:
                found = get(second.address, f"/v1/responses/{response}", key)
                if found.status == 200 and found.json["status"] not in ("in_progress", "queued"):
                    break
                time.sleep(0.5)
            after_s = time.monotonic() - begun_s
            status = (found.json or {}).get("status")
            notes.say(f"{found.status} {status} after {after_s:.1f} s", recovered_s=round(after_s, 1))
            notes.hold(
                found.status == 200 and status == "incomplete",
                f"a dead server's answer is not recovered within {LEASE_S:g} s: {found.status} {status}",
            )


@attack("store/locked")
def locked(world: World, notes: Notes) -> None:
    """Another program that locks the file for 6 s delays turns and nothing else, and loses none."""
    with world.server(tenants=("bystander", "bob")) as server:
        key = server.keys["bob"]
        with world.watched(server, notes, chats=False, max_chat_s=None), ThreadPoolExecutor(12) as pool:
            with contextlib.closing(sqlite3.connect(server.store, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                jobs = [
                    pool.submit(
                        world.chat, server.address, key, f"locked {i}", 4, 40.0, Idempotency_Key=f"locked-{i}"
                    )
                    for i in range(8)
                ]
                listings = [
                    pool.submit(get, server.address, path, key)
                    for path in ("/v1/pensieve/conversations", "/v1/pensieve/map")
                ]
                slow = [job.result().seconds for job in listings]
                time.sleep(6.0)
                other.execute("ROLLBACK")
            replies = [job.result() for job in jobs]
            good = sum(reply.status == 200 for reply in replies)
            again = [
                world.chat(server.address, key, f"locked {i}", 4, Idempotency_Key=f"locked-{i}")
                for i in range(8)
            ]
            notes.say(
                f"{good} of 8 turns answered, the rest {sorted({reply.status for reply in replies if reply.status != 200})}; listings {max(slow):.2f} s"
            )
            notes.hold(max(slow) < 3, f"a listing waited {max(slow):.1f} s for another program's lock")
            notes.hold(
                all(reply.status in (200, 503) for reply in replies),
                f"{sorted({reply.status for reply in replies})}",
            )
            notes.hold(
                all(reply.status == 200 for reply in again),
                f"retries: {sorted({reply.status for reply in again})}",
            )
            doubled = sum(whole_turns(server.store, f"locked {i}") != 1 for i in range(8))
            notes.hold(doubled == 0, f"{doubled} of 8 are not there exactly once")


@attack("store/ttl")
def ttl(world: World, notes: Notes) -> None:
    """A conversation with a ttl lives while it is used, and goes when it has been left alone for so long."""
    with world.server(tenants=TENANTS) as server:
        key = server.keys["bob"]
        made = post(server.address, "/v1/conversations", {}, key).json["id"]
        post(server.address, f"/v1/pensieve/conversations/{made}/ttl", {"seconds": 4}, key)
        begun_s = time.monotonic()
        statuses: list[int] = []
        while time.monotonic() - begun_s < 13:
            turn = {
                "input": f"turn {len(statuses)}",
                "conversation": made,
                "max_output_tokens": 2,
                "ignore_eos": True,
            }
            statuses.append(post(server.address, RESPONSES, turn, key).status)
            time.sleep(0.5)
        left_s = time.monotonic()
        while (
            shown := get(server.address, f"/v1/conversations/{made}", key).status
        ) == 200 and time.monotonic() - left_s < 25:
            time.sleep(0.3)
        notes.say(
            f"{statuses.count(200)} of {len(statuses)} turns over 13 s answered with 4 s to live; then {shown} after {time.monotonic() - left_s:.1f} s"
        )
        notes.hold(
            statuses.count(200) == len(statuses), f"the conversation went in the middle of use: {statuses}"
        )
        notes.hold(shown == 404, "the conversation is still there 25 s after its last turn")


@attack("store/ttl-beside-an-answer", quick=False)
def ttl_under_way(world: World, notes: Notes) -> None:
    """A conversation is not deleted under an answer that takes longer than its ttl."""
    with world.server(tenants=TENANTS) as server:
        key = server.keys["bob"]
        made = post(server.address, "/v1/conversations", {}, key).json["id"]
        post(server.address, f"/v1/pensieve/conversations/{made}/ttl", {"seconds": 1}, key)
        turn = {"input": "Go on.", "conversation": made, "max_output_tokens": 8000, "ignore_eos": True}
        replies: list[Reply] = []
        threads = [
            threading.Thread(target=lambda: replies.append(post(server.address, RESPONSES, turn, key, 60.0)))
        ]
        for thread in threads:
            thread.start()
            thread.join()
        notes.say(f"{replies[0]}")
        notes.hold(replies[0].status == 200, f"a turn longer than its conversation's ttl: {replies[0]}")
