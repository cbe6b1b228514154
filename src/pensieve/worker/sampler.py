"""Logits to tokens, each request by its own rules. Knows token ids and positions; never models, slots or plans.

What is drawn for a position depends on the request's seed and on the position alone: the random number is a hash of both. So a seed
gives the same tokens whatever else is in the batch, and a token sampled again (after a failed forward, a suspension) comes out the same.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from pensieve.core.plan import RequestFailure, RequestStart, SampledToken, Span
from pensieve.core.request import SamplingParams

_MASK = (1 << 64) - 1
_LEAST_TEMPERATURE = 1e-6  # below it only exact ties would differ, and fp32 would divide by 0
_TOP_GUESS = 512  # candidates tried first for top_p; a full sort only where they hold too little


class _State:
    """What is remembered of one request: its tokens by position, and counts of them where penalties need them."""

    __slots__ = ("counts", "num_prompt", "params", "prompt_ids", "seed", "tokens")

    def __init__(self, start: RequestStart) -> None:
        self.params = start.sampling
        self.seed = secrets.randbits(64) if start.sampling.seed is None else start.sampling.seed
        self.tokens = list(start.prompt)
        self.num_prompt = len(start.prompt)
        self.prompt_ids = frozenset(start.prompt if start.sampling.repetition_penalty != 1.0 else ())
        self.counts: Counter[int] = Counter()  # of the output

    def truncate(self, length: int) -> None:
        """Forget tokens from this position on: their step was void, they are sampled again."""
        if length < len(self.tokens):
            self.counts.subtract(self.tokens[max(length, self.num_prompt) :])
            del self.tokens[length:]

    def append(self, position: int, token: int) -> None:
        """The token at `position` is known now."""
        self.truncate(position)
        if position == len(self.tokens):  # else a step before this one was void, and so is this one
            self.tokens.append(token)
            if position >= self.num_prompt:
                self.counts[token] += 1


class Sampler:
    """Sole owner of what is remembered of a request between its tokens; forgotten only when it has ended."""

    def __init__(self, *, before_sample: Callable[[str], None] = lambda request_id: None) -> None:
        """`before_sample` is called for each request that emits; when it raises, that request fails and the others go on."""
        self._before_sample = before_sample
        self._states: dict[str, _State] = {}

    def start(self, requests: Iterable[RequestStart]) -> None:
        """New requests."""
        for request in requests:
            self._states[request.request_id] = _State(request)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests that ended."""
        for request_id in request_ids:
            self._states.pop(request_id, None)

    def last_token(self, span: Span) -> int:
        """The token at a span's start. 0 where none was sampled: then that step was void, and so will be this one."""
        tokens = self._states[span.request_id].tokens
        return tokens[span.start] if span.start < len(tokens) else 0

    def sample(self, spans: Sequence[Span], logits: torch.Tensor) -> tuple[list[SampledToken], list[RequestFailure]]:
        """One token for each span that emits.

        Args:
            spans: E of them.
            logits: (E, V), in any floating dtype.

        Returns:
            Tokens, and the requests that failed instead: broken alone, or with logits that are no numbers.
        """
        if not spans:
            return [], []
        best, ids = logits.max(dim=-1)  # NaN wins a maximum
        rows = zip(spans, torch.isfinite(best).tolist(), ids.tolist(), logits, strict=True)
        tokens: list[SampledToken] = []
        failures: list[RequestFailure] = []
        for span, is_finite, greedy, row in rows:
            try:
                self._before_sample(span.request_id)
                if not is_finite:
                    raise ArithmeticError(
                        "the model's logits are not finite (NaN or infinity): its weights or dtype do not carry this prompt"
                    )
                tokens.append(self._sample_one(span, row, greedy))
            except Exception as error:  # one request's trouble must not reach its neighbours
                failures.append(RequestFailure(span.request_id, f"sampling failed: {type(error).__name__}: {error}"))
        return tokens, failures

    def _sample_one(self, span: Span, row: torch.Tensor, greedy: int) -> SampledToken:
        state = self._states[span.request_id]
        params = state.params
        state.truncate(span.stop)
        adjusted = _penalised(row, state) if _has_penalties(params) else row
        if params.stop_token_ids and span.stop - state.num_prompt < params.min_new_tokens:
            adjusted = _without(adjusted, params.stop_token_ids)
        if params.temperature == 0.0:
            token = greedy if adjusted is row else int(adjusted.argmax())
        else:
            token = draw(adjusted, params, uniform(state.seed, span.stop))
        state.append(span.stop, token)
        if params.logprobs is None:
            return SampledToken(span.request_id, token)
        logprobs = torch.log_softmax(row.float(), dim=-1)
        values, ids = logprobs.topk(min(params.logprobs, len(logprobs)))
        return SampledToken(span.request_id, token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a hash of a seed and a position (the finaliser of SplitMix64, twice)."""
    state = _mix((seed ^ 0x9E3779B97F4A7C15) & _MASK)
    return (_mix((state + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _penalised(row: torch.Tensor, state: _State) -> torch.Tensor:
    """Logits (V,) in fp32 after repetition (over prompt and output), then presence and frequency penalties (over the output)."""
    params = state.params
    logits = row.float().clone()
    counts = {token: count for token, count in state.counts.items() if count > 0}
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(state.prompt_ids | counts.keys()), dtype=torch.int64, device=row.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if counts and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
        ids = torch.tensor(list(counts), dtype=torch.int64, device=row.device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=row.device)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times
    return logits


def _without(row: torch.Tensor, ids: frozenset[int]) -> torch.Tensor:
    """Logits (V,) by which none of these ids can be sampled."""
    return row.index_fill(0, torch.tensor([i for i in ids if i < len(row)], dtype=torch.int64, device=row.device), -torch.inf)


def draw(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """Sample from logits (V,) by inverting the cumulative distribution at `number` in [0, 1).

    Temperature, then top_k, then top_p of what is left, then min_p against the likeliest; each renormalises. Candidates are ordered
    by falling probability where top_k or top_p is set, else by id.
    """
    values = logits.float()
    scaled = (values - values.max()) / max(params.temperature, _LEAST_TEMPERATURE)
    if params.top_k == 0 and params.top_p == 1.0:
        probabilities = torch.softmax(scaled, dim=-1)
        if params.min_p > 0.0:
            probabilities = probabilities * (probabilities >= params.min_p * probabilities.max())
        return _invert(probabilities, number)
    probabilities, ids = _candidates(scaled, params)
    keep = probabilities >= params.min_p * probabilities[0]
    if params.top_p < 1.0:
        before = probabilities.cumsum(0, dtype=torch.float64) - probabilities
        keep &= before < params.top_p  # the one that reaches top_p is kept too
    keep[0] = True
    return int(ids[_invert(probabilities * keep, number)])


def _candidates(scaled: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in falling order, and their ids: the top_k, or as many as surely hold top_p, or all."""
    size = len(scaled)
    if 0 < params.top_k < size:
        values, ids = scaled.topk(params.top_k)
        return torch.softmax(values, dim=-1), ids
    probabilities = torch.softmax(scaled, dim=-1)
    if params.top_p < 1.0 and size > _TOP_GUESS:
        values, ids = probabilities.topk(_TOP_GUESS)
        if float(values.sum()) >= params.top_p:
            return values, ids
    values, ids = probabilities.sort(descending=True, stable=True)
    return values, ids


def _invert(weights: torch.Tensor, number: float) -> int:
    """The index whose share of the cumulative weights (not all 0) holds `number`; never one of weight 0."""
    cumulative = weights.cumsum(0, dtype=torch.float64)
    index = int(torch.searchsorted(cumulative, number * float(cumulative[-1]), right=True))
    # The first index past the target has a weight; past the end, after rounding, the last that has one is meant.
    return index if index < len(weights) else int(weights.nonzero()[-1])
