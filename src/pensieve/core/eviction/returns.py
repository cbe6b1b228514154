"""When an idle conversation comes back, learned online.

Knows contexts and time; never chunks, costs or policies.

Idle time is cut into periods. For each period we estimate the hazard: P(returns in this period | still idle
at its start), by logistic mixing of context models, as in PAQ (Mahoney, Adaptive Weighing of Context Models
for Lossless Data Compression, 2005). The conversation is in several contexts, each of which has counted
returns. A context's log odds relative to the average, weighted by how useful such contexts proved to be, are
added to the average log odds. Long periods have few observations and would look best by chance, so a period
with little evidence is taken to be like the one before it.

Each conversation is one censored observation: it updates every period it outlasts, and the one in which it
returns. So conversations that have not come back (yet) count for exactly as long as they have been idle.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from pensieve.core.eviction.habits import NUM_CONTEXTS, ContextKey

# [0, 2.8 s), then half octaves up to an hour, then octaves: [4096, 8192), ... [131072, ...
STARTS_S: tuple[float, ...] = (0.0, *(2.0 ** (k / 2) for k in range(3, 24)), *(2.0**k for k in range(12, 18)))
NUM_PERIODS = len(STARTS_S)
MAX_CONTEXTS = 32_768  # remembered; the one not met for longest is forgotten first

# Where a length is needed, the last period is as long as all periods before it.
ENDS_S = (*STARTS_S[1:], 2.0 * STARTS_S[-1])
WIDTHS_S = tuple(end_s - start_s for start_s, end_s in zip(STARTS_S, ENDS_S, strict=True))

# Hazard of each period with nothing learned: a rate of 0.5 / idle time, in the shape of the paper's 1 / T.
PRIOR = (
    0.3,
    *(1.0 - math.sqrt(start_s / end_s) for start_s, end_s in zip(STARTS_S[1:], ENDS_S[1:], strict=True)),
)
_LOG_STAYS = [math.log(1.0 - chance) for chance in PRIOR]
# Length of each period in periods like the one before it: 2 where octaves begin (1 for the first two
# periods).
_WORTH = [1.0, 1.0, *(after / before for before, after in itertools.pairwise(_LOG_STAYS[1:]))]

_LEARNING_RATE = 0.05
_FIRST_TRUST = 1.5 / NUM_CONTEXTS  # contexts overlap, so together they weigh little more than one
_DOUBT = 2.0  # average conversations with which a context's counts begin
_DOUBT_OF_ALL = 20.0  # conversations like those of the period before, with which the average's counts begin
_HOPE = 0.002  # share of `PRIOR` in these, so that no hazard is ever 0
_RIPE = 1000.0  # observed conversations after which those no longer matter
_MEMORY = 1000.0  # conversations; beyond it the counts are halved
_MEMORY_OF_ALL = 20_000.0
_MOST_LOG_ODDS = 30.0  # either way: a rate of 0 would have no inverse
_NUM_SIZES = 8  # octaves of the number of conversations that a context has seen


def period_of(idle_s: float) -> int:
    """The period in which an idle time lies."""
    return bisect_right(STARTS_S, idle_s) - 1 if idle_s > 0.0 else 0


class ReturnContext:
    """Counts of conversations that were alike in one respect. Written by `ReturnTimes`."""

    __slots__ = ("back", "kind", "lean", "seen", "size")

    def __init__(self, kind: int) -> None:
        self.kind = kind  # the respect
        self.seen = [
            0.0
        ] * NUM_PERIODS  # conversations that reached each period and returned in it or outlasted it
        self.back = [0.0] * NUM_PERIODS  # of these, those that returned in it
        self.lean = [0.0] * NUM_PERIODS  # log odds relative to the average
        self.size = [0] * NUM_PERIODS  # octave of `seen`

    def count(self, period: int, returned: bool, odds: float) -> None:
        """Count one more conversation, where the average log odds are `odds`."""
        seen, back = _counted(self.seen[period], self.back[period], returned, _MEMORY)
        self.seen[period], self.back[period] = seen, back
        self.size[period] = min(_NUM_SIZES, int(seen + 1.0).bit_length()) - 1
        expected = _DOUBT * _chance(odds)
        self.lean[period] = _log_odds(back + expected, seen - back + _DOUBT - expected) - odds


class ReturnTimes:
    """The hazards learned from all conversations, one observation at a time."""

    def __init__(self) -> None:
        self._contexts: OrderedDict[ContextKey, ReturnContext] = OrderedDict()
        self._seen = [0.0] * NUM_PERIODS
        self._back = [0.0] * NUM_PERIODS
        self._chance = list(PRIOR)
        self._odds = [_log_odds(chance, 1.0 - chance) for chance in PRIOR]
        self._trust = [[_FIRST_TRUST] * _NUM_SIZES for _ in range(NUM_CONTEXTS)]  # by kind and size
        self._steps = [[1.0] * _NUM_SIZES for _ in range(NUM_CONTEXTS)]  # squared gradients so far (AdaGrad)

    def contexts(self, keys: Iterable[ContextKey]) -> list[ReturnContext]:
        """The contexts of these keys, made if new."""
        contexts, found = self._contexts, []
        for key in keys:
            context = contexts.get(key)
            if context is None:
                context = contexts[key] = ReturnContext(key[0])
                if len(contexts) > MAX_CONTEXTS:
                    contexts.popitem(last=False)
            else:
                contexts.move_to_end(key)
            found.append(context)
        return found

    def chances(self, contexts: Sequence[ReturnContext]) -> list[float]:
        """Hazard of each period for a conversation in these contexts."""
        log_odds = self._odds
        for context in contexts:
            trust = self._trust[context.kind]
            log_odds = [
                odds + trust[size] * lean
                for odds, size, lean in zip(log_odds, context.size, context.lean, strict=True)
            ]
        return [_chance(odds) for odds in log_odds]

    def learn(self, contexts: Sequence[ReturnContext], period: int, returned: bool) -> None:
        """A conversation that was idle up to a period came back within it, or outlasted it."""
        log_odds = self._odds[period]
        for context in contexts:
            log_odds += self._trust[context.kind][context.size[period]] * context.lean[period]
        error = _chance(log_odds) - returned
        self._count(period, returned)
        for context in contexts:
            gradient = error * context.lean[period]
            if gradient:
                size, steps = context.size[period], self._steps[context.kind]
                steps[size] += gradient * gradient
                self._trust[context.kind][size] -= _LEARNING_RATE * gradient / math.sqrt(steps[size])
            context.count(period, returned, self._odds[period])

    def _count(self, period: int, returned: bool) -> None:
        self._seen[period], self._back[period] = _counted(
            self._seen[period], self._back[period], returned, _MEMORY_OF_ALL
        )
        while True:
            expected, doubt = PRIOR[period], 1.0
            if period:
                like_before = 1.0 - (1.0 - self._chance[period - 1]) ** _WORTH[period]
                expected, doubt = like_before + _HOPE * (expected - like_before), _DOUBT_OF_ALL
            chance = self._chance[period] = (self._back[period] + doubt * expected) / (
                self._seen[period] + doubt
            )
            self._odds[period] = _log_odds(chance, 1.0 - chance)
            period += 1
            if period == NUM_PERIODS or self._seen[period] > _RIPE:
                return


def _counted(seen: float, back: float, returned: bool, memory: float) -> tuple[float, float]:
    seen, back = seen + 1.0, back + returned
    return (0.5 * seen, 0.5 * back) if seen > memory else (seen, back)


def _log_odds(came: float, stayed: float) -> float:
    return math.log(came / stayed)


def _chance(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(max(-_MOST_LOG_ODDS, min(_MOST_LOG_ODDS, -log_odds))))


def saving_rates(chances: Sequence[float]) -> list[float]:
    """For each period's start: max over horizons of P(returns) / expected time held, in 1/s.

    This is the Gittins index of keeping a chunk: the cost that a slot saves a second, in units of Cost, if
    the chunk is evicted at the best moment. It may rise while a conversation is idle: one that never returns
    within seconds is worth more once those have passed.
    """
    rates: list[float] = []
    for start in range(NUM_PERIODS):
        alive, back, held_s, best = 1.0, 0.0, 0.0, 0.0
        for chance, width_s in zip(chances[start:], WIDTHS_S[start:], strict=True):
            leaving = alive * chance
            back += leaving
            alive -= leaving
            held_s += (alive + 0.5 * leaving) * width_s
            ratio = back / held_s
            if ratio > best:
                best = ratio
        rates.append(best)
    return rates
