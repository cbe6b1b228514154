"""The SQLite database's tables, and the migration of old files.

Knows connections and columns; never what uses them. `PRAGMA user_version` holds the version. To change the
schema, append a function to `MIGRATIONS`; never edit one that was released.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pensieve.errors import StoreError
from pensieve.message import ROOT_DIGEST, Message, extend_digest

APPLICATION_ID = 0x50454E53  # marks a file as ours
RETRY_S = 0.01


def _create(connection: sqlite3.Connection) -> None:
    """From an empty file to version 1."""
    # A turn is deleted with its owner, unless another conversation needs it and inherits it.
    connection.execute(
        """
        CREATE TABLE turns (
            id           TEXT PRIMARY KEY NOT NULL,
            namespace    TEXT NOT NULL,
            owner        INTEGER NOT NULL REFERENCES conversations (key),  -- who added or inherited it
            root         TEXT NOT NULL,     -- the first turn of its tree, perhaps itself
            parent       TEXT REFERENCES turns (id),
            start        INTEGER NOT NULL,  -- tokens of the parent's path in front of token_ids
            stop         INTEGER NOT NULL,  -- tokens of the path up to and with this turn
            token_ids    BLOB NOT NULL,     -- uint32, little-endian
            messages     TEXT NOT NULL,     -- JSON: [[role, content], ...]
            reply_reason TEXT,
            created_s    REAL NOT NULL
        )
        """
    )
    connection.execute("CREATE INDEX turns_by_root ON turns (root)")
    connection.execute("CREATE INDEX turns_by_owner ON turns (owner)")
    connection.execute(
        "CREATE INDEX turns_by_parent ON turns (parent)"
    )  # the foreign key is checked with it on deletion
    connection.execute(
        """
        CREATE TABLE conversations (
            key       INTEGER PRIMARY KEY,
            namespace TEXT NOT NULL,
            id        TEXT NOT NULL,
            leaf      TEXT REFERENCES turns (id),
            created_s REAL NOT NULL,
            updated_s REAL NOT NULL,
            title     TEXT,
            metadata  TEXT NOT NULL,  -- JSON object
            UNIQUE (namespace, id)
        )
        """
    )
    connection.execute("CREATE INDEX conversations_by_leaf ON conversations (leaf)")
    connection.execute("CREATE INDEX conversations_by_use ON conversations (namespace, updated_s)")


def _answers(connection: sqlite3.Connection) -> None:
    """Version 1 to 2: digests to recognise histories, drafts, claims, expiry."""
    connection.execute(
        "ALTER TABLE turns ADD COLUMN digest BLOB NOT NULL DEFAULT x''"
    )  # message.extend_digest over the path's messages
    connection.execute("ALTER TABLE turns ADD COLUMN meta TEXT NOT NULL DEFAULT '{}'")  # JSON object
    for (root,) in connection.execute("SELECT id FROM turns WHERE parent IS NULL").fetchall():
        _add_digests(connection, root)
    connection.execute("CREATE INDEX turns_by_digest ON turns (namespace, digest, created_s)")

    connection.execute("ALTER TABLE conversations ADD COLUMN expires_s REAL")  # NULL = never
    connection.execute("ALTER TABLE conversations ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0")
    for key, title in connection.execute(
        "SELECT key, title FROM conversations WHERE title IS NOT NULL"
    ).fetchall():
        connection.execute(
            "UPDATE conversations SET title = ? WHERE key = ?", (json.dumps(title), key)
        )  # from now on a JSON string
    connection.execute(
        "CREATE INDEX conversations_by_expiry ON conversations (expires_s) WHERE expires_s IS NOT NULL"
    )

    connection.execute(
        """
        CREATE TABLE drafts (
            turn_id      TEXT PRIMARY KEY NOT NULL,  -- what the turn will be called
            owner        TEXT NOT NULL,  -- the process that writes it, by the name it gave
            conversation INTEGER NOT NULL REFERENCES conversations (key),
            parent       TEXT REFERENCES turns (id),
            start        INTEGER NOT NULL,  -- as a turn's
            token_ids    BLOB NOT NULL,
            messages     TEXT NOT NULL,
            meta         TEXT NOT NULL,
            created_s    REAL NOT NULL
        )
        """
    )
    connection.execute("CREATE INDEX drafts_by_conversation ON drafts (conversation)")
    connection.execute("CREATE INDEX drafts_by_parent ON drafts (parent)")
    connection.execute(
        """
        CREATE TABLE draft_tokens (
            turn_id  TEXT NOT NULL REFERENCES drafts (turn_id),
            position INTEGER NOT NULL,  -- which piece of the answer, from 0 on
            ids      BLOB NOT NULL,     -- uint32, little-endian
            text     TEXT NOT NULL,     -- JSON string
            PRIMARY KEY (turn_id, position)
        )
        """
    )
    connection.execute(
        """
        CREATE TABLE claims (
            namespace   TEXT NOT NULL,
            key         TEXT NOT NULL,
            fingerprint BLOB NOT NULL,
            turn_id     TEXT NOT NULL,  -- of a turn that may not be there yet
            created_s   REAL NOT NULL,
            PRIMARY KEY (namespace, key)
        )
        """
    )
    connection.execute("CREATE INDEX claims_by_turn ON claims (turn_id)")
    connection.execute("CREATE INDEX claims_by_age ON claims (created_s)")


def _add_digests(connection: sqlite3.Connection, root: str) -> None:
    """Hash the messages of a tree's turns, parents before children."""
    down = """
        WITH RECURSIVE down (id, height) AS (
            SELECT id, 0 FROM turns WHERE id = ?
            UNION ALL SELECT turns.id, height + 1 FROM turns JOIN down ON turns.parent = down.id
        )
        SELECT id FROM down ORDER BY height
        """
    for (id,) in connection.execute(down, (root,)).fetchall():
        parent, messages = connection.execute(
            "SELECT parent, messages FROM turns WHERE id = ?", (id,)
        ).fetchone()
        digest = ROOT_DIGEST
        if parent is not None:
            (digest,) = connection.execute("SELECT digest FROM turns WHERE id = ?", (parent,)).fetchone()
        for role, content in json.loads(messages):  # as version 1 wrote them
            digest = extend_digest(digest, Message(role, content))
        connection.execute("UPDATE turns SET digest = ? WHERE id = ?", (digest, id))


def _owners(connection: sqlite3.Connection) -> None:
    """Version 2 to 3: owners with leases, times to live, checksums of turns, erasures to complete."""
    connection.execute(
        """
        CREATE TABLE owners (
            id        TEXT PRIMARY KEY NOT NULL,  -- of one start of a server; drafts and claims name it
            place     TEXT NOT NULL,  -- its process, as `processes.own_process` identifies it
            expires_s REAL NOT NULL   -- when its lease ends
        )
        """
    )
    # Older claims, as older drafts, have an owner without a lease: an answer that is not stored whole is
    # recovered.
    connection.execute("ALTER TABLE claims ADD COLUMN owner TEXT NOT NULL DEFAULT 'before version 3'")
    connection.execute(
        "DELETE FROM claims WHERE turn_id IN "
        "(SELECT id FROM turns WHERE reply_reason IN ('interrupted', 'abort'))"
    )
    connection.execute("CREATE INDEX claims_by_owner ON claims (owner)")

    connection.execute(
        "ALTER TABLE conversations ADD COLUMN ttl_s REAL"
    )  # NULL = for ever; expires_s is that long after the last use
    # Version 2 kept neither the time to live nor when it was set: the conversation expires when it would
    # have, if no turn comes.
    connection.execute(
        "UPDATE conversations SET ttl_s = max(0, expires_s - updated_s) WHERE expires_s IS NOT NULL"
    )
    connection.execute("UPDATE conversations SET ttl_s = max(0, expires_s - created_s) WHERE ttl_s = 0")

    connection.execute(
        "ALTER TABLE turns ADD COLUMN checksum BLOB"
    )  # encoding.checksum; NULL = written by version 2 or before

    connection.execute(
        "CREATE TABLE erasures (id INTEGER PRIMARY KEY, requested_s REAL NOT NULL)"
    )  # which conversation it was is not kept
    # written to find out whether writing works
    connection.execute("CREATE TABLE probe (filler BLOB NOT NULL)")


Migration = Callable[[sqlite3.Connection], None]
MIGRATIONS: tuple[Migration, ...] = (_create, _answers, _owners)  # the n-th migrates version n to n + 1


def connect(path: Path | None, busy_timeout_s: float, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode that any thread may use, one at a time. Never makes a file.

    Args:
        path: the file; None for a database in memory.
        busy_timeout_s: how long to wait for another process's lock.
        read_only: refuse to write.
    """
    name = ":memory:" if path is None else f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(
        name, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False, uri=path is not None
    )
    connection.execute(f"PRAGMA busy_timeout = {round(busy_timeout_s * 1000)}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # a commit returns only when it survives a power loss
    connection.execute("PRAGMA fullfsync = ON")  # on macOS a plain fsync stops at the drive's cache
    connection.execute("PRAGMA secure_delete = ON")  # overwrites what a user deletes
    if read_only:
        connection.execute("PRAGMA query_only = ON")
    return connection


def open_for_writing(
    path: Path | None, busy_timeout_s: float, migrations: Sequence[Migration]
) -> sqlite3.Connection:
    """Open a database, made if it is missing, and migrate it.

    Raises:
        StoreError: it cannot be opened, is not ours, or was written by a newer version.
    """
    name = ":memory:" if path is None else str(path)
    connection: sqlite3.Connection | None = None
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # only the owner may read conversations
        connection = connect(path, busy_timeout_s)
        connection.execute(
            "BEGIN"
        )  # one state for all checks: another process may be making the tables right now
        _check(connection, name, len(migrations))  # before anything changes, the journal mode included
        connection.execute("ROLLBACK")
        _use_wal(connection, busy_timeout_s)
        _migrate(connection, name, migrations)
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, (sqlite3.Error, OSError)):
            raise StoreError(f"cannot open the conversation store {name}: {error}") from error
        raise
    return connection


def _check(connection: sqlite3.Connection, name: str, newest: int) -> int:
    """The version of the file, if we may use it."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if application_id != APPLICATION_ID and not (empty and version == 0):
        raise StoreError(
            f"{name} is a database of some other program: choose another path for the conversation store"
        )
    if version > newest:
        raise StoreError(
            f"the conversation store {name} has schema version {version}, this program knows versions up to "
            f"{newest}:"
            " use the newer program that wrote it, or another path"
        )
    return version


def _use_wal(connection: sqlite3.Connection, busy_timeout_s: float) -> None:
    """Switch to write-ahead logging, so that readers read while the writer writes.

    Two processes may try this at once, and SQLite does not wait here.
    """
    deadline_s = time.monotonic() + busy_timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(RETRY_S)


def _migrate(connection: sqlite3.Connection, name: str, migrations: Sequence[Migration]) -> None:
    """Run the missing migrations, all or none."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _check(connection, name, len(migrations))  # again: another process may have been faster
        if version < len(migrations):  # a store that is up to date opens on a full disk, too
            for migration in migrations[version:]:
                migration(connection)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
