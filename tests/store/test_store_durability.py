"""Whatever moment the process dies or the power fails at, every acknowledged turn is there afterwards, and
none is half there.
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pensieve.errors import ConversationNotFound
from pensieve.message import Message
from pensieve.store import SqliteStore, path_tokens

# Several threads append; each acknowledgement is printed only after its future resolved.
CHILD = """
import sys, threading
from pensieve.message import Message
from pensieve.store import SqliteStore

store = SqliteStore(sys.argv[1])
lock = threading.Lock()

def converse(name):
    parent = store.get("a", name).leaf
    number = len(store.path("a", parent))
    while True:
        turn = store.append("a", name, parent, [Message("user", f"{name} {number}")], [number] * (1 + number % 300)).result()
        parent, number = turn.id, number + 1
        with lock:
            print(name, number, turn.id, flush=True)

for name in sys.argv[2:]:
    threading.Thread(target=converse, args=(name,)).start()
"""
NAMES = ["one", "two", "three", "four"]


def kill_once(path: Path, alive_s: float) -> dict[str, tuple[int, str]]:
    """Let a process append for a while, kill it, and return the last acknowledgement of each conversation."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), *NAMES], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    lines = [child.stdout.readline()]  # it runs
    time.sleep(alive_s)
    child.send_signal(signal.SIGKILL)
    lines += child.stdout.read().splitlines(keepends=True)
    child.wait()
    child.stdout.close()
    acknowledged: dict[str, tuple[int, str]] = {}
    for line in lines:
        if line.endswith("\n"):  # the last one may be cut
            name, number, turn_id = line.split()
            acknowledged[name] = (int(number), turn_id)
    return acknowledged


def check(path: Path, acknowledged: dict[str, tuple[int, str]]) -> None:
    with SqliteStore(path) as store:
        for count, turn_id in acknowledged.values():
            assert len(store.path("a", turn_id)) == count
        for name in NAMES:
            turns = store.path("a", store.get("a", name).leaf)
            assert len(turns) >= acknowledged.get(name, (0, ""))[0]
            assert [turn.messages[0].content for turn in turns] == [f"{name} {i}" for i in range(len(turns))]
            assert path_tokens(turns) == [i for i in range(len(turns)) for _ in range(1 + i % 300)]


@pytest.mark.parametrize("rounds", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_nothing_acknowledged_is_lost(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "c.db"
    with SqliteStore(path) as store:
        for name in NAMES:
            store.create("a", name)
    chance = random.Random(1)
    total = 0
    for _ in range(rounds):
        acknowledged = kill_once(path, alive_s=chance.uniform(0.0, 0.25))
        total += len(acknowledged)
        check(path, acknowledged)
    assert total > 0


def test_the_check_sees_a_lost_turn(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    with SqliteStore(path) as store:
        for name in NAMES:
            store.create("a", name)
    acknowledged = kill_once(path, alive_s=0.1)
    name = next(iter(acknowledged))
    with SqliteStore(path) as store:
        store.set_leaf("a", name, None)
    with pytest.raises(AssertionError):
        check(path, acknowledged)


# -- power loss

TURNS = 30
CUTS = 40
vfs_names = (f"recording-{number}" for number in itertools.count())


def record(path: Path, synchronous: str = "FULL") -> Any:
    """Run a store for a while on a disk that remembers; what is acknowledged stands among its operations."""
    power_loss = pytest.importorskip("store.power_loss", reason="apsw is not installed")
    disk, name = power_loss.Disk(), next(vfs_names)
    vfs = power_loss.RecordingVfs(name, disk)

    def connect(name_: str, **_: object) -> Any:
        file = Path(unquote(name_.removeprefix("file://").partition("?")[0]))
        connection = power_loss.RecordedConnection(
            file, name, {"synchronous = FULL": f"synchronous = {synchronous}"}
        )
        connection.execute(
            "PRAGMA wal_autocheckpoint = 20"
        ).fetchone()  # pages: often, so that power fails during checkpoints too
        return connection

    def acknowledged(what: tuple[object, ...]) -> Callable[[Future[Any]], None]:
        return lambda future: (
            disk.operations.append(power_loss.Said(what)) if future.exception() is None else None
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sqlite3, "connect", connect)
        with SqliteStore(path) as store:
            for conversation in (*NAMES, "gone"):
                store.create("a", conversation)
            store.append("a", "gone", None, [Message("user", "secret")], [1]).result(timeout=30)
            parents: dict[str, str | None] = dict.fromkeys(NAMES)
            for number in range(TURNS):
                if number == TURNS // 2:
                    store.erase("a", "gone")
                    disk.operations.append(power_loss.Said(("erased", "gone")))
                appended = []
                for conversation in NAMES:  # some in groups: several wait for the same commit
                    turn_id = f"{conversation}-{number}"
                    messages = [Message("user", f"{conversation} {number}")]
                    future = store.append(
                        "a",
                        conversation,
                        parents[conversation],
                        messages,
                        [number] * (1 + number * 37 % 300),
                        turn_id=turn_id,
                    )
                    future.add_done_callback(acknowledged(("turn", conversation, number)))
                    appended.append(future)
                    parents[conversation] = turn_id
                drafting = store.draft("a", "one", None, f"draft-{number}", [], [], None, 0)
                extending = store.extend_draft(f"draft-{number}", [number], "word")
                extending.add_done_callback(acknowledged(("draft", f"draft-{number}")))
                for future in (*appended, drafting, extending):
                    future.result(timeout=30)
    vfs.unregister()
    return disk


def check_power_loss(disk: Any, at: int, chance: random.Random, folder: Path) -> None:
    """Cut the power before operation `at`, and look for everything that was acknowledged by then."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in disk.after_power_loss(at, chance).items():
        (folder / name).write_bytes(content)
    said = [operation.what for operation in disk.operations[:at] if hasattr(operation, "what")]
    if not said:
        return  # perhaps there is no file yet
    with SqliteStore(folder / "c.db") as store:
        assert store._writer.call(
            lambda connection: connection.execute("PRAGMA integrity_check").fetchone()
        ) == ("ok",)
        store.recover_drafts()
        for kind, *what in said:
            if kind == "turn":
                conversation, number = what
                turns = store.path("a", f"{conversation}-{number}")
                assert [turn.messages[0].content for turn in turns] == [
                    f"{conversation} {i}" for i in range(number + 1)
                ]
                assert path_tokens(turns) == [i for i in range(number + 1) for _ in range(1 + i * 37 % 300)]
            elif kind == "draft":
                assert store.turn("a", what[0]).messages[-1].content == "word"
            else:
                with pytest.raises(ConversationNotFound):
                    store.get("a", what[0])
        for conversation in NAMES:  # what was not acknowledged is there or not, but never half
            turns = store.path("a", store.get("a", conversation).leaf)
            assert [turn.messages[0].content for turn in turns] == [
                f"{conversation} {i}" for i in range(len(turns))
            ]


def cuts(disk: Any, count: int, chance: random.Random) -> list[int]:
    """Moments to cut the power at.

    Half of them anywhere, half at once after an acknowledgement, the worst one.
    """
    said = [number + 1 for number, operation in enumerate(disk.operations) if hasattr(operation, "what")]
    return [
        chance.randrange(len(disk.operations) + 1) if i % 2 else chance.choice(said) for i in range(count)
    ]


@pytest.mark.parametrize("count", [CUTS, pytest.param(1000, marks=pytest.mark.slow)])
def test_power_lost_at_any_moment_nothing_acknowledged_is_lost(tmp_path: Path, count: int) -> None:
    disk, chance = record(tmp_path / "c.db"), random.Random(1)
    assert sum(hasattr(operation, "what") for operation in disk.operations) == 5 * TURNS + 1
    for at in cuts(disk, count, chance):
        check_power_loss(disk, at, chance, tmp_path / "after")
    check_power_loss(disk, len(disk.operations), chance, tmp_path / "after")


def test_the_power_loss_sees_a_commit_that_was_not_flushed(tmp_path: Path) -> None:
    disk, chance = (
        record(tmp_path / "c.db", synchronous="NORMAL"),
        random.Random(1),
    )  # as many programs run SQLite
    lost = 0
    for at in cuts(disk, CUTS, chance):
        try:
            check_power_loss(disk, at, chance, tmp_path / "after")
        except (AssertionError, ConversationNotFound):
            lost += 1
    assert lost > 0
