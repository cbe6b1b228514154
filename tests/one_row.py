"""What a token is, one row at a time and by the book: the sampler's batches are held to this."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pensieve.core.request import SamplingParams

LEAST_TEMPERATURE = 1e-6
TOP_GUESS = 512


def choose(
    row: torch.Tensor, params: SamplingParams, number: float, prompt: set[int], counts: Mapping[int, int]
) -> int:
    """The token for a row of logits (V,); `prompt` and `counts` (of the output) are for penalties."""
    adjusted = penalised(row, params, prompt, counts) if has_penalties(params) else row
    return int(adjusted.float().argmax()) if params.temperature == 0.0 else draw(adjusted, params, number)


def has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )


def penalised(
    row: torch.Tensor, params: SamplingParams, prompt: set[int], counts: Mapping[int, int]
) -> torch.Tensor:
    logits = row.float().clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(prompt | counts.keys()), dtype=torch.int64)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if counts and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
        ids = torch.tensor(list(counts), dtype=torch.int64)
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times
    return logits


def draw(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """Sample from logits (V,) by inverting the cumulative distribution at `number` in [0, 1).

    Temperature, then top_k, then top_p of what is left, then min_p against the likeliest; each renormalises. Candidates are ordered
    by falling probability where top_k or top_p is set, else by id.
    """
    values = logits.float()
    scaled = (values - values.max()) / max(params.temperature, LEAST_TEMPERATURE)
    if params.top_k == 0 and params.top_p == 1.0:
        probabilities = torch.softmax(scaled, dim=-1)
        if params.min_p > 0.0:
            probabilities = probabilities * (probabilities >= params.min_p * probabilities.max())
        return invert(probabilities, number)
    probabilities, ids = candidates(scaled, params)
    keep = probabilities >= params.min_p * probabilities[0]
    if params.top_p < 1.0:
        before = probabilities.cumsum(0, dtype=torch.float64) - probabilities
        keep &= before < params.top_p  # the one that reaches top_p is kept too
    keep[0] = True
    return int(ids[invert(probabilities * keep, number)])


def candidates(scaled: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in falling order, and their ids: the top_k, or as many as surely hold top_p, or all."""
    size = len(scaled)
    if 0 < params.top_k < size:
        values, ids = scaled.topk(params.top_k)
        return torch.softmax(values, dim=-1), ids
    probabilities = torch.softmax(scaled, dim=-1)
    if params.top_p < 1.0 and size > TOP_GUESS:
        values, ids = probabilities.topk(TOP_GUESS)
        if float(values.sum()) >= params.top_p:
            return values, ids
    values, ids = probabilities.sort(descending=True, stable=True)
    return values, ids


def invert(weights: torch.Tensor, number: float) -> int:
    """The index whose share of the cumulative weights (not all 0) holds `number`; never one of weight 0."""
    cumulative = weights.cumsum(0, dtype=torch.float64)
    index = int(torch.searchsorted(cumulative, number * float(cumulative[-1]), right=True))
    # The first index past the target has a weight; past the end, after rounding, the last that has one is meant.
    return index if index < len(weights) else int(weights.nonzero()[-1])
