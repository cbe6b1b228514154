"""Whatever moment the process dies at, every acknowledged turn is there afterwards, and none is half there."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pensieve.store import SqliteStore, path_tokens

ROUNDS = 10

# Several threads append; each acknowledgement is printed only after its future resolved.
CHILD = """
import sys, threading
from pensieve.chat import Message
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
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), *NAMES], stdout=subprocess.PIPE, text=True)
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


def test_killed_at_any_moment_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    with SqliteStore(path) as store:
        for name in NAMES:
            store.create("a", name)
    chance = random.Random(1)
    total = 0
    for _ in range(ROUNDS):
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
