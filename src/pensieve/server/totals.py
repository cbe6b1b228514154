"""Each tenant's token counts since the server started.

Knows receipts and tenants; never the engine's own counters.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from pensieve.engine.messages import Stats, tenant_of
from pensieve.server.answer import Answer

SOURCES = ("gpu", "cpu", "recomputed", "new")
COUNTED = (*(f"{name}_tokens" for name in SOURCES), "output_tokens", "bytes_in", "bytes_out")
STEPS = 16  # a tenant that shares the server sees the fill of a tier in sixteenths


class Totals:
    """Sole owner of the tenants' counters. Used by the event loop only."""

    def __init__(self) -> None:
        self._of: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, answer: Answer) -> None:
        """Count an answer that has ended."""
        if answer.done is None:
            return
        counts = self._of[tenant_of(answer.namespace)]
        for name in COUNTED:
            counts[name] += getattr(answer.done.receipt, name)

    def of(self, tenant: str) -> dict[str, int]:
        """The counters of one tenant."""
        counts = self._of.get(tenant, Counter[str]())
        return {name: counts[name] for name in COUNTED}


def tiers_json(stats: Stats, *, exact: bool) -> list[dict[str, Any]]:
    """The fill of each tier in chunks; rounded to sixteenths unless `exact`, because it would show other
    tenants' lengths.
    """
    told = []
    for tier in stats.tiers:
        step = 1 if exact else max(1, -(-tier.num_slots // STEPS))
        used = min(tier.num_slots, -(-tier.used // step) * step)
        reclaimable = min(used, tier.reclaimable // step * step)
        told.append(
            {
                "name": tier.name,
                "num_slots": tier.num_slots,
                "used": used,
                "reclaimable": reclaimable,
                "free": tier.num_slots - used,
            }
        )
    return told
