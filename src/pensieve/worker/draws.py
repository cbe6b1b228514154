"""Rows of logits to token ids: the likeliest, or sampled with a given random number.

Knows numbers; never requests.

Every row is computed as if it were alone: sums run along rows, and rows share an operation only if it treats
each by itself. On a device nothing here waits: what depends on the numbers themselves is computed for all
rows there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from pensieve.core.request import SamplingParams
from pensieve.worker.pinned import to_device

_MASK = (1 << 64) - 1
_LEAST_TEMPERATURE = 1e-6  # below it only exact ties would differ, and fp32 would divide by 0
_TOP_GUESS = 512  # candidates tried first for top_p; all are sorted only if these hold too little probability
_BLOCK = 256  # weights whose sum is read before the weights themselves
_INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}  # its bits; NaN has larger ones, and the sign is the highest bit


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a hash of a seed and a position (the finaliser of SplitMix64, twice)."""
    state = _mix((seed ^ 0x9E3779B97F4A7C15) & _MASK)
    return (_mix((state + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


# -- the likeliest


def likeliest(logits: torch.Tensor) -> tuple[list[bool], list[int]]:
    """The likeliest token of each row of logits (n, V).

    Returns:
        Whether the row's maximum is a number (no NaN in the row, no infinity at the top), and the first token
        that has it. On a CPU this uses numpy, in one thread: it compares 16-bit floats as the integers that
        their bits are, a whole vector at a time; torch takes ten times as long (docs/log/performance.md) and
        would wake other threads.
    """
    if logits.device.type != "cpu":
        best, ids = logits.max(dim=-1)  # NaN wins a maximum
        return torch.isfinite(best).tolist(), ids.tolist()
    if (infinity := _INFINITY.get(logits.dtype)) is None:
        values = logits.numpy()
        places = values.argmax(-1)  # NaN wins here, too
        return np.isfinite(values[np.arange(len(places)), places]).tolist(), places.tolist()
    bits = logits.view(torch.int16).numpy()
    places = bits.argmax(-1)
    highest = bits[np.arange(len(places)), places]
    # Positive floats are in the order of their bits, with NaN above them; as unsigned numbers, NaN of the
    # other sign is above everything.
    is_simple = (highest > 0) & (highest < infinity) & (bits.view(np.uint16).max(-1) <= infinity | 0x8000)
    if is_simple.all():
        return is_simple.tolist(), places.tolist()
    are_finite, ids = is_simple.tolist(), places.tolist()
    for row in np.flatnonzero(~is_simple).tolist():  # no positive number, or a NaN
        (are_finite[row],), (ids[row],) = likeliest(logits[row : row + 1].float())
    return are_finite, ids


# -- draws


class _Rules(NamedTuple):
    """The rules by which rows are sampled after temperature and top_k. Each (n, 1), float64."""

    number: torch.Tensor
    top_p: torch.Tensor  # infinite without top_p: sums of probabilities exceed 1 by rounding
    min_p: torch.Tensor | None  # None if no row has one


def draw(logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> torch.Tensor:
    """Sample from each row of logits by inverting its cumulative distribution at a number in [0, 1).

    Temperature, then top_k, then top_p of what is left, then min_p relative to the likeliest; each
    renormalises. Candidates are ordered by falling probability with top_k or top_p, else by id.

    Args:
        logits: (n, V), float32; overwritten.
        params: n of them, each with a temperature.
        numbers: n of them.

    Returns:
        (n,) int64, token ids.
    """
    size, device = logits.shape[1], logits.device
    temperatures = to_device(
        np.array([max(each.temperature, _LEAST_TEMPERATURE) for each in params], np.float32), device
    )
    scaled = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperatures[:, None])
    by_order: dict[int, list[int]] = {}  # rows by the number of candidates to sort
    for row, each in enumerate(params):
        in_order = min(each.top_k, size) or (size if each.top_p < 1.0 else 0)
        by_order.setdefault(in_order, []).append(row)
    tokens = torch.zeros(len(params), dtype=torch.int64, device=device)
    for in_order, rows in by_order.items():
        places = None if len(rows) == len(params) else to_device(np.array(rows, np.int64), device)
        values = scaled if places is None else scaled.index_select(0, places)
        rules = _rules([params[row] for row in rows], [numbers[row] for row in rows], device)
        if in_order == 0:
            found = _among_all(torch.softmax(values, dim=-1), rules)
        elif in_order < size:
            values, ids = values.topk(in_order)
            found = _among(torch.softmax(values, dim=-1), ids, rules)
        else:
            found = _among_likeliest(torch.softmax(values, dim=-1), rules)
        tokens = found if places is None else tokens.index_copy_(0, places, found)
    return tokens


def _rules(params: Sequence[SamplingParams], numbers: Sequence[float], device: torch.device) -> _Rules:
    top_p = [each.top_p if each.top_p < 1.0 else math.inf for each in params]
    min_p = [each.min_p for each in params]
    table = to_device(np.array([numbers, top_p, min_p], np.float64), device)[:, :, None]
    return _Rules(table[0], table[1], table[2] if any(min_p) else None)


def _among_all(probabilities: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Sample from (n, V) probabilities by id. Skips whole blocks by their sums and reads only one."""
    weights = probabilities
    if rules.min_p is not None:
        weights = probabilities * (
            probabilities >= rules.min_p.float() * probabilities.amax(dim=-1, keepdim=True)
        )
    if missing := -weights.shape[1] % _BLOCK:
        weights = pad(weights, (0, missing))
    blocks = weights.view(len(weights), -1, _BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (n, blocks)
    target = rules.number * ends[:, -1:]
    block = _first_past(ends, target)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].cumsum(
        -1, dtype=torch.float64
    )
    return (block * _BLOCK + _first_past(inside, target - before))[:, 0]


def _among_likeliest(probabilities: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Sample from (n, V) probabilities by rank.

    If a few candidates hold all that top_p asks for, the others are not sorted. On a device that would have
    to be asked first, so all are sorted there.
    """
    size = probabilities.shape[1]
    if size <= _TOP_GUESS or probabilities.device.type != "cpu":
        return _among(*_sorted(probabilities), rules)
    values, ids = probabilities.topk(_TOP_GUESS)
    are_enough = (values.sum(-1, keepdim=True) >= rules.top_p)[:, 0].tolist()
    found = _among(values, ids, rules)
    if not all(are_enough):
        rest = [row for row, is_enough in enumerate(are_enough) if not is_enough]
        left = _Rules(
            rules.number[rest], rules.top_p[rest], None if rules.min_p is None else rules.min_p[rest]
        )
        found[rest] = _among(*_sorted(probabilities[rest]), left)
    return found


def _among(probabilities: torch.Tensor, ids: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Sample from candidates in falling order, (n, k) each, among those that top_p and min_p leave."""
    keep = (
        probabilities.cumsum(-1, dtype=torch.float64) - probabilities < rules.top_p
    )  # the candidate that reaches top_p is kept, too
    if rules.min_p is not None:
        keep &= probabilities >= rules.min_p.float() * probabilities[:, :1]
    cumulative = (probabilities * keep).cumsum(-1, dtype=torch.float64)
    return ids.gather(1, _first_past(cumulative, rules.number * cumulative[:, -1:]))[:, 0]


def _sorted(probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, V) probabilities in falling order, equal ones by id, and their ids."""
    if probabilities.device.type != "cpu":
        values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        return values, ids
    # On a CPU as integers that hold both, which numpy sorts ten times as fast: positive floats are in the
    # order of their bits.
    bits = probabilities.numpy().view(np.uint32)
    keys = np.empty(bits.shape, np.uint64)
    for key, row in zip(keys, bits, strict=True):  # row by row they stay in the processor's cache
        np.left_shift(~row, 32, out=key, dtype=np.uint64)
        key |= np.arange(len(row), dtype=np.uint64)
        key.sort()
    order = torch.from_numpy((keys & 0xFFFFFFFF).astype(np.int64))
    return probabilities.gather(1, order), order


def _first_past(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In each row of rising sums (n, k), float64, the index of the first that exceeds a target (n, 1).

    Never one that added nothing. A target at the end or beyond, by rounding, means the one that reaches the
    end.
    """
    end = cumulative[:, -1:]
    return torch.searchsorted(
        cumulative, torch.minimum(target, torch.nextafter(end, torch.zeros_like(end))), right=True
    )
