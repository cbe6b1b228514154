"""Leases in SQL, as steps inside a transaction: which servers live, as far as the store knows.

Knows tables; never processes or threads. `now_s` is always the store's clock, one for all servers, whose own
clocks may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from pensieve.store.values import LEASE_S, Owner
from pensieve.store.writer import Connection


def join(connection: Connection, owner: str, process: str, now_s: float) -> None:
    """Give a server a lease, or renew the one that it has."""
    if not renew(connection, owner, now_s):
        connection.execute(
            "INSERT INTO owners (id, place, expires_s) VALUES (?, ?, ?)", (owner, process, now_s + LEASE_S)
        )


def renew(connection: Connection, owner: str, now_s: float) -> bool:
    """Renew a lease; returns whether there was one."""
    connection.execute("UPDATE owners SET expires_s = ? WHERE id = ?", (now_s + LEASE_S, owner))
    return is_known(connection, owner)


def is_known(connection: Connection, owner: str) -> bool:
    """Whether a server has a lease, lapsed or not, so that nothing of it was recovered."""
    return connection.execute("SELECT 1 FROM owners WHERE id = ?", (owner,)).fetchone() is not None


def ensure(connection: Connection, owner: str, now_s: float) -> None:
    """Give a server a new lease if it has none: its lease may have been ended without its knowledge."""
    if owner and not is_known(connection, owner):
        join(connection, owner, "", now_s)


def listed(connection: Connection, now_s: float) -> Sequence[Owner]:
    """All servers with a lease."""
    found = connection.execute("SELECT id, place, expires_s FROM owners ORDER BY expires_s, id").fetchall()
    return [Owner(id, process, expires_s, expires_s <= now_s) for id, process, expires_s in found]


def end(connection: Connection, owner: str, expires_s: float | None = None) -> bool:
    """End a lease, if it still ends at `expires_s`; returns whether its owner may be recovered."""
    row = connection.execute("SELECT expires_s FROM owners WHERE id = ?", (owner,)).fetchone()
    if expires_s is not None and (row is None or row[0] != expires_s):
        return False
    connection.execute("DELETE FROM owners WHERE id = ?", (owner,))
    return True
