"""Dividing what is scarce among tenants: places, bytes of bodies, recorders. Knows tenants' names and amounts; never what is divided.

One tenant gets no more than its limit. Several tenants together leave room for those that have nothing yet: the last sixteenth goes to these
alone, the last quarter only to tenants that have less than an even share. So no tenant waits for ever for the others to stop.
"""

from __future__ import annotations

from collections import Counter

RESERVED_PART = 16  # this part of all is given only to tenants that have nothing
EVEN_PART = 4  # this part of all is given only to tenants that have less than an even share
MIN_DIVISIBLE = 4  # of less than so many units nothing is set aside


class Shares:
    """So many units of one thing, and which tenant has how many of them. Used by the event loop alone."""

    def __init__(self, total: int, per_tenant: int | None = None) -> None:
        """Divide `total` units, of which one tenant gets at most `per_tenant`. None: there is one tenant only, and nothing is set aside."""
        assert total > 0 and (per_tenant is None or 0 < per_tenant <= total)
        self.total = total
        self.per_tenant = total if per_tenant is None else per_tenant
        self._reserved = 0 if per_tenant is None or total < MIN_DIVISIBLE else max(1, total // RESERVED_PART)
        self._uneven = 0 if per_tenant is None else total // EVEN_PART
        self._held: Counter[str] = Counter()
        self._num_held = 0

    @property
    def num_held(self) -> int:
        """Units that are taken, by all tenants."""
        return self._num_held

    def held(self, tenant: str) -> int:
        """Units that a tenant has."""
        return self._held[tenant]

    def has_room(self, tenant: str, amount: int = 1) -> bool:
        """Whether `take` would give so many units."""
        free, held = self.total - self._num_held, self._held[tenant]
        if amount > free or held + amount > self.per_tenant:
            return False
        if held == 0:
            return True
        if (held + amount) * len(
            self._held
        ) <= self.total:  # an even share among the tenants that have something
            return free - amount >= self._reserved
        return free - amount >= max(self._reserved, self._uneven)

    def take(self, tenant: str, amount: int = 1) -> bool:
        """Take so many units, or none of them."""
        if not self.has_room(tenant, amount):
            return False
        if amount:
            self._held[tenant] += amount
            self._num_held += amount
        return True

    def give(self, tenant: str, amount: int = 1) -> None:
        """Give units back."""
        assert 0 <= amount <= self._held[tenant], (tenant, amount, self._held[tenant])
        self._held[tenant] -= amount
        self._num_held -= amount
        if not self._held[tenant]:
            del self._held[tenant]
