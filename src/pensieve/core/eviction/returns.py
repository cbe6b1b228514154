"""How likely an idle conversation comes back, and when, learned as it happens. Knows gaps and turns; never chunks, costs or policies.

Idle time falls into octaves of seconds. Whether a conversation that has been idle up to the start of an octave comes back within it is
a logistic regression on what is known of it when it goes idle; its features are cut into bins, and each bin has one weight an octave. A
conversation teaches each octave that it outlasts when it has, and the one in which it returns when it does: so those that have not come
back (yet) count for exactly as long as they have been waited for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

NUM_OCTAVES = 18  # [0, 2), [2, 4), ... [65536, 131072), and beyond
STARTS_S = (0.0, *(2.0**k for k in range(1, NUM_OCTAVES)))
PRIOR = 0.3  # of coming back within an octave, with nothing learned: a rate of about 0.5 / idle time, as the paper's 1 / T
LEARNING_RATE = 0.1
_RECENT = 5  # gaps
_PAIR = 256  # above the bins of a feature


def octave_of(idle_s: float) -> int:
    """The octave an idle time lies in."""
    return 0 if idle_s < 2.0 else min(NUM_OCTAVES - 1, math.frexp(idle_s)[1] - 1)


@dataclass(slots=True)
class Habits:
    """What is known of one conversation's user."""

    turns: int = 0
    recent: list[float] = field(default_factory=list)  # log2 of the last gaps, in seconds, at least 1
    mean_log: float = 3.3  # of them, older ones counting less
    num_long: float = 0.0  # gaps of more than a minute, older ones counting less
    num_very_long: float = 0.0  # of more than five

    def came_back(self, gap_s: float) -> None:
        """After so long."""
        log = math.log2(max(1.0, gap_s))
        self.recent.append(log)
        del self.recent[:-_RECENT]
        self.mean_log += 0.3 * (log - self.mean_log)
        self.num_long += 0.1 * ((gap_s > 60.0) - self.num_long)
        self.num_very_long += 0.1 * ((gap_s > 300.0) - self.num_very_long)

    def features(self, busy_s: float, num_chunks: int, num_answered: int) -> tuple[int, ...]:
        """A bin of each feature, for a conversation that goes idle after a request of `busy_s` whose answer had so many tokens.

        The length of an answer tells a tool's call, after which an agent is back in seconds, from words that somebody reads; the more so
        beside the last gap and beside how long it took. (A pair of bins is a bin.)
        """
        recent = self.recent
        last = int(2.0 * recent[-1]) if recent else 40
        mean = int(4.0 * self.mean_log)
        busy = int(3.0 * math.log2(1.0 + busy_s))
        answered = int(2.0 * math.log2(1 + num_answered))
        return (
            last,
            int(2.0 * recent[-2]) if len(recent) > 1 else 40,
            mean,
            int(2.0 * max(recent)) if recent else 40,
            int(20.0 * self.num_long),
            int(20.0 * self.num_very_long),
            min(12, int(math.log2(1 + self.turns))),
            busy,
            int(math.log2(1 + num_chunks)),
            answered,
            _PAIR * last + answered,
            _PAIR * (last // 2) + mean // 2,
            _PAIR * busy + answered,
        )


class ReturnTimes:
    """The regression. Learns by AdaGrad, one observation at a time."""

    def __init__(self) -> None:
        bias = math.log(PRIOR / (1.0 - PRIOR))
        self._bias = [bias] * NUM_OCTAVES
        self._bias_seen = [1.0] * NUM_OCTAVES
        self._weights: dict[tuple[int, int], list[float]] = {}
        self._seen: dict[tuple[int, int], list[float]] = {}  # squared gradients so far

    def chances(self, features: tuple[int, ...]) -> list[float]:
        """Of coming back within each octave, if not before it."""
        logits = list(self._bias)
        for key in enumerate(features):
            weights = self._weights.get(key)
            if weights is not None:
                logits = [a + b for a, b in zip(logits, weights, strict=True)]
        return [1.0 / (1.0 + math.exp(-x)) for x in logits]

    def learn(self, features: tuple[int, ...], octave: int, returned: bool) -> None:
        """A conversation that was idle up to an octave came back within it, or outlasted it."""
        logit = self._bias[octave]
        rows = []
        for key in enumerate(features):
            weights = self._weights.get(key)
            if weights is None:
                weights = self._weights[key] = [0.0] * NUM_OCTAVES
                self._seen[key] = [1.0] * NUM_OCTAVES
            rows.append((weights, self._seen[key]))
            logit += weights[octave]
        gradient = 1.0 / (1.0 + math.exp(-logit)) - returned
        for weights, seen in ((self._bias, self._bias_seen), *rows):
            seen[octave] += gradient * gradient
            weights[octave] -= LEARNING_RATE * gradient / math.sqrt(seen[octave])


def saving_rates(chances: list[float]) -> list[float]:
    """For each octave's start, the best ratio of the chance to come back within some time to the expected time held until then.

    That is the Gittins index of holding on: what a slot saves a second, of one unit of cost, if one stops holding at the best moment. Made
    falling, so that who has been idle longer is never worth more for it.
    """
    rates: list[float] = []
    for start in range(NUM_OCTAVES):
        alive, back, held_s, best = 1.0, 0.0, 0.0, 0.0
        for octave in range(start, NUM_OCTAVES):
            width_s = STARTS_S[octave + 1] - STARTS_S[octave] if octave + 1 < NUM_OCTAVES else STARTS_S[-1]
            leaving = alive * chances[octave]
            back += leaving
            alive -= leaving
            held_s += (alive + 0.5 * leaving) * width_s
            best = max(best, back / held_s)
        rates.append(min(best, rates[-1]) if rates else best)
    return rates
