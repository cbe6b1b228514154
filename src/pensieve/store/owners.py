"""Leases in SQL, as steps inside a transaction: which servers live, as far as the store can tell.

Knows tables; never processes or threads.

`now_s` is the store's clock throughout: one for all servers, so that their own clocks may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from pensieve.store.values import LEASE_S, Owner
from pensieve.store.writer import Connection


def join(connection: Connection, owner: str, process: str, now_s: float) -> None:
    """Give a server a lease; one that it has is renewed."""
    if not renew(connection, owner, now_s):
        connection.execute(
            "INSERT INTO owners (id, place, expires_s) VALUES (?, ?, ?)", (owner, process, now_s + LEASE_S)
        )


def renew(connection: Connection, owner: str, now_s: float) -> bool:
    """Renew a lease: whether there was one."""
    connection.execute("UPDATE owners SET expires_s = ? WHERE id = ?", (now_s + LEASE_S, owner))
    return is_known(connection, owner)


def is_known(connection: Connection, owner: str) -> bool:
    """Whether a server has a lease, lapsed or not: nothing of it was recovered."""
    return connection.execute("SELECT 1 FROM owners WHERE id = ?", (owner,)).fetchone() is not None


def ensure(connection: Connection, owner: str, now_s: float) -> None:
    """What a server begins is its own, though its lease was ended meanwhile and it does not know that yet."""
    if owner and not is_known(connection, owner):
        join(connection, owner, "", now_s)


def listed(connection: Connection, now_s: float) -> Sequence[Owner]:
    """All servers with a lease."""
    found = connection.execute("SELECT id, place, expires_s FROM owners ORDER BY expires_s, id").fetchall()
    return [Owner(id, process, expires_s, expires_s <= now_s) for id, process, expires_s in found]


def end(connection: Connection, owner: str, expires_s: float | None = None) -> bool:
    """End a lease, if it ends then: whether it may be recovered."""
    row = connection.execute("SELECT expires_s FROM owners WHERE id = ?", (owner,)).fetchone()
    if expires_s is not None and (row is None or row[0] != expires_s):
        return False
    connection.execute("DELETE FROM owners WHERE id = ?", (owner,))
    return True
