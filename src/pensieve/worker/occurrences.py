"""Counts how often a request has had each token, and applies penalties.

Knows token ids; never positions or requests.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from pensieve.core.request import SamplingParams

# A larger repetition penalty changes nothing more, but overflows float32: the order of the tokens would be
# lost.
_MOST_PENALTY = 1e9


class Occurrences:
    """Distinct tokens in the order in which they first came, so that a penalty takes few operations."""

    def __init__(self, prompt: Iterable[int]) -> None:
        """`prompt` are the tokens that count as seen from the start; empty if only the output counts."""
        seen = np.fromiter(dict.fromkeys(prompt), np.int64)
        self._size = len(seen)  # the part of the arrays that is in use
        self._ids = np.concatenate([seen, np.zeros(64, np.int64)])
        self._times = np.zeros(len(self._ids), np.float32)  # in the output
        self._in_prompt = np.arange(len(self._ids)) < self._size
        self._place = {int(token): index for index, token in enumerate(seen)}

    def counts(self) -> dict[int, int]:
        """The tokens of the output, and how often each came."""
        return {
            int(self._ids[index]): int(self._times[index])
            for index in range(self._size)
            if self._times[index]
        }

    def add(self, token: int) -> None:
        """Count one more token of the output."""
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = self._size
            if place == len(self._ids):
                self._ids, self._times, self._in_prompt = (
                    np.concatenate([array, np.zeros_like(array)])
                    for array in (self._ids, self._times, self._in_prompt)
                )
            self._ids[place] = token
            self._size += 1
        self._times[place] += 1

    def remove(self, tokens: Iterable[int]) -> None:
        """Take back tokens that are not in the output after all."""
        for token in tokens:
            self._times[self._place[token]] -= 1

    def penalise(self, logits: torch.Tensor, params: SamplingParams) -> None:
        """Change a row of logits (V,), float32, in place.

        The repetition penalty counts everything, presence and frequency penalties the output.
        """
        ids, times, in_prompt = (
            torch.from_numpy(array[: self._size]).to(logits.device)
            for array in (self._ids, self._times, self._in_prompt)
        )
        values = logits[ids]
        in_output = times > 0
        if params.repetition_penalty != 1.0:
            penalty = min(max(params.repetition_penalty, 1.0 / _MOST_PENALTY), _MOST_PENALTY)
            pushed = torch.where(values > 0, values / penalty, values * penalty).clamp(
                max=torch.finfo(values.dtype).max
            )
            values = torch.where(in_output | in_prompt, pushed, values)
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            values = torch.where(
                in_output, values - (params.presence_penalty + params.frequency_penalty * times), values
            )
        logits[ids] = values
