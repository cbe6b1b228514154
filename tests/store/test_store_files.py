"""A SQLite store whose files are deleted, replaced or moved while it is open.

Nothing is acknowledged into a file without a name.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_contract import log, say, user

from pensieve.errors import StoreError, StoreUnavailable
from pensieve.store import SqliteStore, writer
from pensieve.store.schema import connect


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "c.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(path) as made:
        made.create("a", "one")
        say(made, "one", "hi", [1])
        yield made


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def delete_all(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        beside(path, suffix).unlink()


def replace(path: Path) -> None:
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    copy.replace(path)


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def another_in_its_place(path: Path) -> None:
    move_folder(path)
    path.parent.mkdir()
    SqliteStore(path).close()


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (delete_all, "was deleted or moved away"),
        (lambda path: path.unlink(), "was deleted or moved away"),
        (replace, "was replaced by another file"),
        (move_folder, "was deleted or moved away"),
        (another_in_its_place, "was replaced by another file"),
        (lambda path: beside(path, "-wal").unlink(), r"beside it \(wal\) was deleted"),
        (lambda path: beside(path, "-shm").unlink(), r"beside it \(shm\) was deleted"),
    ],
)
def test_a_file_that_is_lost_takes_no_more_turns(
    store: SqliteStore, path: Path, lose: Callable[[Path], None], said: str
) -> None:
    lose(path)
    there = sorted(file.name for file in path.parent.iterdir()) if path.parent.exists() else []
    for attempt in (
        lambda: store.append("a", "one", None, user("x"), [1]).result(timeout=30),
        lambda: store.create("a", "two"),
        lambda: store.claim("a", "key", b"", "t"),
        lambda: store.get("a", "one"),  # what would be read is not what the next start finds
        lambda: store.list("a"),
        lambda: store.erase("a", "one"),
    ):
        with pytest.raises(StoreUnavailable, match=said) as raised:
            attempt()
        assert str(path) not in raised.value.message and path.parent.name not in raised.value.message
    assert store.trouble() is not None and said.replace("\\", "") in store.trouble().replace("\\", "")  # type: ignore[union-attr]
    assert (
        sorted(file.name for file in path.parent.iterdir()) if path.parent.exists() else []
    ) == there  # nothing was made


def test_a_turn_during_which_the_file_is_lost_is_not_acknowledged(store: SqliteStore, path: Path) -> None:
    def job(connection: sqlite3.Connection) -> None:
        delete_all(path)

    deleted = store._writer.submit(job)
    with pytest.raises(StoreUnavailable, match="was deleted or moved away"):
        deleted.result(timeout=30)


def test_a_folder_that_is_moved_back_is_taken_up_again(store: SqliteStore, path: Path) -> None:
    move_folder(path)
    with pytest.raises(StoreError):
        say(store, "one", "x", [2])
    path.parent.with_name("elsewhere").rename(path.parent)
    with pytest.raises(StoreError):
        store._writer.probe(lambda connection: connection.execute("nonsense"))
    assert store.trouble() is not None  # only a probe that succeeds ends it
    store.probe()
    assert store.trouble() is None
    assert say(store, "one", "x", [2]).token_ids == (2,)
    assert log(store, "one") == [1, 2]


def test_reading_makes_no_file(tmp_path: Path) -> None:
    for read_only in (True, False):
        with pytest.raises(sqlite3.OperationalError, match="unable to open"):
            connect(tmp_path / "none.db", 1, read_only=read_only).execute("SELECT 1 FROM turns")
    assert list(tmp_path.iterdir()) == []


def test_a_store_named_by_a_relative_path_is_found_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SqliteStore("c.db") as store:
        store.create("a", "one")
        (tmp_path / "sub").mkdir()
        monkeypatch.chdir(tmp_path / "sub")
        assert [one.id for one in store.list("a")] == ["one"]
        say(store, "one", "x", [1])


@pytest.mark.parametrize("name", ["a b.db", "50%.db", "what?.db", "#1.db", "ü.db", "a&mode=memory.db"])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    with SqliteStore(tmp_path / name) as store:
        store.create("a", "one")
        assert store.get("a", "one").id == "one"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_full_disk_is_trouble_until_a_probe_finds_room(store: SqliteStore, path: Path) -> None:
    def room(pages: int) -> None:
        store._writer.call(
            lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchone(), alone=True
        )

    store._writer.call(lambda connection: connection.execute("PRAGMA wal_checkpoint").fetchall(), alone=True)
    room(1)  # (as many as there are)
    with pytest.raises(StoreUnavailable, match="disk is full") as raised:
        store.append("a", "one", None, user("x"), range(100_000)).result(timeout=30)
    assert raised.value.http_status == 503 and str(path) not in raised.value.message
    assert store.trouble() == "the conversation store failed: database or disk is full"
    with pytest.raises(StoreUnavailable):
        store.probe()
    say(store, "one", "small", [2])  # fits into what is left of a page: no proof
    assert store.trouble() is not None
    room(1 << 30)
    store.probe()
    assert store.trouble() is None


def test_a_write_that_does_not_end_is_trouble(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "STUCK_S", 0.05)
    hold, begun = threading.Event(), threading.Event()

    def job(connection: sqlite3.Connection) -> None:
        begun.set()
        hold.wait(30)

    stuck = store._writer.submit(job)
    assert begun.wait(10) and store.trouble() is None
    time.sleep(0.1)
    assert "has not ended a write" in (store.trouble() or "")
    hold.set()
    stuck.result(timeout=30)
    assert store.trouble() is None


def test_a_store_that_is_up_to_date_opens_without_writing(store: SqliteStore, path: Path) -> None:
    """As it must on a full disk."""
    before = path.stat().st_size, beside(path, "-wal").stat().st_size
    SqliteStore(path).close()
    assert (path.stat().st_size, beside(path, "-wal").stat().st_size) == before
