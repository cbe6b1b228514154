"""Conversations like those of the paper's datasets, made without them. Knows token counts, seconds and
shapes; never a text, a file or a server.

The paper (section 6, Table 2) measures with ShareGPT (5.56 turns of 37.77 input and 204.58 output tokens, on
average) and UltraChat (3.86, 51.78, 257.81), conversations cut where they outgrow 16,384 tokens. Only these
means are published; they hold here, after the cut. The shapes
around them are chosen:

- Turns, ShareGPT: 1 and the whole part of a lognormal of sigma 1.3. It is the conversations that people kept
  of their own: most short, a few very long. 27 % have one turn, as reported of ShareGPT by Gao et al.
  (CachedAttention, USENIX ATC '24: 73 % have several); the median is 3, the 99th percentile about 45.
- Turns, UltraChat: 1 and a Poisson number. Two models talked with each other for a few rounds (Ding et al.,
  EMNLP '23), so hardly any is long.
- Inputs: lognormal, ShareGPT's very skewed (sigma 1.2: half have under 19 tokens, a few are pasted
  documents), UltraChat's less (0.8), since a model wrote them.
- Outputs: lognormal with the bound that a model's answer has (ShareGPT: sigma 0.9; UltraChat: 0.6). Lengths
  are independent of each other.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist, fmean

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.scripts import NO_THINKING, Script, ScriptTurn, SystemPrompts

MAX_CONTEXT = 16384  # tokens (paper, section 6)
SAMPLED = 4000  # conversations, where a mean is not known
STRATA = 64  # a power of two
MAX_POISSON = 100  # what is rounded off must not be looked for forever
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lognormal token counts, each from 1 to `most`."""

    median: float
    sigma: float  # of the logarithm
    most: int

    def draw(self, rng: random.Random) -> int:
        """One of them."""
        return min(self.most, max(1, round(self.median * math.exp(self.sigma * rng.gauss()))))


@dataclass(frozen=True, slots=True)
class Likeness:
    """What the conversations of a dataset are like."""

    name: str
    mean_turns: float  # the three means that hold after the cut at `MAX_CONTEXT`
    mean_input_tokens: float
    mean_output_tokens: float
    inputs: Lengths
    outputs: Lengths
    turns_median: float | None = None  # further turns: lognormal around it, or, without one, Poisson
    turns_spread: float = 0.0  # sigma, or the mean of the Poisson number

    def num_turns(self, share: float) -> int:
        """Turns before the cut, such that about `share` of all conversations, above 0 and below 1, have no
        more.
        """
        if self.turns_median is not None:
            return 1 + int(self.turns_median * math.exp(self.turns_spread * _NORMAL.inv_cdf(share)))
        more, left = 0, share
        likely = math.exp(-self.turns_spread)
        while left > likely and more < MAX_POISSON:
            left -= likely
            more += 1
            likely *= self.turns_spread / more
        return 1 + more


# Medians are found such that the means hold after the cut: a cut takes long conversations' last turns.
LIKENESSES = {
    one.name: one
    for one in (
        Likeness(
            "sharegpt-like",
            5.56,
            37.77,
            204.58,
            Lengths(18.411, 1.2, 4096),
            Lengths(137.17, 0.9, 2048),
            turns_median=2.2548,
            turns_spread=1.3,
        ),
        Likeness(
            "ultrachat-like",
            3.86,
            51.78,
            257.81,
            Lengths(37.604, 0.8, 2048),
            Lengths(215.12, 0.6, 2048),
            turns_spread=2.86,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Generator:
    """Conversations without end, each a function of the seed and its number alone."""

    likeness: Likeness
    think: ThinkTime = NO_THINKING
    seed: int | str = 0
    system: SystemPrompts | None = None
    max_context: int = MAX_CONTEXT  # tokens; a conversation ends before the turn that would go beyond

    def __post_init__(self) -> None:
        least = (
            self.likeness.inputs.most
            + self.likeness.outputs.most
            + (self.system.tokens if self.system else 0)
        )
        if self.max_context < least:
            raise ConfigError(
                f"a first turn of {self.likeness.name} can have {least} tokens with its system prompt: "
                f"max_context must be at least that, got {self.max_context}; shorter ones are cut out of the "
                "conversations made"
            )

    @property
    def mean_turns(self) -> float:
        """Turns of a conversation: the dataset's, or of a sample where contexts are cut otherwise than the
        dataset's.
        """
        if self.max_context == MAX_CONTEXT and self.system is None:
            return self.likeness.mean_turns
        return fmean(len(self.script(index).turns) for index in range(SAMPLED))

    def script(self, index: int) -> Script:
        """Conversation 0, 1, 2, ..., in whatever order they are asked for."""
        rng = random.Random(f"{self.likeness.name}/{self.seed}/{index}")
        prefix = self.system.of(self.seed, index) if self.system else ()
        context = sum(piece.tokens for piece in prefix)
        turns: list[ScriptTurn] = []
        for turn in range(self.likeness.num_turns(self._share(index, rng))):
            new, output = self.likeness.inputs.draw(rng), self.likeness.outputs.draw(rng)
            context += new + output
            if context > self.max_context:
                break
            turns.append(ScriptTurn(new, output, self.think.draw_s(self.seed, index, turn)))
        return Script(str(index), tuple(turns), prefix=prefix)

    def _share(self, index: int, rng: random.Random) -> float:
        """Stratified quantile of conversation `index` by its turns: of every `STRATA` in a row, one falls in
        each of `STRATA` equal intervals.

        With so long a tail it takes 20,000 independent conversations until their mean is within 1 %; so it
        takes some 800, and no run is longer by mere luck. Their order is another one each time.
        """
        block, place = divmod(index, STRATA)
        order = random.Random(f"{self.likeness.name}/{self.seed}/order/{block}")
        stratum = (
            (2 * order.randrange(STRATA // 2) + 1) * place + order.randrange(STRATA)
        ) % STRATA  # (odd: none comes twice)
        return (stratum + (rng.random() or 0.5)) / STRATA


def generator(
    name: str, think: ThinkTime = NO_THINKING, seed: int | str = 0, system: SystemPrompts | None = None
) -> Generator:
    """The generator of a name of `LIKENESSES`.

    Raises:
        ConfigError: there is none.
    """
    if name not in LIKENESSES:
        raise ConfigError(f"there are no conversations {name!r} to be made: take {' or '.join(LIKENESSES)}")
    return Generator(LIKENESSES[name], think, seed, system)
