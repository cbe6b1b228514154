"""Conversations in a PostgreSQL database.

Knows PostgreSQL's connections and transactions; never what conversations are. Imported only if a store's URL
asks for it: psycopg comes with the extra `postgres`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from pensieve.errors import ConfigError, StoreError, StoreUnavailable
from pensieve.store.conversation_store import ConversationStore
from pensieve.store.postgres_deadline import Deadlines
from pensieve.store.postgres_outage import Outage, Outages
from pensieve.store.postgres_schema import MIGRATIONS, TABLES, Migration, bring_up_to_date, lock_key
from pensieve.store.writer import Connection, Cursor, GroupWriter, Job, Kind

log = logging.getLogger(__name__)

T = TypeVar("T")

READERS = 8  # connections; a reader without one waits
RETRY_S = 0.1
MARK = """
    INSERT INTO writers (id, transaction, used_s) VALUES (?, ?, extract(epoch FROM now()))
    ON CONFLICT (id) DO UPDATE SET transaction = excluded.transaction, used_s = excluded.used_s
    """
STATEMENT_S = 10.0
# seconds after which the connection is closed under a statement that the server should have ended
MARGIN_S = 2.0
MIGRATION_S = 3600.0  # seconds for a statement that goes through whole tables
# libpq's settings unless the URL has others: a lost server is noticed within half a minute.
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
    """A psycopg connection in autocommit mode that takes `?` for values, as the store's SQL does.

    Args:
        raw: psycopg's.
        deadlines: closes the connection under a statement that takes longer than `statement_s` seconds.
    """

    def __init__(
        self, raw: psycopg.Connection[tuple[Any, ...]], deadlines: Deadlines, statement_s: float
    ) -> None:
        self.raw = raw
        self._deadlines = deadlines
        self._statement_s = statement_s

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor:
        """Run one statement."""
        if self.raw.closed:
            return self.raw.execute(_translated(sql), values or None)  # which raises
        with self._deadlines.within(self._statement_s, self.raw.fileno()):
            return self.raw.execute(_translated(sql), values or None)


@functools.lru_cache(maxsize=1024)
def _translated(sql: str) -> bytes:
    return sql.replace("?", "%s").encode()


class PostgresLink:
    """PostgreSQL's transactions, for `GroupWriter`.

    Args:
        connect: makes a connection.
        lock: the advisory lock that every writer takes: they write one after the other, as SQLite's writers
            do, and what a transaction has read stays true until it commits.
        patience_s: how long to try to reconnect.
    """

    errors: tuple[type[Exception], ...] = (psycopg.Error, Outage)

    def __init__(self, connect: Callable[[], PostgresConnection], lock: int, patience_s: float) -> None:
        self.connection = connect()
        self._connect = connect
        self._lock = lock
        self._patience_s = patience_s
        self._id = uuid.uuid4().hex  # of the row in `writers` that shows whether a commit came through
        self._transaction = ""  # the content of that row once the last transaction is committed

    @property
    def in_transaction(self) -> bool:
        return self.connection.raw.info.transaction_status in (
            TransactionStatus.INTRANS,
            TransactionStatus.INERROR,
        )

    @property
    def lost(self) -> bool:
        return self.connection.raw.closed

    def begin(self) -> None:
        """Begin a transaction that no other writer runs beside.

        Nothing is written yet, so a lost connection may be replaced here.
        """
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
        self._transaction = uuid.uuid4().hex
        self.connection.execute(MARK, (self._id, self._transaction))

    def check(self) -> None:
        """Nothing to check: the next connection finds what a server has committed."""

    def outcome(self) -> bool | None:
        """Whether the row of the lost transaction is there.

        Waits for the lock first: the process that served the old connection may still be at work.
        PostgreSQL's own transaction numbers cannot tell, since they may be used again after a crash.
        """
        try:
            self._reconnect()
            self.connection.execute("BEGIN")
            try:
                self.connection.execute("SELECT pg_advisory_xact_lock(?)", (self._lock,))
                row = self.connection.execute(
                    "SELECT transaction FROM writers WHERE id = ?", (self._id,)
                ).fetchone()
                return row is not None and bool(row[0] == self._transaction)
            finally:
                if not self.lost:
                    self.connection.execute("ROLLBACK")
        except self.errors:
            return None

    def kind(self, error: BaseException) -> Kind:
        return kind_of(error)

    def words(self, error: BaseException) -> str:
        return words_of(error)

    def _reconnect(self) -> None:
        """Reconnect. Waits for a server that restarts, but not each time while the server is away."""
        deadline_s = time.monotonic() + self._patience_s
        while True:
            try:
                self.connection = self._connect()
                return
            except Outage as away:
                if away.since_s + self._patience_s <= time.monotonic() or time.monotonic() >= deadline_s:
                    raise
            except psycopg.OperationalError:
                if time.monotonic() >= deadline_s:
                    raise
            time.sleep(RETRY_S)

    def close(self) -> None:
        with contextlib.suppress(*self.errors):
            self.connection.execute("DELETE FROM writers WHERE id = ?", (self._id,))
        self.connection.raw.close()


def kind_of(error: BaseException) -> Kind:
    """Whether a failure of PostgreSQL may pass, means damaged data, or is our mistake."""
    if isinstance(error, psycopg.errors.DataCorrupted | psycopg.errors.IndexCorrupted):
        return "broken"
    return (
        "passing"
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | Outage)
        else "mistake"
    )


def words_of(error: BaseException) -> str:
    """A failure in words without the hosts, users, files and values that the server's own message has."""
    if isinstance(error, psycopg.errors.DiskFull):
        return "the database's disk is full"
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return "lock timeout: another process writes all the time"
    if isinstance(error, Outage | psycopg.OperationalError | psycopg.InterfaceError):
        return "the database cannot be reached, or does not answer in time"
    return f"the database refused it ({type(error).__name__})"


class PostgresStore(ConversationStore):
    """A `ConversationStore` in a PostgreSQL database, in a schema of its own.

    A connection that is lost, or on which a statement takes longer than `statement_s`, is replaced, and the
    work on it is tried once more unless it was committed. While the server cannot be reached, everything
    fails at once; a thread tries to connect meanwhile. The store uses session settings: no pooler that hands
    out connections by the transaction may stand before the server. A commit is as durable as the server's
    settings make it: `fsync=off` loses acknowledged turns with the power.

    `erase` deletes the rows and vacuums the tables. It cannot promise that the bytes are gone: PostgreSQL
    frees the space of a row without overwriting it, and the write-ahead log, its archive, replicas and
    backups hold what was written. So it never reports that it was complete.

    Args:
        url: `postgresql://user:password@host:port/database?parameters`, whatever libpq knows.
        schema: the schema of the tables, made if it is missing.
        busy_timeout_s: how long to wait for other writers, and for a server that restarts.
        statement_s: how long the server may take to answer a statement, except for `erase` and migrations.
        clock: seconds since the epoch; leases go by the server's clock.
        migrations: the schema's history.

    Raises:
        ConfigError: the URL or the schema's name is malformed.
        StoreError: there is no connection, or the schema belongs to another program or a newer version.
    """

    def __init__(
        self,
        url: str,
        *,
        schema: str = "pensieve",
        busy_timeout_s: float = 5.0,
        statement_s: float = STATEMENT_S,
        clock: Callable[[], float] = time.time,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> None:
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
            raise ConfigError(
                f"a schema's name must be lower-case letters, digits and underscores, got {schema!r}"
            )
        try:
            self._parameters = {**CONNECTION_DEFAULTS, **conninfo_to_dict(url)}
        except psycopg.ProgrammingError as error:
            # not the URL itself: it may hold a password
            raise ConfigError(
                "the conversation store's URL must look like postgresql://user:password@host:port/database"
            ) from error
        self._name = "postgresql://{}/{}".format(
            self._parameters.get("host") or "", self._parameters.get("dbname") or ""
        )
        self._schema = schema
        self._busy_timeout_s = busy_timeout_s
        self._statement_s = max(
            statement_s, 2 * busy_timeout_s
        )  # the server gives up waiting for locks by itself
        self._clock = clock
        self._deadlines = Deadlines()
        self._outages = Outages(self._reach)
        try:
            link = PostgresLink(self._connect, lock_key(schema), busy_timeout_s)
            try:
                with contextlib.closing(self._connect(MIGRATION_S).raw) as raw:
                    _migrate(
                        PostgresConnection(raw, self._deadlines, MIGRATION_S), self._name, schema, migrations
                    )
            except BaseException:
                link.close()
                raise
        except BaseException as error:
            self._outages.close()
            self._deadlines.close()
            if not isinstance(error, psycopg.Error | Outage):
                raise
            raise StoreError(
                f"cannot open the conversation store {self._name}: {str(error).strip()}"
            ) from error
        self._writer = GroupWriter(link, self._name)
        self._idle: list[PostgresConnection] = []
        self._idle_lock = threading.Lock()
        self._reading = threading.BoundedSemaphore(READERS)
        self._closed = False

    def close(self) -> None:
        self._outages.close()
        super().close()
        with self._idle_lock:
            self._closed = True
        self._drop_idle()
        self._deadlines.close()

    def trouble(self) -> str | None:
        return self._outages.trouble() or super().trouble()

    def _now_s(self, connection: Connection) -> float:
        """The server's clock: those of the machines that share the store may differ."""
        return float(connection.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone()[0])

    def _reach(self) -> None:
        """Connect, whether or not an outage is known."""
        self._open(self._statement_s).raw.close()

    def _connect(self, statement_s: float | None = None) -> PostgresConnection:
        """A new connection; raises `Outage` at once while the server is known to be away."""
        self._outages.check()
        try:
            return self._open(self._statement_s if statement_s is None else statement_s)
        except psycopg.OperationalError:
            self._outages.begin()
            raise

    def _open(self, statement_s: float) -> PostgresConnection:
        raw = psycopg.connect(**self._parameters, autocommit=True)
        connection = PostgresConnection(raw, self._deadlines, statement_s + MARGIN_S)
        # A transaction of a frozen process must not hold the writers' lock. A commit must return only when it
        # survives a power loss; a stronger setting of the server stays.
        connection.execute(
            "SELECT set_config('search_path', ?, false), set_config('lock_timeout', ?, false), "
            "set_config('statement_timeout', ?, false),"
            " set_config('idle_in_transaction_session_timeout', ?, false),"
            " CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')"
            " THEN set_config('synchronous_commit', 'on', false) END",
            (self._schema, _ms(self._busy_timeout_s), _ms(statement_s), _ms(statement_s)),
        )
        return connection

    def _read(self, query: Job[T]) -> T:
        """Run a query on a connection of its own.

        Tries once more if the server was gone since the connection's last use.
        """
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
            except (psycopg.Error, Outage) as error:
                if not isinstance(error, Outage):
                    log.error("the conversation store %s cannot be read: %s", self._name, str(error).strip())
                failed = StoreUnavailable if kind_of(error) == "passing" else StoreError
                raise failed(f"the conversation store cannot be read: {words_of(error)}") from error

    def _take(self) -> tuple[PostgresConnection, bool]:
        """A connection, and whether it was used before."""
        with self._idle_lock:
            if self._closed:
                raise StoreUnavailable("the conversation store is closed")
            if self._idle:
                return self._idle.pop(), True
        return self._connect(), False

    def _read_with(self, connection: PostgresConnection, query: Job[T]) -> T:
        try:
            connection.execute(
                "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
            )  # all of a query's statements see one state
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

    def _scrub(self) -> tuple[bool, bool]:
        """Give the space of deleted rows back to the tables, beside the writer.

        Whether bytes are left is unknown.
        """
        try:
            with contextlib.closing(self._connect(MIGRATION_S).raw) as raw:
                PostgresConnection(raw, self._deadlines, MIGRATION_S).execute(f"VACUUM {', '.join(TABLES)}")
        except (psycopg.Error, Outage):  # no connection, or a lock on a table: the rows are deleted anyway
            return False, False
        return True, False


def _ms(seconds: float) -> str:
    """A duration in PostgreSQL's notation."""
    return f"{max(1, round(seconds * 1000))}ms"


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
