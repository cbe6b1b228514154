"""Logits to tokens, each request by its own rules. Knows token ids and positions; never models, slots or plans.

What is drawn for a position depends on the request's seed and on the position alone: the random number is a hash of both. So a seed
gives the same tokens whatever else is in the batch, and a token sampled again (after a failed forward, a suspension) comes out the same.
Rows are worked on together all the same: nothing here adds up across rows, so no row can tell its neighbours.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pensieve.core.plan import RequestFailure, RequestStart, SampledToken, Span
from pensieve.worker.draws import draw, likeliest, uniform
from pensieve.worker.occurrences import Occurrences

_ROWS_TOGETHER = 16  # their logits as fp32 still fit in a processor's cache (3 MB at 49,152 tokens)


Sampled = tuple[str, int, int]  # request id, position, token id


class _State:
    """What is remembered of one request: its tokens by position, and how often each occurred where penalties need that."""

    __slots__ = ("num_prompt", "occurrences", "params", "seed", "tokens")

    def __init__(self, start: RequestStart) -> None:
        params = self.params = start.sampling
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.tokens = list(start.prompt)
        self.num_prompt = len(start.prompt)
        self.occurrences: Occurrences | None = None
        if params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self.occurrences = Occurrences(start.prompt if params.repetition_penalty != 1.0 else ())

    @property
    def is_plain(self) -> bool:
        """Greedy, and nothing but the token is wanted."""
        return self.params.temperature == 0.0 and self.occurrences is None

    def must_go_on(self, position: int) -> bool:
        """The token at `position` may not be one that would end the answer."""
        return bool(self.params.stop_token_ids) and position - self.num_prompt < self.params.min_new_tokens

    def truncate(self, length: int) -> None:
        """Forget tokens from this position on: their step was void, they are sampled again."""
        if length < len(self.tokens):
            if self.occurrences is not None:
                self.occurrences.remove(self.tokens[max(length, self.num_prompt) :])
            del self.tokens[length:]

    def append(self, position: int, token: int) -> None:
        """The token at `position` is known now; what stood there and behind it has been forgotten."""
        if position == len(self.tokens):  # else a step before this one was void, and so is this one
            self.tokens.append(token)
            if self.occurrences is not None and position >= self.num_prompt:
                self.occurrences.add(token)


class Sampler:
    """Sole owner of what is remembered of a request between its tokens; forgotten only when it has ended."""

    def __init__(self, *, before_sample: Callable[[str], None] | None = None) -> None:
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

    def accept(self, sampled: Iterable[Sampled]) -> None:
        """Tokens that somebody else sampled for these requests; what was known of their positions, and behind, is forgotten."""
        for request_id, position, token in sampled:
            if (state := self._states.get(request_id)) is not None:
                state.truncate(position)
                state.append(position, token)

    def sample(self, spans: Sequence[Span], logits: torch.Tensor) -> tuple[list[SampledToken], list[RequestFailure]]:
        """One token for each span that emits.

        Args:
            spans: E of them, each of another request.
            logits: (E, V), in any floating dtype.

        Returns:
            Tokens, and the requests that failed instead: broken alone, or with logits that are no numbers.
        """
        if not spans:
            return [], []
        states = self._states
        are_finite, chosen = likeliest(logits)  # (of a greedy request, that is its token)
        failures: dict[int, Exception] = {}  # by row
        involved: list[int] = []  # rows that want more than the likeliest
        wordy: list[int] = []  # rows that want logprobs
        for row, span in enumerate(spans):
            try:
                if self._before_sample is not None:
                    self._before_sample(span.request_id)
                if not are_finite[row]:
                    raise ArithmeticError(
                        "the model's logits are not finite (NaN or infinity): its weights or dtype do not carry this prompt"
                    )
                state = states[span.request_id]
                state.truncate(span.stop)
                if not state.is_plain or state.must_go_on(span.stop):
                    involved.append(row)
                if state.params.logprobs is not None:
                    wordy.append(row)
            except Exception as error:  # one request's trouble must not reach its neighbours
                failures[row] = error
        said: dict[int, Said] = {}
        if involved or wordy:
            with _one_thread():
                for first in range(0, len(involved), _ROWS_TOGETHER):
                    self._choose(spans, logits, involved[first : first + _ROWS_TOGETHER], chosen, failures)
                for first in range(0, len(wordy), _ROWS_TOGETHER):
                    some = wordy[first : first + _ROWS_TOGETHER]
                    said |= _logprobs(logits, [(row, states[spans[row].request_id].params.logprobs or 0, chosen[row]) for row in some])
        tokens: list[SampledToken] = []
        for row, span in enumerate(spans):
            if row in failures:
                continue
            token = chosen[row]
            states[span.request_id].append(span.stop, token)
            tokens.append(SampledToken(span.request_id, token, *said[row]) if row in said else SampledToken(span.request_id, token))
        broken = [
            RequestFailure(spans[row].request_id, f"sampling failed: {type(error).__name__}: {error}")
            for row, error in sorted(failures.items())
        ]
        return tokens, broken

    def _choose(
        self, spans: Sequence[Span], logits: torch.Tensor, rows: list[int], chosen: list[int], failures: dict[int, Exception]
    ) -> None:
        """Choose for rows with penalties or a temperature. Should that fail, once more one by one: whose fault it was fails alone."""
        try:
            tokens = self._choose_together([spans[row] for row in rows], _floats(logits, rows))
        except Exception as error:
            if len(rows) == 1:
                failures[rows[0]] = error
                return
            for row in rows:
                self._choose(spans, logits, [row], chosen, failures)
            return
        for row, token in zip(rows, tokens, strict=True):
            chosen[row] = token

    def _choose_together(self, spans: Sequence[Span], values: torch.Tensor) -> list[int]:
        """A token for each row of `values` (n, V), which is overwritten."""
        states = [self._states[span.request_id] for span in spans]
        for state, span, row in zip(states, spans, values, strict=True):
            if state.occurrences is not None:
                state.occurrences.penalise(row, state.params)
            if state.must_go_on(span.stop):
                row.index_fill_(0, torch.tensor([i for i in state.params.stop_token_ids if i < len(row)], device=row.device), -torch.inf)
        drawn = [index for index, state in enumerate(states) if state.params.temperature > 0.0]
        if len(drawn) == len(states):
            tokens = [0] * len(states)
        else:
            _, tokens = likeliest(values)
            values = values[drawn]
        if drawn:
            numbers = [uniform(states[index].seed, spans[index].stop) for index in drawn]
            for index, token in zip(drawn, draw(values, [states[index].params for index in drawn], numbers), strict=True):
                tokens[index] = token
        return tokens


Said = tuple[float, tuple[tuple[int, float], ...]]  # the token's logprob, and the likeliest tokens with theirs


def _logprobs(logits: torch.Tensor, wanted: list[tuple[int, int, int]]) -> dict[int, Said]:
    """By row, what is said of the model's own distribution. `wanted`: (row of `logits`, how many of the likeliest, the row's token)."""
    said: dict[int, Said] = {}
    logprobs = torch.log_softmax(_floats(logits, [row for row, _, _ in wanted]), dim=-1)
    own = logprobs.gather(1, torch.tensor([[token] for _, _, token in wanted], device=logits.device)).squeeze(1).tolist()
    for count in {count for _, count, _ in wanted}:
        here = [index for index, (_, each, _) in enumerate(wanted) if each == count]
        values, ids = logprobs[here].topk(min(count, logprobs.shape[1]))
        for index, top_ids, top_values in zip(here, ids.tolist(), values.tolist(), strict=True):
            said[wanted[index][0]] = own[index], tuple(zip(top_ids, top_values, strict=True))
    return said


def _floats(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows, ascending, in float32, to be written on."""
    return (logits if len(rows) == len(logits) else logits[rows]).to(torch.float32, copy=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use this thread only: work of some 10 us that waits for another thread to be woken is not faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
