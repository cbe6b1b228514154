"""The PostgreSQL tables, and the migration of old ones.

Knows connections and columns; never what uses them. All tables are in a schema of their own. Its table
`schema_version` holds the version. To change the schema, append a function to `MIGRATIONS`; never edit one
that was released.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from pensieve.errors import StoreError
from pensieve.store.writer import Connection


def _create(connection: Connection) -> None:
    """From an empty schema to version 1. `schema`, SQLite's, says what the columns mean."""
    connection.execute(
        """
        CREATE TABLE turns (
            id           TEXT PRIMARY KEY,
            namespace    TEXT NOT NULL,
            owner        BIGINT NOT NULL,
            root         TEXT NOT NULL,
            parent       TEXT REFERENCES turns (id),
            start        BIGINT NOT NULL,
            stop         BIGINT NOT NULL,
            token_ids    BYTEA NOT NULL,
            messages     TEXT NOT NULL,  -- as text: JSON types refuse NUL and lone surrogates, even escaped
            reply_reason TEXT,
            created_s    DOUBLE PRECISION NOT NULL,
            digest       BYTEA NOT NULL,
            meta         TEXT NOT NULL
        )
        """
    )
    connection.execute(
        """
        CREATE TABLE conversations (
            key       BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            namespace TEXT NOT NULL,
            id        TEXT NOT NULL,
            leaf      TEXT REFERENCES turns (id),
            created_s DOUBLE PRECISION NOT NULL,
            updated_s DOUBLE PRECISION NOT NULL,
            title     TEXT,
            metadata  TEXT NOT NULL,
            expires_s DOUBLE PRECISION,
            pinned    INTEGER NOT NULL,
            UNIQUE (namespace, id)
        )
        """
    )
    connection.execute("ALTER TABLE turns ADD FOREIGN KEY (owner) REFERENCES conversations (key)")
    connection.execute(
        """
        CREATE TABLE drafts (
            turn_id      TEXT PRIMARY KEY,
            owner        TEXT NOT NULL,
            conversation BIGINT NOT NULL REFERENCES conversations (key),
            parent       TEXT REFERENCES turns (id),
            start        BIGINT NOT NULL,
            token_ids    BYTEA NOT NULL,
            messages     TEXT NOT NULL,
            meta         TEXT NOT NULL,
            created_s    DOUBLE PRECISION NOT NULL
        )
        """
    )
    connection.execute(
        """
        CREATE TABLE draft_tokens (
            turn_id  TEXT NOT NULL REFERENCES drafts (turn_id),
            position BIGINT NOT NULL,
            ids      BYTEA NOT NULL,
            text     TEXT NOT NULL,
            PRIMARY KEY (turn_id, position)
        )
        """
    )
    connection.execute(
        """
        CREATE TABLE claims (
            namespace   TEXT NOT NULL,
            key         TEXT NOT NULL,
            fingerprint BYTEA NOT NULL,
            turn_id     TEXT NOT NULL,
            created_s   DOUBLE PRECISION NOT NULL,
            PRIMARY KEY (namespace, key)
        )
        """
    )
    for index in (
        "turns_by_root ON turns (root)",
        "turns_by_owner ON turns (owner)",
        "turns_by_parent ON turns (parent)",
        "turns_by_digest ON turns (namespace, digest, created_s)",
        "conversations_by_leaf ON conversations (leaf)",
        "conversations_by_use ON conversations (namespace, updated_s)",
        "conversations_by_expiry ON conversations (expires_s) WHERE expires_s IS NOT NULL",
        "drafts_by_conversation ON drafts (conversation)",
        "drafts_by_parent ON drafts (parent)",
        "claims_by_turn ON claims (turn_id)",
        "claims_by_age ON claims (created_s)",
    ):
        connection.execute(f"CREATE INDEX {index}")


def _owners(connection: Connection) -> None:
    """Version 1 to 2, as SQLite's version 2 to 3."""
    connection.execute(
        "CREATE TABLE owners (id TEXT PRIMARY KEY, place TEXT NOT NULL, expires_s DOUBLE PRECISION NOT NULL)"
    )
    connection.execute("ALTER TABLE claims ADD COLUMN owner TEXT NOT NULL DEFAULT 'before version 2'")
    connection.execute(
        "DELETE FROM claims WHERE turn_id IN "
        "(SELECT id FROM turns WHERE reply_reason IN ('interrupted', 'abort'))"
    )
    connection.execute("CREATE INDEX claims_by_owner ON claims (owner)")
    connection.execute("ALTER TABLE conversations ADD COLUMN ttl_s DOUBLE PRECISION")
    connection.execute(
        "UPDATE conversations SET ttl_s = greatest(0, expires_s - updated_s) WHERE expires_s IS NOT NULL"
    )
    connection.execute("UPDATE conversations SET ttl_s = greatest(0, expires_s - created_s) WHERE ttl_s = 0")
    connection.execute("ALTER TABLE turns ADD COLUMN checksum BYTEA")
    connection.execute(
        "CREATE TABLE erasures (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
        "requested_s DOUBLE PRECISION NOT NULL)"
    )
    connection.execute("CREATE TABLE probe (filler BYTEA NOT NULL)")
    # What a process's last transaction wrote: it shows whether a commit came through when the connection was
    # lost.
    connection.execute(
        "CREATE TABLE writers (id TEXT PRIMARY KEY, transaction TEXT NOT NULL, used_s DOUBLE PRECISION NOT "
        "NULL)"
    )


WRITERS_S = 7 * 86400.0  # seconds after which the row of a process that was killed is deleted
TABLES = (
    "conversations",
    "turns",
    "drafts",
    "draft_tokens",
    "claims",
)  # the tables with users' text, and what refers to them
Migration = Callable[[Connection], None]
MIGRATIONS: tuple[Migration, ...] = (_create, _owners)  # the n-th migrates version n to n + 1


def lock_key(schema: str) -> int:
    """The number of the advisory lock of this schema's writers."""
    return int.from_bytes(
        hashlib.blake2b(f"pensieve.{schema}".encode(), digest_size=8).digest(), "big", signed=True
    )


def bring_up_to_date(connection: Connection, name: str, schema: str, migrations: Sequence[Migration]) -> None:
    """Make the schema and run the missing migrations, all or none, under a lock.

    Args:
        connection: in a transaction, its search path on the schema.
        name: what messages call the database.
        schema: the schema of the tables.
        migrations: the schema's history.

    Raises:
        StoreError: the schema holds another program's tables, or those of a newer version.
    """
    connection.execute("SELECT pg_advisory_xact_lock(?)", (lock_key(schema),))
    if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = ?", (schema,)).fetchone() is None:
        connection.execute(f"CREATE SCHEMA {schema}")
    tables = {
        row[0]
        for row in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = ?", (schema,))
    }
    if "schema_version" in tables:
        (version,) = connection.execute("SELECT version FROM schema_version").fetchone()
    elif tables:
        raise StoreError(
            f"the schema {schema} of {name} holds tables of some other program: choose another database for "
            "the conversation store"
        )
    else:
        version = 0
        connection.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
        connection.execute("INSERT INTO schema_version VALUES (0)")
    if version > len(migrations):
        raise StoreError(
            f"the conversation store {name} has schema version {version}, this program knows versions up to "
            f"{len(migrations)}:"
            " use the newer program that wrote it, or another database"
        )
    if version < len(migrations):
        for migration in migrations[version:]:
            migration(connection)
        connection.execute("UPDATE schema_version SET version = ?", (len(migrations),))
    if "writers" in tables:
        connection.execute("DELETE FROM writers WHERE used_s < extract(epoch FROM now()) - ?", (WRITERS_S,))
