"""Samples tokens from logits, each request by its own rules.

Knows token ids and positions; never models, slots or plans.

A sampled token depends only on the request's seed and the position: the random number is a hash of both. So a
seed gives the same tokens whatever else is in the batch, and a token sampled again (after a failed forward, a
suspension) is the same. Rows are still computed together: nothing here sums across rows, so no row affects
another.

Sampling has two halves. `launch` chooses tokens; on a device it only queues that, and the next step may be
launched on the tokens there. `collect` returns them once the device is done. Only penalties need a token on
the host before the next can be chosen (`needs_history`).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from pensieve.core.plan import RequestFailure, RequestStart, SampledToken, Span
from pensieve.worker.draws import draw, likeliest, uniform
from pensieve.worker.occurrences import Occurrences
from pensieve.worker.pinned import to_device, to_host

# the logit of a forbidden token. It is a finite number: if all tokens were forbidden, one would still be
# sampled.
_FORBIDDEN = -1e38
_ROWS_TOGETHER = 16  # rows whose logits as fp32 still fit in a processor's cache (3 MB at 49,152 tokens)


Sampled = tuple[str, int, int]  # request id, position, token id


class _State:
    """A request's tokens by position, and with penalties how often each occurred."""

    __slots__ = ("num_prompt", "occurrences", "params", "seed", "tokens")

    def __init__(self, start: RequestStart) -> None:
        params = self.params = start.sampling
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.tokens = list(start.prompt)
        self.num_prompt = len(start.prompt)
        self.occurrences: Occurrences | None = None
        if (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        ):
            self.occurrences = Occurrences(start.prompt if params.repetition_penalty != 1.0 else ())

    @property
    def is_plain(self) -> bool:
        """Whether the request is greedy and wants only the token."""
        return self.params.temperature == 0.0 and self.occurrences is None

    def must_go_on(self, position: int) -> bool:
        """Whether the token at `position` must not end the answer."""
        return bool(self.params.stop_token_ids) and position - self.num_prompt < self.params.min_new_tokens

    def truncate(self, length: int) -> None:
        """Forget tokens from this position on: their step was void, and they will be sampled again."""
        if length < len(self.tokens):
            if self.occurrences is not None:
                self.occurrences.remove(self.tokens[max(length, self.num_prompt) :])
            del self.tokens[length:]

    def append(self, position: int, token: int) -> None:
        """Add the token at `position`; tokens from there on were forgotten before."""
        if position == len(self.tokens):  # else an earlier step was void, and so is this one
            self.tokens.append(token)
            if self.occurrences is not None and position >= self.num_prompt:
                self.occurrences.add(token)


@dataclass(slots=True)
class Choice:
    """The tokens chosen for the rows of a step, here or still on the device."""

    spans: tuple[Span, ...]
    tokens: torch.Tensor  # (E,) int64
    failures: dict[int, Exception] = field(default_factory=dict)  # by row
    words: list[tuple[int, int]] = field(
        default_factory=list
    )  # (row, number of likeliest tokens), of rows that want logprobs
    told: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # what `collect` reads, in host memory once its event is reached


def nothing() -> Choice:
    """The choice for no span."""
    return Choice((), torch.empty(0, dtype=torch.int64))


class Sampler:
    """Sole owner of each request's tokens so far, until the request has ended."""

    def __init__(
        self, *, before_sample: Callable[[str], None] | None = None, on_device: bool = False
    ) -> None:
        """Start without requests.

        Args:
            before_sample: called for each request that emits; if it raises, only that request fails.
            on_device: choose without reading logits on the host, so that nothing waits for them. Otherwise
                the host reads them, which is faster on a CPU.
        """
        self._before_sample = before_sample
        self._on_device = on_device
        self._states: dict[str, _State] = {}

    def start(self, requests: Iterable[RequestStart]) -> None:
        """Add new requests."""
        for request in requests:
            self._states[request.request_id] = _State(request)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended."""
        for request_id in request_ids:
            self._states.pop(request_id, None)

    def last_token(self, span: Span) -> int | None:
        """The token at a span's start.

        None if it is not known here: still on the device, or never sampled because its step was void.
        """
        tokens = self._states[span.request_id].tokens
        return tokens[span.start] if span.start < len(tokens) else None

    def needs_history(self, spans: Sequence[Span]) -> bool:
        """Whether any of these spans can be sampled only once all earlier tokens are known here."""
        return any(
            span.emits_token and self._states[span.request_id].occurrences is not None for span in spans
        )

    def accept(self, sampled: Iterable[Sampled]) -> None:
        """Take over tokens that another rank sampled for these requests, in place of those known so far."""
        for request_id, position, token in sampled:
            if (state := self._states.get(request_id)) is not None:
                state.truncate(position)
                state.append(position, token)

    def sample(
        self, spans: Sequence[Span], logits: torch.Tensor
    ) -> tuple[list[SampledToken], list[RequestFailure]]:
        """Launch and collect at once."""
        choice = self.launch(spans, logits)
        return self.collect(choice)

    def launch(self, spans: Sequence[Span], logits: torch.Tensor) -> Choice:
        """Choose a token for each span that emits.

        Args:
            spans: E of them, each of another request.
            logits: (E, V), in any floating dtype.
        """
        if not spans:
            return nothing()
        if self._on_device or logits.device.type != "cpu":
            best, tokens = logits.max(dim=-1)  # a greedy request's token; NaN wins a maximum
            finite = torch.isfinite(best)
            are_finite = [True] * len(spans)  # unknown yet
        else:
            are_finite, ids = likeliest(logits)
            tokens, finite = torch.tensor(ids), torch.tensor(are_finite)
        choice = Choice(tuple(spans), tokens)
        involved: list[int] = []  # rows that want more than the likeliest token
        for row, span in enumerate(spans):
            try:
                if self._before_sample is not None:
                    self._before_sample(span.request_id)
                state = self._states[span.request_id]
                if are_finite[row]:
                    if not state.is_plain or state.must_go_on(span.stop):
                        involved.append(row)
                    if state.params.logprobs is not None:
                        choice.words.append((row, state.params.logprobs))
            except Exception as error:  # one request's failure must not affect the others
                choice.failures[row] = error
        if involved or choice.words:
            with _one_thread() if logits.device.type == "cpu" else nullcontext():
                for first in range(0, len(involved), _ROWS_TOGETHER):
                    self._choose(choice, logits, involved[first : first + _ROWS_TOGETHER])
                if choice.words:
                    choice.told |= _logprobs(logits, choice)
        choice.told |= {"finite": to_host(finite), "tokens": to_host(choice.tokens)}
        return choice

    def collect(
        self, choice: Choice, is_good: Callable[[Span], bool] = lambda span: True
    ) -> tuple[list[SampledToken], list[RequestFailure]]:
        """The chosen tokens, once the device is done.

        Args:
            choice: of `launch`.
            is_good: False for a span whose context was not there after all: its token means nothing.

        Returns:
            Tokens, and the requests that failed instead: alone, or with logits that are not numbers.
        """
        if not choice.spans:
            return [], []
        chosen, are_finite = choice.told["tokens"].tolist(), choice.told["finite"].tolist()
        said = _said(choice)
        tokens: list[SampledToken] = []
        broken: list[RequestFailure] = []
        for row, span in enumerate(choice.spans):
            if not is_good(span):
                continue
            error = choice.failures.get(row)
            if error is None and not are_finite[row]:
                error = ArithmeticError(
                    "the model's logits are not finite (NaN or infinity): its weights or dtype do not carry "
                    "this prompt"
                )
            if error is not None:
                broken.append(
                    RequestFailure(span.request_id, f"sampling failed: {type(error).__name__}: {error}")
                )
                continue
            token = chosen[row]
            state = self._states.get(span.request_id)
            if state is not None:
                state.truncate(span.stop)
                state.append(span.stop, token)
            tokens.append(
                SampledToken(span.request_id, token, *said[row])
                if row in said
                else SampledToken(span.request_id, token)
            )
        return tokens, broken

    def _choose(self, choice: Choice, logits: torch.Tensor, rows: list[int]) -> None:
        """Choose for rows with penalties or a temperature.

        If that fails, choose once more row by row, so that only the faulty ones fail.
        """
        try:
            tokens = self._choose_together([choice.spans[row] for row in rows], _floats(logits, rows))
        except Exception as error:
            if len(rows) == 1:
                choice.failures[rows[0]] = error
                return
            for row in rows:
                self._choose(choice, logits, [row])
            return
        choice.tokens.index_copy_(0, _index(rows, logits.device), tokens)

    def _choose_together(self, spans: Sequence[Span], values: torch.Tensor) -> torch.Tensor:
        """A token for each row of `values` (n, V), which is overwritten: (n,)."""
        states = [self._states[span.request_id] for span in spans]
        for state, span, row in zip(states, spans, values, strict=True):
            if state.occurrences is not None:
                state.truncate(span.stop)
                state.occurrences.penalise(row, state.params)
            if state.must_go_on(span.stop):
                row.index_fill_(
                    0,
                    _index([i for i in state.params.stop_token_ids if i < len(row)], row.device),
                    _FORBIDDEN,
                )
        drawn = [index for index, state in enumerate(states) if state.params.temperature > 0.0]
        places = _index(drawn, values.device)
        if len(drawn) == len(states):
            tokens = torch.empty(len(states), dtype=torch.int64, device=values.device)
        else:
            tokens = (
                values.argmax(-1)
                if self._on_device or values.device.type != "cpu"
                else torch.tensor(likeliest(values)[1])
            )
            values = values.index_select(0, places)
        if drawn:
            numbers = [uniform(states[index].seed, spans[index].stop) for index in drawn]
            tokens.index_copy_(0, places, draw(values, [states[index].params for index in drawn], numbers))
        return tokens


Said = tuple[
    float, tuple[tuple[int, float], ...]
]  # the token's logprob, and the likeliest tokens with theirs


def _logprobs(logits: torch.Tensor, choice: Choice) -> dict[str, torch.Tensor]:
    """Logprobs of the model's own distribution.

    "own" has the tokens of all rows that want it, in the order of `choice.words`; "values k" and "ids k" have
    the k likeliest of each row that wants so many. (Not the first k of more: of equal ones, another might be
    named.)
    """
    owns: list[torch.Tensor] = []
    tops: dict[int, list[torch.return_types.topk]] = {}
    for first in range(0, len(choice.words), _ROWS_TOGETHER):
        some = choice.words[first : first + _ROWS_TOGETHER]
        rows = [row for row, _ in some]
        logprobs = torch.log_softmax(_floats(logits, rows), dim=-1)
        owns.append(
            logprobs.gather(1, choice.tokens.index_select(0, _index(rows, logits.device))[:, None])[:, 0]
        )
        for count in {count for _, count in some}:
            here = [index for index, (_, each) in enumerate(some) if each == count]
            own_rows = (
                logprobs if len(here) == len(some) else logprobs.index_select(0, _index(here, logits.device))
            )
            tops.setdefault(count, []).append(own_rows.topk(min(count, logprobs.shape[1])))
    told = {"own": torch.cat(owns)}
    for count, parts in tops.items():
        told |= {
            f"values {count}": torch.cat([part.values for part in parts]),
            f"ids {count}": torch.cat([part.indices for part in parts]),
        }
    return {name: to_host(tensor) for name, tensor in told.items()}


def _said(choice: Choice) -> dict[int, Said]:
    """The logprobs by row."""
    if not choice.words:
        return {}
    told = {name: tensor.tolist() for name, tensor in choice.told.items()}
    said: dict[int, Said] = {}
    num_seen: Counter[int] = Counter()
    for (row, count), own in zip(choice.words, told["own"], strict=True):
        index = num_seen[count]
        num_seen[count] += 1
        said[row] = own, tuple(zip(told[f"ids {count}"][index], told[f"values {count}"][index], strict=True))
    return said


def _index(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    return to_device(np.array(rows, np.int64), device)


def _floats(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows, ascending, in float32, to be overwritten."""
    return (logits if len(rows) == len(logits) else logits.index_select(0, _index(rows, logits.device))).to(
        torch.float32, copy=True
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use this thread only.

    On a busy machine, about 10 us of work is not faster if it waits for another thread to wake up.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
