"""Divides a scarce resource among tenants: places, bytes of bodies, recorders.

Knows tenants' names and amounts; never the resource.

One tenant gets no more than its limit. Several tenants together leave room for those that have nothing yet:
the last sixteenth is reserved for these, the last quarter for tenants below an even share. So no tenant waits
for ever for others to stop.
"""

from __future__ import annotations

from collections import Counter

RESERVED_PART = 16  # 1/16 is reserved for tenants that have nothing
EVEN_PART = 4  # 1/4 is reserved for tenants that have less than an even share
MIN_DIVISIBLE = 4  # of fewer units, none are reserved


class Shares:
    """The units of one resource, and how many of them each tenant has. Used by the event loop only."""

    def __init__(self, total: int, per_tenant: int | None = None) -> None:
        """Divide `total` units, of which one tenant gets at most `per_tenant`; None if there is one tenant
        only.
        """
        assert total > 0 and (per_tenant is None or 0 < per_tenant <= total)
        self.total = total
        self.per_tenant = total if per_tenant is None else per_tenant
        self._reserved = 0 if per_tenant is None or total < MIN_DIVISIBLE else max(1, total // RESERVED_PART)
        self._uneven = 0 if per_tenant is None else total // EVEN_PART
        self._held: Counter[str] = Counter()
        self._num_held = 0

    @property
    def num_held(self) -> int:
        """Units that all tenants have."""
        return self._num_held

    def held(self, tenant: str) -> int:
        """Units that a tenant has."""
        return self._held[tenant]

    def has_room(self, tenant: str, amount: int = 1) -> bool:
        """Whether `take` would give `amount` units."""
        free, held = self.total - self._num_held, self._held[tenant]
        if amount > free or held + amount > self.per_tenant:
            return False
        if held == 0:
            return True
        is_even = (held + amount) * len(self._held) <= self.total  # among the tenants that have something
        return free - amount >= (self._reserved if is_even else max(self._reserved, self._uneven))

    def take(self, tenant: str, amount: int = 1) -> bool:
        """Take `amount` units, or none. False if there is no room."""
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
