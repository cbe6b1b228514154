"""The waiting queue: which requests may be admitted next.

Knows tokens to compute and tenants; never room, chunks or time.
"""

from __future__ import annotations

import math
from bisect import bisect, insort
from collections import OrderedDict
from collections.abc import Iterator

from pensieve.core.request import Request, RequestState
from pensieve.core.sequence import tenant_of

MAX_OVERTAKINGS = 32  # of a waiting request by later ones; after that, slots that come free are held for it
LOOK_AHEAD = (
    8  # requests of a tenant considered in one step: the one that waits longest, and those with least work
)
MAX_TENANTS = 32  # tenants considered in one step


class WaitingQueue:
    """Sole writer of the order of admission, of `Request.num_overtaken` and of the tenants' deficits.

    Between tenants: deficit round robin (Shreedhar and Varghese, SIGCOMM '95), counted in tokens to compute.
    Among the requests of one tenant: the one that waits longest, then those with the least to compute. A
    request is overtaken at most `MAX_OVERTAKINGS` times, and never while suspended. First come, first served
    ignores tenants and work.
    """

    def __init__(self, quantum_tokens: int, *, fcfs: bool = False) -> None:
        """`quantum_tokens` is what one round adds to each tenant's deficit."""
        self._quantum = quantum_tokens
        self._fcfs = fcfs
        self._by_arrival: list[Request] = []
        self._lines: OrderedDict[str, _Line] = OrderedDict()  # by tenant; the first is next in the round

    def __len__(self) -> int:
        return len(self._by_arrival)

    def __iter__(self) -> Iterator[Request]:
        """In arrival order."""
        return iter(self._by_arrival)

    def __contains__(self, request: Request) -> bool:
        return request in self._by_arrival

    @property
    def head(self) -> Request | None:
        """The request that arrived first; None if none waits."""
        return self._by_arrival[0] if self._by_arrival else None

    def add(self, request: Request) -> None:
        """Queue a new or suspended request by its arrival.

        `request.work` is what it has to compute, in tokens.
        """
        place = bisect(self._by_arrival, request.arrival, key=lambda r: r.arrival)
        # Never less than those behind it: the count does not rise along the queue, and the head's is the
        # highest.
        request.num_overtaken = self._by_arrival[place].num_overtaken if place < len(self._by_arrival) else 0
        self._by_arrival.insert(place, request)
        line = self._lines.setdefault(tenant_of(request.namespace), _Line())
        insort(line.by_arrival, request, key=lambda r: r.arrival)
        insort(line.by_work, (request.work, request.arrival, request))

    def remove(self, request: Request) -> None:
        """A request was admitted or has ended."""
        self._by_arrival.remove(request)
        tenant = tenant_of(request.namespace)
        line = self._lines[tenant]
        line.by_arrival.remove(request)
        line.by_work.remove((request.work, request.arrival, request))
        if not line.by_arrival:
            del self._lines[tenant]  # with its deficit: a tenant that asks for nothing saves nothing up

    def set_work(self, request: Request, work: int) -> None:
        """The cache showed what a waiting request has to compute, in tokens."""
        if work != request.work:
            line = self._lines[tenant_of(request.namespace)]
            line.by_work.remove((request.work, request.arrival, request))
            request.work = work
            insort(line.by_work, (work, request.arrival, request))

    def candidates(self) -> list[Request]:
        """The requests that may be admitted, in the order in which to try them."""
        if self._fcfs or len(self._by_arrival) <= 1:
            return self._by_arrival[:1]
        head = self._by_arrival[0]
        if head.num_overtaken >= MAX_OVERTAKINGS or head.state is RequestState.SUSPENDED:
            return [head]  # (a suspended request has a client that already reads its answer)
        lines = list(self._lines.values())[:MAX_TENANTS]
        if len(lines) == 1:
            return lines[0].first(LOOK_AHEAD)
        ranked: list[tuple[int, int, int, Request]] = []
        for place, line in enumerate(lines):
            for index, request in enumerate(line.first(LOOK_AHEAD)):
                ranked.append((self._rounds(line, request), place, index, request))
        ranked.sort(key=lambda item: item[:3])
        return [request for *_, request in ranked]

    def admit(self, request: Request) -> None:
        """A candidate is admitted: it leaves the queue, and its tenant's deficit pays for it."""
        if not self._fcfs:
            for other in self._by_arrival:
                if other.arrival >= request.arrival:
                    break
                other.num_overtaken += 1
        tenant = tenant_of(request.namespace)
        line = self._lines[tenant]
        if len(self._lines) > 1 and not self._fcfs:
            if rounds := self._rounds(line, request):
                for each in self._lines.values():
                    each.deficit += rounds * self._quantum
            line.deficit -= request.work
            if line.deficit <= 0:
                self._lines.move_to_end(tenant)
        else:
            line.deficit = 0
        self.remove(request)

    def _rounds(self, line: _Line, request: Request) -> int:
        """Rounds until a tenant's deficit covers a request."""
        return max(0, math.ceil((request.work - line.deficit) / self._quantum))


class _Line:
    """The waiting requests of one tenant."""

    __slots__ = ("by_arrival", "by_work", "deficit")

    def __init__(self) -> None:
        self.by_arrival: list[Request] = []
        self.by_work: list[tuple[int, int, Request]] = []  # (tokens to compute, arrival, request)
        self.deficit = 0  # tokens that the tenant may still use in this round

    def first(self, count: int) -> list[Request]:
        """The one that waits longest, then those with the least to compute."""
        head = self.by_arrival[0]
        return [head, *(request for _, _, request in self.by_work[:count] if request is not head)]
