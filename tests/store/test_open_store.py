"""From a URL to a store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pensieve.errors import ConfigError
from pensieve.store import SqliteStore, open_store


@pytest.mark.parametrize(
    ("url", "made"),
    [
        ("sqlite:///relative.db", "relative.db"),
        ("sqlite:///folder/relative.db", "folder/relative.db"),
        ("sqlite:////{tmp}/absolute.db", "absolute.db"),
        ("plain.db", "plain.db"),
        ("/{tmp}/plain-absolute.db", "plain-absolute.db"),
    ],
)
def test_a_file_is_made_where_the_url_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, made: str
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(url.format(tmp=str(tmp_path).lstrip("/")))
    assert isinstance(store, SqliteStore)
    store.create("a", "one")
    store.close()
    assert (tmp_path / made).exists()


@pytest.mark.parametrize("url", ["sqlite://:memory:", ":memory:"])
def test_a_store_in_memory_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(url)
    assert store.create("a", "one").id == "one"
    store.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "must be one of sqlite:///relative.db"),
        ("sqlite:file.db", "got 'sqlite:file.db'"),
        ("sqlite://file.db", "three slashes"),
        ("sqlite://", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("mysql://user:secret@host/database", "begins with mysql://"),
        ("postgresql+psycopg://user:secret@host/database", r"begins with postgresql\+psycopg://"),
        ("file:file.db?mode=memory", "got 'file:file.db"),
        ("file:///file.db", "begins with file://"),
        (
            "memory",
            "'memory' is no URL and no file's path: :memory: keeps nothing on disk, sqlite:///memory.db is a "
            "file in this directory",
        ),
        (":memory", "sqlite:///memory.db is a file in this directory"),
        ("memory:", ":memory: keeps nothing on disk"),
        ("postgres", "'postgres' is no URL and no file's path"),
        ("~", "'~' is no URL"),
        ("folder", "'folder' is no URL"),
    ],
)
def test_other_urls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=said) as raised:
        open_store(url)
    assert "secret" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_name_of_a_file_that_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    SqliteStore("talks.db").close()
    (tmp_path / "talks.db").rename("talks")
    store = open_store("talks")
    store.create("a", "one")
    store.close()
    for name in ("./new", "~/home.db"):
        store = open_store(name)
        store.create("a", "two")
        store.close()
    assert {"talks", "new", "home.db"} <= {path.name for path in tmp_path.iterdir()}


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "pensieve.store.postgres", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'pensieve-serve\[postgres\]'"):
        open_store("postgresql://host/database")


def test_the_driver_is_loaded_for_postgresql_only() -> None:
    program = "import sys, pensieve.store; pensieve.store.open_store(':memory:').close(); sys.exit('psycopg' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
