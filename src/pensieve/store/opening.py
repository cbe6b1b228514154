"""Opens the store that a URL names. Knows which databases there are; never what they do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pensieve.errors import ConfigError
from pensieve.store.conversation_store import ConversationStore
from pensieve.store.sqlite import MEMORY, SqliteStore

FORMS = (
    "sqlite:///relative.db, sqlite:////absolute.db, sqlite://:memory:, postgresql://user@host/database, "
    "or a file's path (with a / or a suffix)"
)
_SCHEMES = ("sqlite:", "postgresql:", "postgres:", "file:")  # beginnings of URLs, right or wrong


def open_store(
    url: str, *, busy_timeout_s: float = 5.0, clock: Callable[[], float] = time.time
) -> ConversationStore:
    """Open the conversation store that a URL names.

    SQLite's file, or PostgreSQL's tables, are made if they are missing.

    Args:
        url: one of `FORMS`.
        busy_timeout_s: how long to wait for other processes' locks.
        clock: seconds since the epoch.

    Raises:
        ConfigError: the URL has another form, or the database's driver is not installed.
        StoreError: the store cannot be opened, or belongs to another program or a newer version.
    """
    if (path := sqlite_path(url)) is not None:
        return SqliteStore(path, busy_timeout_s=busy_timeout_s, clock=clock)
    try:
        from pensieve.store.postgres import PostgresStore
    except ImportError as error:
        raise ConfigError(
            f"PostgreSQL needs the extra postgres: pip install 'pensieve-serve[postgres]' ({error})"
        ) from error
    return PostgresStore(url, busy_timeout_s=busy_timeout_s, clock=clock)


def sqlite_path(url: str) -> str | None:
    """The file that a store's URL names, or ":memory:"; None for PostgreSQL. Opens nothing.

    A URL without a scheme is a path, if it looks like one: with a separator or a suffix, or the name of an
    existing file. A bare word is more likely meant for something else (`memory`), and would become a file of
    that name.

    Raises:
        ConfigError: the URL has another form.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url or url.startswith(_SCHEMES):
            raise ConfigError(f"a conversation store's URL must be one of {FORMS}, got {url!r}")
        path = Path(url).expanduser()
        if url != MEMORY and not ("/" in url or path.suffix or path.is_file()):
            raise ConfigError(
                f"a conversation store {url!r} is no URL and no file's path: {MEMORY} keeps nothing on disk, "
                f"sqlite:///{url.strip(':')}.db is a file in "
                f"this directory; or one of {FORMS}"
            )
        return url if url == MEMORY else str(path)
    if scheme == "sqlite":
        if rest != MEMORY and (not rest.startswith("/") or rest == "/"):
            raise ConfigError(
                "a SQLite store's URL has three slashes and a path, or four for an absolute one: "
                f"sqlite:///file.db, got {url!r}"
            )
        return rest if rest == MEMORY else rest[1:]
    if scheme in ("postgresql", "postgres"):
        return None
    # not the URL itself: it may hold a password
    raise ConfigError(
        f"a conversation store's URL must be one of {FORMS}, got one that begins with {scheme}://"
    )
