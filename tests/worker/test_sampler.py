"""Tokens follow the exact filtered distribution, a seed decides them alone, and one request's trouble is its
own.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import one_row
from pensieve.core.plan import RequestStart, Span
from pensieve.core.request import SamplingParams
from pensieve.errors import InvalidRequest
from pensieve.worker import draws as draws_module
from pensieve.worker.draws import draw, likeliest, uniform
from pensieve.worker.sampler import Sampler

LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.9, 0.0, -3.0, 1.9])


def emitting(request: str, position: int) -> Span:
    """The span whose sampled token stands at `position`."""
    return Span(request, position - 1, position, None, True)


def one(
    sampling: SamplingParams,
    logits: torch.Tensor,
    prompt: tuple[int, ...] = (1, 2),
    position: int | None = None,
) -> Any:
    sampler = Sampler()
    sampler.start([RequestStart("r", sampling, prompt)])
    tokens, failures = sampler.sample(
        [emitting("r", len(prompt) if position is None else position)], logits[None]
    )
    assert failures == []
    return tokens[0]


def drawn(logits: torch.Tensor, params: SamplingParams, *numbers: float) -> list[int]:
    """Tokens of one row for several numbers."""
    return draw(logits.expand(len(numbers), -1).clone(), [params] * len(numbers), numbers).tolist()


def exact(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution by definition: temperature, top_k, top_p, min_p, each renormalising."""
    p = torch.softmax(logits.double() / params.temperature, dim=-1)
    order = p.argsort(descending=True, stable=True).tolist()
    if params.top_k:
        for token in order[params.top_k :]:
            p[token] = 0.0
        p /= p.sum()
    held = 0.0
    for token in order:
        if held >= params.top_p:
            p[token] = 0.0
        held += float(p[token])
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0.0
    return p / p.sum()


FILTERS = {
    "plain": SamplingParams(temperature=1.0),
    "hot": SamplingParams(temperature=2.5),
    "cold": SamplingParams(temperature=0.3),
    "top_p": SamplingParams(temperature=1.0, top_p=0.7),
    "top_k": SamplingParams(temperature=1.3, top_k=3),
    "min_p": SamplingParams(temperature=1.0, min_p=0.3),
    "all": SamplingParams(temperature=1.2, top_k=5, top_p=0.85, min_p=0.2),
    "tiny top_p": SamplingParams(temperature=1.0, top_p=0.01),
}


@pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS.keys())
def test_draws_follow_the_exact_filtered_distribution(params: SamplingParams) -> None:
    """Numbers spread evenly over [0, 1) must reproduce every probability to a grid step.

    No statistics needed.
    """
    steps = 4000
    counts = torch.zeros(len(LOGITS))
    for token in drawn(LOGITS, params, *((step + 0.5) / steps for step in range(steps))):
        counts[token] += 1
    expected = exact(LOGITS, params)
    assert ((counts / steps - expected).abs() <= 1.5 / steps).all(), (counts / steps, expected)


def test_the_hash_is_uniform_and_without_memory() -> None:
    """Chi-squared over 100 cells, for positions of one seed, seeds of one position, and pairs of neighbours."""
    count, cells = 20_000, 100
    limit = cells - 1 + 6 * math.sqrt(2 * (cells - 1))  # six standard deviations
    series = {
        "positions": [uniform(42, position) for position in range(count)],
        "seeds": [uniform(seed, 7) for seed in range(count)],
    }
    for name, numbers in series.items():
        counts = torch.tensor(numbers).mul(cells).long().bincount(minlength=cells).double()
        assert float(((counts - count / cells) ** 2 / (count / cells)).sum()) < limit, name
        pairs = torch.tensor([int(a * 10) * 10 + int(b * 10) for a, b in itertools.pairwise(numbers)])
        counts = pairs.bincount(minlength=cells).double()
        assert float(((counts - count / cells) ** 2 / (count / cells)).sum()) < limit, f"pairs of {name}"
    assert all(0.0 <= number < 1.0 for numbers in series.values() for number in numbers)


def test_sampled_tokens_of_many_seeds_follow_the_distribution() -> None:
    params = FILTERS["all"]
    count = 3000
    sampler = Sampler()
    sampler.start(
        RequestStart(
            f"r{seed}", SamplingParams(temperature=1.2, top_k=5, top_p=0.85, min_p=0.2, seed=seed), (1,)
        )
        for seed in range(count)
    )
    tokens, _ = sampler.sample([emitting(f"r{seed}", 1) for seed in range(count)], LOGITS.expand(count, -1))
    counts = torch.tensor([token.token_id for token in tokens]).bincount(minlength=len(LOGITS)).double()
    expected = exact(LOGITS, params)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((counts / count - expected).abs() <= 5 * deviation + 1e-12).all()


@pytest.mark.parametrize("number", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS.keys())
def test_the_ends_of_the_unit_interval_never_leave_the_filter(params: SamplingParams, number: float) -> None:
    assert exact(LOGITS, params)[drawn(LOGITS, params, number)] > 0


def test_top_p_looks_beyond_its_first_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 0.1  # nearly flat
    params = SamplingParams(temperature=1.0, top_p=0.9)
    numbers = [step / 500 for step in range(500)]
    wide = drawn(logits, params, *numbers)
    monkeypatch.setattr(draws_module, "_TOP_GUESS", 8)
    assert drawn(logits, params, *numbers) == wide
    assert len(set(wide)) > 200


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert (
        drawn(LOGITS, SamplingParams(temperature=temperature), *(number / 10 for number in range(10)))
        == [0] * 10
    )


def test_greedy_takes_the_likeliest_of_every_row() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(3)).bfloat16()
    sampler = Sampler()
    sampler.start(RequestStart(f"r{row}", SamplingParams(), (1,)) for row in range(5))
    tokens, failures = sampler.sample([emitting(f"r{row}", 1) for row in range(5)], logits)
    assert [token.token_id for token in tokens] == logits.argmax(-1).tolist() and failures == []
    assert all(token.logprob is None and token.top == () for token in tokens)


def test_a_seed_gives_the_same_tokens_whatever_the_neighbours_and_interruptions() -> None:
    def answer(neighbours: int, *, twice: bool) -> list[int]:
        logits = torch.randn(12, 60, generator=torch.Generator().manual_seed(5))
        sampler = Sampler()
        params = SamplingParams(temperature=1.5, seed=11)
        sampler.start([RequestStart("r", params, (1, 2, 3))])
        sampler.start(
            RequestStart(f"n{i}", SamplingParams(temperature=1.0), (1, 2, 3)) for i in range(neighbours)
        )
        found = []
        for step in range(12):
            spans = [*(emitting(f"n{i}", 3 + step) for i in range(neighbours)), emitting("r", 3 + step)]
            for _ in range(2 if twice and step % 3 == 0 else 1):  # a step that was void is done again
                tokens, _ = sampler.sample(spans, logits[step].expand(len(spans), -1))
            found.append(tokens[-1].token_id)
            assert sampler.last_token(Span("r", 3 + step, 4 + step, None, True)) == found[-1]
        return found

    alone = answer(0, twice=False)
    assert answer(4, twice=False) == alone
    assert answer(1, twice=True) == alone
    assert len(set(alone)) > 3


def test_without_a_seed_two_requests_differ() -> None:
    logits = torch.zeros(2, 1 << 16)
    sampler = Sampler()
    sampler.start(RequestStart(name, SamplingParams(temperature=1.0), (1,)) for name in "ab")
    tokens, _ = sampler.sample([emitting("a", 1), emitting("b", 1)], logits)
    assert tokens[0].token_id != tokens[1].token_id  # by chance equal once in 65,536 runs


def test_repetition_penalty_covers_prompt_and_output() -> None:
    """Positive logits are divided, negative ones multiplied (arXiv:1909.05858)."""
    logits = torch.tensor([1.0, 3.0, 2.9, -0.1])
    sampler = Sampler()
    sampler.start([RequestStart("r", SamplingParams(repetition_penalty=2.0), (1,))])
    found = []
    for position in range(1, 4):
        tokens, _ = sampler.sample([emitting("r", position)], logits[None])
        found.append(tokens[0].token_id)
    assert found == [2, 1, 1]  # 1 counts 1.5 from the start; then 2 counts 1.45


def test_presence_and_frequency_penalties_cover_the_output_only() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0])

    def answer(**penalty: float) -> list[int]:
        sampler = Sampler()
        sampler.start([RequestStart("r", SamplingParams(**penalty), (1, 1, 1))])  # type: ignore[arg-type]
        return [
            sampler.sample([emitting("r", position)], logits[None])[0][0].token_id for position in range(3, 8)
        ]

    assert answer(presence_penalty=1.5) == [
        1,
        2,
        1,
        1,
        1,
    ]  # once: 3.0 -> 1.5 against 2.0, then both are 1.5 and 0.5
    assert answer(frequency_penalty=0.6) == [1, 1, 2, 1, 2]
    assert answer(presence_penalty=-1.0) == [1, 1, 1, 1, 1]


def test_a_void_token_leaves_no_trace_in_the_penalties() -> None:
    sampler = Sampler()
    sampler.start([RequestStart("r", SamplingParams(frequency_penalty=2.0), (0,))])
    likes = {token: torch.nn.functional.one_hot(torch.tensor(token), 4).float()[None] for token in range(4)}
    sampler.sample([emitting("r", 1)], likes[3])
    sampler.sample([emitting("r", 2)], likes[3])  # its step turns out void, and is planned again
    again, _ = sampler.sample([emitting("r", 1)], likes[3])
    assert again[0].token_id == 3
    occurrences = sampler._states["r"].occurrences
    assert (
        sampler._states["r"].tokens == [0, 3] and occurrences is not None and occurrences.counts() == {3: 1}
    )


def test_logprobs_are_of_the_raw_distribution() -> None:
    expected = torch.log_softmax(LOGITS, dim=-1)
    token = one(SamplingParams(temperature=3.0, top_k=1, presence_penalty=2.0, logprobs=3), LOGITS)
    assert token.token_id == 0 and token.logprob == pytest.approx(float(expected[0]))
    assert [token_id for token_id, _ in token.top] == [0, 7, 2]
    assert [value for _, value in token.top] == pytest.approx(
        expected.sort(descending=True).values[:3].tolist()
    )
    assert (
        one(SamplingParams(logprobs=0), LOGITS).top == ()
        and one(SamplingParams(logprobs=0), LOGITS).logprob is not None
    )
    assert len(one(SamplingParams(logprobs=20), LOGITS).top) == len(LOGITS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_their_request_alone(bad: float, temperature: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 6] = bad
    sampler = Sampler()
    sampler.start(RequestStart(name, SamplingParams(temperature=temperature), (1,)) for name in "abc")
    tokens, failures = sampler.sample([emitting(name, 1) for name in "abc"], logits)
    assert [token.request_id for token in tokens] == ["a", "c"]
    assert [failure.request_id for failure in failures] == ["b"] and "not finite" in failures[0].message


def test_forbidden_tokens_may_have_minus_infinity() -> None:
    logits = LOGITS.clone()
    logits[3] = float("-inf")
    assert one(SamplingParams(), logits).token_id == 0
    assert one(SamplingParams(temperature=1.0, seed=1, repetition_penalty=1.2), logits).token_id != 3


def test_a_request_that_breaks_in_sampling_fails_alone() -> None:
    def hook(request_id: str) -> None:
        if request_id == "b":
            raise ValueError("no grammar")

    sampler = Sampler(before_sample=hook)
    sampler.start(RequestStart(name, SamplingParams(), (1,)) for name in "abc")
    tokens, failures = sampler.sample([emitting(name, 1) for name in "abc"], LOGITS.repeat(3, 1))
    assert [token.request_id for token in tokens] == ["a", "c"]
    assert [(f.request_id, f.message) for f in failures] == [("b", "sampling failed: ValueError: no grammar")]


def test_only_ended_requests_are_forgotten() -> None:
    sampler = Sampler()
    sampler.start(RequestStart(name, SamplingParams(), (5,)) for name in "ab")
    sampler.forget(["a", "never started"])
    assert sampler.last_token(Span("b", 0, 1, None, True)) == 5
    with pytest.raises(KeyError):
        sampler.last_token(Span("a", 0, 1, None, True))


def test_nothing_to_sample() -> None:
    assert Sampler().sample([], torch.empty(0, 7)) == ([], [])


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}, {"repetition_penalty": 1.1}]
)
def test_no_stop_token_before_the_least_length(how: dict[str, Any]) -> None:
    """Tokens 0 and 7 are the likeliest and end an answer.

    With two of four tokens to come, none of them is taken.
    """
    sampling = SamplingParams(
        max_new_tokens=8, min_new_tokens=4, stop_token_ids=frozenset({0, 7, 999}), logprobs=2, seed=3, **how
    )
    sure = LOGITS + torch.tensor([50.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 50.0])
    sampler = Sampler()
    sampler.start([RequestStart("r", sampling, (1, 2))])
    taken = []
    for position in range(2, 8):
        tokens, failures = sampler.sample([emitting("r", position)], sure[None])
        assert failures == []
        taken.append(tokens[0])
    assert [token.token_id in (0, 7) for token in taken] == [False] * 4 + [True] * 2
    assert [token_id for token_id, _ in taken[0].top or ()] == [0, 7], "log-probabilities are the model's own"


@pytest.mark.parametrize("least", [-1, 9])
def test_a_least_length_that_cannot_be_is_refused(least: int) -> None:
    with pytest.raises(InvalidRequest, match=r"min_new_tokens must be in \[0, max_new_tokens = 8\], got"):
        SamplingParams(max_new_tokens=8, min_new_tokens=least)


# -- many rows at once give what each gives alone, by the book


def sampling_params() -> st.SearchStrategy[SamplingParams]:
    """Every mixture of rules."""
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 3.0]),
        top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5]),
        top_k=st.sampled_from([0, 0, 1, 7, 40, 900, 5000]),
        min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.4]),
        seed=st.integers(0, 2**64 - 1),
        logprobs=st.sampled_from([None, None, 0, 3, 20]),
    )


@settings(max_examples=80, deadline=None)
@given(
    every=st.lists(sampling_params(), min_size=1, max_size=9),
    size=st.sampled_from([5, 256, 257, 700, 3000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from(
        [0.3, 2.0, 6.0]
    ),  # nearly flat, so that top_p needs a sort; a model's; nearly certain
    seed=st.integers(0, 1 << 30),
)
def test_rows_together_give_what_each_gives_alone(
    every: list[SamplingParams], size: int, dtype: torch.dtype, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompts = [tuple(torch.randint(size, (6,), generator=generator).tolist()) for _ in every]
    sampler = Sampler()
    sampler.start(
        RequestStart(f"r{row}", params, prompt)
        for row, (params, prompt) in enumerate(zip(every, prompts, strict=True))
    )
    outputs: list[list[int]] = [[] for _ in every]
    for step in range(4):
        logits = (torch.randn(len(every), size, generator=generator) * spread - (step == 3) * 40.0).to(
            dtype
        )  # (in the end all negative)
        tokens, failures = sampler.sample(
            [emitting(f"r{row}", 6 + step) for row in range(len(every))], logits
        )
        assert failures == []
        for row, (params, token) in enumerate(zip(every, tokens, strict=True)):
            number = uniform(params.seed or 0, 6 + step)
            assert token.token_id == one_row.choose(
                logits[row], params, number, set(prompts[row]), Counter(outputs[row])
            ), params
            logprobs = torch.log_softmax(logits[row].float(), dim=-1)
            assert token.logprob == (None if params.logprobs is None else float(logprobs[token.token_id]))
            top = logprobs.topk(min(params.logprobs or 0, size))
            assert token.top == tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            outputs[row].append(token.token_id)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_is_torchs_whatever_the_signs(dtype: torch.dtype) -> None:
    """Rows all negative, all zero of either sign, with ties, infinities and NaN of either sign, together and
    alone.
    """
    nan, inf = float("nan"), float("inf")
    rows = [
        [1.0, 3.0, 3.0, -7.0], [-4.0, -2.0, -2.0, -9.0], [-0.0, 0.0, -0.0, -1.0], [-0.0, -0.0, -1.0, -2.0],
        [-inf, -inf, 2.0, -inf], [-inf, -inf, -5.0, -inf], [1.0, inf, 2.0, 3.0], [1.0, nan, 2.0, inf],
        [-1.0, -2.0, nan, -3.0], [-inf, -inf, -inf, -inf], [5e-8, 1e-7, 0.0, -1.0], [1.0, 2.0, 3.0, -inf],
        [1.0, nan, 2.0, 3.0],
    ]  # fmt: skip
    logits = torch.tensor(rows, dtype=dtype)
    signed = torch.where(
        logits.isnan(), torch.copysign(logits, torch.tensor(-1.0)), logits
    )  # what x86 makes of 0 / 0
    for each in (logits, signed, logits.double(), logits.expand(3, -1, -1)[1]):
        best, ids = each.max(dim=-1)
        assert likeliest(each) == (torch.isfinite(best).tolist(), [int(row.argmax()) for row in each])
        assert [likeliest(row[None]) for row in each] == [
            ([bool(f)], [int(i)]) for f, i in zip(torch.isfinite(best), ids, strict=True)
        ]


def test_one_row_that_breaks_leaves_the_others_drawn_as_they_are_alone() -> None:
    """A prompt's id that the logits do not reach breaks the penalties of one request, within a batch of
    several.
    """
    params = SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=4)
    sampler = Sampler()
    sampler.start(RequestStart(name, params, (99,) if name == "b" else (1,)) for name in "abc")
    tokens, failures = sampler.sample([emitting(name, 1) for name in "abc"], LOGITS.repeat(3, 1))
    assert [token.request_id for token in tokens] == ["a", "c"] and len(
        {token.token_id for token in tokens}
    ) == 1
    assert tokens[0].token_id == one(params, LOGITS, (1,)).token_id
    assert [failure.request_id for failure in failures] == ["b"] and "IndexError" in failures[0].message


def test_penalties_remember_more_tokens_than_at_first() -> None:
    sampler, size = Sampler(), 300
    sampler.start([RequestStart("r", SamplingParams(presence_penalty=2.0), (0,))])
    flat = torch.zeros(1, size)
    found = [
        sampler.sample([emitting("r", position)], flat)[0][0].token_id for position in range(1, size + 1)
    ]
    assert found == list(range(size))  # each once: the first that was not there yet


EXTREMES = {
    "temperature": [0.0, 5e-324, 1e-300, 1e-6, 1.0, 100.0],
    "top_p": [5e-324, 1e-300, 1e-12, 0.5, 1.0 - 1e-16, 1.0],
    "top_k": [0, 1, 2, 10**9],
    "min_p": [0.0, 5e-324, 1e-300, 0.5, 1.0],
    "repetition_penalty": [5e-324, 1e-300, 1e-38, 1e-9, 1.0, 3.0, 1e9, 1e38, 1e300, 1.7e308],
    "presence_penalty": [-2.0, 0.0, 2.0],
    "frequency_penalty": [-2.0, 0.0, 2.0],
}
a_logit = st.sampled_from(
    [0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, 1e4, -1e4, 3e38, -3e38, -math.inf]
) | st.floats(-20.0, 20.0, width=32)


@settings(max_examples=300)
@given(
    params=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in EXTREMES.items()}),
    logits=st.lists(st.lists(a_logit, min_size=6, max_size=6), min_size=1, max_size=3),
    size=st.sampled_from([6, 700]), seed=st.sampled_from([None, 0, -1, 2**70]), on_device=st.booleans(),
    stops=st.sampled_from([(), (0,), tuple(range(6)), tuple(range(700))]),
)  # fmt: skip
def test_whatever_the_parameters_a_token_comes_out(
    params: dict[str, Any],
    logits: list[list[float]],
    size: int,
    seed: int | None,
    on_device: bool,
    stops: tuple[int, ...],
) -> None:
    """Or, where all of a row is minus infinity, a reason.

    Never an index out of range, never a token that was out of the question.
    """
    row = torch.nn.functional.pad(torch.tensor(logits), (0, size - 6), value=-5.0)
    sampling = SamplingParams(
        **params,
        seed=seed,
        max_new_tokens=9,
        min_new_tokens=9 if stops else 0,
        stop_token_ids=frozenset(stops),
    )
    sampler = Sampler(on_device=on_device)
    names = [f"r{index}" for index in range(len(row))]
    sampler.start(RequestStart(name, sampling, (1, 2, 5)) for name in names)
    for position in (3, 4, 5):  # each token counts for the next
        spans = [emitting(name, position) for name in names]
        tokens, failures = sampler.sample(spans, row.clone())
        hopeless = [name for name, values in zip(names, row, strict=True) if torch.isinf(values).all()]
        assert [failure.request_id for failure in failures] == hopeless
        for token in tokens:
            values = row[names.index(token.request_id)]
            assert 0 <= token.token_id < size
            if any(
                index not in stops and math.isfinite(value) for index, value in enumerate(values.tolist())
            ):
                assert math.isfinite(values[token.token_id]) and token.token_id not in stops


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_the_last_word_of_a_repetition_penalty(penalty: float, temperature: float) -> None:
    """As small as can be: the likeliest of what was there comes again.

    As large as can be: nothing of it that is below zero ever does.
    """
    logits = torch.tensor([0.5, 2.0, 3.0, -1.0, 0.1, 2.5])
    for seed in range(20):
        sampling = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=seed)
        token = one(sampling, logits, (1, 2, 3, 5)).token_id
        assert token == 2 if penalty < 1.0 else token != 3
