"""Conversations in a PostgreSQL database. Knows PostgreSQL's ways with connections and transactions; never what conversations are.

Imported only where a store's URL asks for it: psycopg comes with the extra `postgres`.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from pensieve.errors import ConfigError, StoreError
from pensieve.store.postgres_schema import MIGRATIONS, TABLES, Migration, bring_up_to_date, lock_key
from pensieve.store.sql import SqlStore
from pensieve.store.writer import Connection, GroupWriter, Job, Rows

T = TypeVar("T")

READERS = 8  # connections; a reader without one waits
RETRY_S = 0.1
# What libpq is told unless the URL says otherwise: a server that is gone is noticed within half a minute.
CONNECTION_DEFAULTS: dict[str, Any] = {
    "application_name": "pensieve",
    "client_encoding": "UTF8",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


class PostgresConnection:
    """A psycopg connection in autocommit mode that takes `?` for values, as the store's SQL has it."""

    def __init__(self, raw: psycopg.Connection[tuple[Any, ...]]) -> None:
        self.raw = raw

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Rows:
        """Run one statement."""
        return self.raw.execute(_translated(sql), values or None)


@functools.lru_cache(maxsize=1024)
def _translated(sql: str) -> bytes:
    return sql.replace("?", "%s").encode()


class PostgresLink:
    """PostgreSQL's transactions, for `GroupWriter`.

    Args:
        connect: makes a connection.
        lock: the advisory lock that every writer takes, so that they write one after the other as SQLite's do: what a transaction has
            looked at stays true until it commits.
        patience_s: how long to try to connect anew.
    """

    errors: tuple[type[Exception], ...] = (psycopg.Error,)

    def __init__(self, connect: Callable[[], PostgresConnection], lock: int, patience_s: float) -> None:
        self.connection = connect()
        self._connect = connect
        self._lock = lock
        self._patience_s = patience_s

    @property
    def in_transaction(self) -> bool:
        """Whether one is open."""
        return self.connection.raw.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""
        return self.connection.raw.closed

    def begin(self) -> None:
        """Begin a transaction that no other writer runs beside. Nothing was written yet, so a lost connection may be replaced here."""
        try:
            self._begin()
        except psycopg.OperationalError:
            if not self.lost:
                raise
            self._reconnect()
            self._begin()

    def _begin(self) -> None:
        self.connection.execute("BEGIN")
        self.connection.execute("SELECT pg_advisory_xact_lock(?)", (self._lock,))

    def _reconnect(self) -> None:
        """The server may be starting again: give it a while."""
        deadline_s = time.monotonic() + self._patience_s
        while True:
            try:
                self.connection = self._connect()
                return
            except psycopg.OperationalError:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(RETRY_S)

    def close(self) -> None:
        """Close the connection."""
        self.connection.raw.close()


class PostgresStore(SqlStore[PostgresConnection]):
    """A `ConversationStore` in a PostgreSQL database, in a schema of its own.

    A lost connection fails what was under way, and is replaced for what comes next. Session settings are used: between this and the
    server there may be no pooler that hands out connections by the transaction. A commit is as durable as the server's settings
    make it: `fsync=off` there loses acknowledged turns with the power.

    `erase` deletes the rows and vacuums the tables. It cannot promise that the bytes are gone: PostgreSQL frees the space of a row without
    overwriting it, the write-ahead log and its archive hold what was written, and so do replicas and backups. So it
    never says that it was complete.

    Args:
        url: `postgresql://user:password@host:port/database?parameters`, whatever libpq knows.
        schema: where the tables are, made if it is not there.
        busy_timeout_s: how long to wait for other writers, and for a server that starts again.
        clock: seconds since the epoch.
        migrations: the schema's history.

    Raises:
        ConfigError: the URL is none, or the schema's name.
        StoreError: there is no connection, or the schema is another program's or a newer one's.
    """

    def __init__(
        self,
        url: str,
        *,
        schema: str = "pensieve",
        busy_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> None:
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
            raise ConfigError(f"a schema's name must be lower-case letters, digits and underscores, got {schema!r}")
        try:
            self._parameters = {**CONNECTION_DEFAULTS, **conninfo_to_dict(url)}
        except psycopg.ProgrammingError as error:
            # not the URL itself: it may hold a password
            raise ConfigError("the conversation store's URL must look like postgresql://user:password@host:port/database") from error
        self._name = "postgresql://{}/{}".format(self._parameters.get("host") or "", self._parameters.get("dbname") or "")
        self._schema = schema
        self._busy_timeout_s = busy_timeout_s
        self._clock = clock
        try:
            link = PostgresLink(self._connect, lock_key(schema), busy_timeout_s)
            try:
                _migrate(link.connection, self._name, schema, migrations)
            except BaseException:
                link.close()
                raise
        except psycopg.Error as error:
            raise StoreError(f"cannot open the conversation store {self._name}: {str(error).strip()}") from error
        self._writer = GroupWriter(link, self._name)
        self._idle: list[PostgresConnection] = []
        self._idle_lock = threading.Lock()
        self._reading = threading.BoundedSemaphore(READERS)
        self._closed = False

    def close(self) -> None:
        """See `ConversationStore.close`."""
        super().close()
        with self._idle_lock:
            self._closed = True
        self._drop_idle()

    def _connect(self) -> PostgresConnection:
        connection = PostgresConnection(psycopg.connect(**self._parameters, autocommit=True))
        timeout = f"{max(1, round(self._busy_timeout_s * 1000))}ms"
        # A commit returns when it would survive a power loss. A stronger setting of the server's is left alone.
        connection.execute(
            "SELECT set_config('search_path', ?, false), set_config('lock_timeout', ?, false),"
            " CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')"
            " THEN set_config('synchronous_commit', 'on', false) END",
            (self._schema, timeout),
        )
        return connection

    def _read(self, query: Job[Connection, T]) -> T:
        """Run a query on a connection that nobody else uses meanwhile; once more if the server was gone since the connection's last use."""
        with self._reading:
            try:
                connection, used = self._take()
                try:
                    return self._read_with(connection, query)
                except psycopg.OperationalError:
                    if not (used and connection.raw.closed):
                        raise
                    self._drop_idle()  # they are as old
                return self._read_with(self._connect(), query)
            except psycopg.Error as error:
                raise StoreError(f"the conversation store {self._name} cannot be read: {str(error).strip()}") from error

    def _take(self) -> tuple[PostgresConnection, bool]:
        """A connection, and whether it was used before."""
        with self._idle_lock:
            if self._closed:
                raise StoreError(f"the conversation store {self._name} is closed")
            if self._idle:
                return self._idle.pop(), True
        return self._connect(), False

    def _read_with(self, connection: PostgresConnection, query: Job[Connection, T]) -> T:
        try:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")  # all of a query's statements see one state
            try:
                return query(connection)
            finally:
                if not connection.raw.closed:
                    connection.execute("ROLLBACK")
        finally:
            with self._idle_lock:
                if self._closed or connection.raw.info.transaction_status != TransactionStatus.IDLE:
                    connection.raw.close()
                else:
                    self._idle.append(connection)

    def _drop_idle(self) -> None:
        with self._idle_lock:
            while self._idle:
                self._idle.pop().raw.close()

    def _scrub(self) -> bool:
        """Give the space of deleted rows back to the tables, beside the writer; whether bytes are left, nobody can tell."""
        try:
            with self._connect().raw as connection:
                connection.execute(f"VACUUM {', '.join(TABLES)}".encode())
        except psycopg.Error:  # no connection, or somebody's lock on a table: the rows are gone all the same
            pass
        return False


def _migrate(connection: PostgresConnection, name: str, schema: str, migrations: Sequence[Migration]) -> None:
    (encoding,) = connection.execute("SHOW server_encoding").fetchone()
    if encoding != "UTF8":
        raise StoreError(f"the database {name} has the encoding {encoding}: a conversation store needs UTF8")
    connection.execute("BEGIN")
    try:
        bring_up_to_date(connection, name, schema, migrations)
        connection.execute("COMMIT")
    except BaseException:
        if not connection.raw.closed:
            connection.execute("ROLLBACK")
        raise
