"""What users say where only its length matters: words of the shipped conversations in a random order. Knows
words; never tokens or time.

No two conversations begin alike, so a server that shares prefixes between them finds none but the template's
own.
"""

from __future__ import annotations

import random
import re
from collections import Counter

from pensieve.errors import ConfigError
from pensieve.workloads.conversations import load_dataset

_LEAST_USES = 2  # words that come up again are the common ones, which most tokenizers know whole
_SENTENCE_WORDS = (6, 12)


class PromptWriter:
    """Writes texts of a wanted number of words; the same for the same seed and name, on every machine."""

    def __init__(self, seed: int | str) -> None:
        """Read the shipped conversations' vocabulary."""
        self._seed = seed
        counts: Counter[str] = Counter()
        for conversation in load_dataset():
            for text in conversation.turns:
                counts.update(re.findall(r"(?<![\w'’-])[a-z]{2,}(?![\w'’-])", text))
        self.words = tuple(sorted(word for word, count in counts.items() if count >= _LEAST_USES))

    def write(self, name: str, num_words: int) -> str:
        """Sentences of `num_words` words in all, at least one; `name` says which text (its conversation and
        turn).
        """
        if num_words < 1:
            raise ConfigError(f"a message must have at least 1 word, got {num_words}")
        rng = random.Random(f"prompt/{self._seed}/{name}")
        words = rng.choices(self.words, k=num_words)
        sentences = []
        start = 0
        while start < num_words:
            stop = start + rng.randint(*_SENTENCE_WORDS)
            sentences.append(" ".join(words[start:stop]).capitalize() + ".")
            start = stop
        return " ".join(sentences)
