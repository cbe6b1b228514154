"""From a URL to a store. Knows which databases there are; nothing of what they do."""

from __future__ import annotations

import time
from collections.abc import Callable

from pensieve.errors import ConfigError
from pensieve.store.base import ConversationStore
from pensieve.store.sqlite import MEMORY, SqliteStore

FORMS = "sqlite:///relative.db, sqlite:////absolute.db, sqlite://:memory:, postgresql://user@host/database, or a file's path"


def open_store(url: str, *, busy_timeout_s: float = 5.0, clock: Callable[[], float] = time.time) -> ConversationStore:
    """Open the conversation store that a URL names; SQLite's is made if it is not there, PostgreSQL's tables are.

    Args:
        url: one of `FORMS`.
        busy_timeout_s: how long to wait for other processes' locks.
        clock: seconds since the epoch.

    Raises:
        ConfigError: the URL has another form, or the database's driver is not installed.
        StoreError: the store cannot be opened, is another program's or a newer one's.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url or url.startswith(("sqlite:", "postgresql:", "postgres:")):
            raise ConfigError(f"a conversation store's URL must be one of {FORMS}, got {url!r}")
        return SqliteStore(url, busy_timeout_s=busy_timeout_s, clock=clock)
    if scheme == "sqlite":
        if rest == MEMORY:
            return SqliteStore(MEMORY, busy_timeout_s=busy_timeout_s, clock=clock)
        if not rest.startswith("/") or rest == "/":
            raise ConfigError(
                f"a SQLite store's URL has three slashes and a path, or four for an absolute one: sqlite:///file.db, got {url!r}"
            )
        return SqliteStore(rest[1:], busy_timeout_s=busy_timeout_s, clock=clock)
    if scheme in ("postgresql", "postgres"):
        try:
            from pensieve.store.postgres import PostgresStore
        except ImportError as error:
            raise ConfigError(f"PostgreSQL needs the extra postgres: pip install 'pensieve-serve[postgres]' ({error})") from error
        return PostgresStore(url, busy_timeout_s=busy_timeout_s, clock=clock)
    # not the URL itself: it may hold a password
    raise ConfigError(f"a conversation store's URL must be one of {FORMS}, got one that begins with {scheme}://")
