"""Conversations in a PostgreSQL database.

Knows PostgreSQL's ways with connections and transactions; never what conversations are.

Imported only where a store's URL asks for it: psycopg comes with the extra `postgres`.
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
MARGIN_S = 2.0  # after which the connection is closed under a statement that the server should have ended
MIGRATION_S = 3600.0  # of a statement that goes through whole tables
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
    """A psycopg connection in autocommit mode that takes `?` for values, as the store's SQL has it.

    Args:
        raw: psycopg's.
        deadlines: what ends a statement that takes longer than `statement_s` seconds, by closing the
            connection.
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
            return self.raw.execute(_translated(sql), values or None)  # (which says so)
        with self._deadlines.within(self._statement_s, self.raw.fileno()):
            return self.raw.execute(_translated(sql), values or None)


@functools.lru_cache(maxsize=1024)
def _translated(sql: str) -> bytes:
    return sql.replace("?", "%s").encode()


class PostgresLink:
    """PostgreSQL's transactions, for `GroupWriter`.

    Args:
        connect: makes a connection.
        lock: the advisory lock that every writer takes, so that they write one after the other as SQLite's
            do: what a transaction has looked at stays true until it commits.
        patience_s: how long to try to connect anew.
    """

    errors: tuple[type[Exception], ...] = (psycopg.Error, Outage)

    def __init__(self, connect: Callable[[], PostgresConnection], lock: int, patience_s: float) -> None:
        self.connection = connect()
        self._connect = connect
        self._lock = lock
        self._patience_s = patience_s
        self._id = uuid.uuid4().hex  # of the row in `writers` by which a commit is found again
        self._transaction = ""  # what that row holds once the last transaction is committed

    @property
    def in_transaction(self) -> bool:
        """Whether one is open."""
        return self.connection.raw.info.transaction_status in (
            TransactionStatus.INTRANS,
            TransactionStatus.INERROR,
        )

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""
        return self.connection.raw.closed

    def begin(self) -> None:
        """Begin a transaction that no other writer runs beside.

        Nothing was written yet, so a lost connection may be replaced here.
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
        """Nothing: what a server has committed is found by the next connection."""

    def outcome(self) -> bool | None:
        """Whether the transaction's mark is there.

        The lock is waited for: the process that served the old connection may not be done yet.

        (PostgreSQL's own numbers of transactions cannot tell: after a crash they may be given to others.)
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
        """See `Link.kind`."""
        return kind_of(error)

    def words(self, error: BaseException) -> str:
        """See `Link.words`."""
        return words_of(error)

    def _reconnect(self) -> None:
        """The server may be starting again: give it a while, but not each time while it is away."""
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
        """Close the connection."""
        with contextlib.suppress(*self.errors):
            self.connection.execute("DELETE FROM writers WHERE id = ?", (self._id,))
        self.connection.raw.close()


def kind_of(error: BaseException) -> Kind:
    """Whether a failure of PostgreSQL may pass, means damaged data, or is a mistake of ours."""
    if isinstance(error, psycopg.errors.DataCorrupted | psycopg.errors.IndexCorrupted):
        return "broken"
    return (
        "passing"
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | Outage)
        else "mistake"
    )


def words_of(error: BaseException) -> str:
    """A failure in words without hosts, users, files or values: the server's own have them."""
    if isinstance(error, psycopg.errors.DiskFull):
        return "the database's disk is full"
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return "lock timeout: another process writes all the time"
    if isinstance(error, Outage | psycopg.OperationalError | psycopg.InterfaceError):
        return "the database cannot be reached, or does not answer in time"
    return f"the database refused it ({type(error).__name__})"


class PostgresStore(ConversationStore):
    """A `ConversationStore` in a PostgreSQL database, in a schema of its own.

    A connection that is lost, or on which a statement takes longer than `statement_s`, is replaced, and what
    was under way on it is tried once more unless it was committed. While the server cannot be reached
    everything fails at once; a thread looks for it meanwhile. Session settings are used: between this and the
    server there may be no pooler that hands out connections by the transaction. A commit is as durable as the
    server's settings make it: `fsync=off` there loses acknowledged turns with the power.

    `erase` deletes the rows and vacuums the tables. It cannot promise that the bytes are gone: PostgreSQL
    frees the space of a row without overwriting it, the write-ahead log and its archive hold what was
    written, and so do replicas and backups. So it never says that it was complete.

    Args:
        url: `postgresql://user:password@host:port/database?parameters`, whatever libpq knows.
        schema: where the tables are, made if it is not there.
        busy_timeout_s: how long to wait for other writers, and for a server that starts again.
        statement_s: how long the server may take to answer a statement; not that of `erase`, nor to bring the
            tables up to date.
        clock: seconds since the epoch; leases go by the server's.
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
        )  # (the server gives up waiting for locks by itself)
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
        """See `ConversationStore.close`."""
        self._outages.close()
        super().close()
        with self._idle_lock:
            self._closed = True
        self._drop_idle()
        self._deadlines.close()

    def trouble(self) -> str | None:
        """See `ConversationStore.trouble`."""
        return self._outages.trouble() or super().trouble()

    def _now_s(self, connection: Connection) -> float:
        """The server's clock: that of the machines that share it may differ."""
        return float(connection.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone()[0])

    def _reach(self) -> None:
        """Connect as `_connect` does, whatever was found before."""
        self._open(self._statement_s).raw.close()

    def _connect(self, statement_s: float | None = None) -> PostgresConnection:
        """A new connection; at once an `Outage` while the server is known to be away."""
        self._outages.check()
        try:
            return self._open(self._statement_s if statement_s is None else statement_s)
        except psycopg.OperationalError:
            self._outages.begin()
            raise

    def _open(self, statement_s: float) -> PostgresConnection:
        raw = psycopg.connect(**self._parameters, autocommit=True)
        connection = PostgresConnection(raw, self._deadlines, statement_s + MARGIN_S)
        # A transaction of a process that is frozen must not hold the writers' lock. A commit returns when it
        # would survive a power loss; a stronger setting of the server's is left alone.
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
        """Run a query on a connection that nobody else uses meanwhile.

        Once more if the server was gone since the connection's last use.
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

        Whether bytes are left cannot be told.
        """
        try:
            with contextlib.closing(self._connect(MIGRATION_S).raw) as raw:
                PostgresConnection(raw, self._deadlines, MIGRATION_S).execute(f"VACUUM {', '.join(TABLES)}")
        except (psycopg.Error, Outage):  # no connection, or a lock on a table: the rows are gone all the same
            return False, False
        return True, False


def _ms(seconds: float) -> str:
    """A time as PostgreSQL's settings take it."""
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
