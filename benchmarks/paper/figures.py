"""The paper's figures of throughput and latency, simulated: what each needs, and how ours compares. Knows cases and curves; never pictures.

Every curve is normalized latency (90th percentile) over finished requests a second, each point the mean of a few seeds that all series share. A
run begins with nobody, and how long it lasts is a parameter that the paper does not give: `RUN_S` was fitted with the overheads
(benchmarks/fit_overheads.py), on one curve, and holds for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from paper.curves import mean_curve, throughput_at
from paper.published import CURVES, FIG14_FEWER_RECOMPUTED, FIG14_MORE_CPU_HITS_POINTS, RATIOS, Curve
from pensieve.simulator.case import Case, Machine, Outcome
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.load_plan import LoadOptions

RUN_S, WARM_UP = 900.0, 0.25  # the run's arrivals, and the share of it that does not count
SEEDS = 2
# Where points lie: shares of the highest published throughput, asked for a little higher since a run begins with nobody.
_SHARES = (0.2, 0.5, 0.75, 0.95)
_ASKED = 1.3
_FURTHER = 1.1  # a curve that has not passed the latency it is read at goes on in such steps
_MOST_STEPS = 18


@dataclass(frozen=True, slots=True)
class Series:
    """One curve."""

    label: str
    published: str | None  # the curve of the paper that it stands beside; None: it has none
    system: str
    policy: str = "retention"
    think_s: float = 60.0
    like: str | None = None  # whose published throughputs its rates follow; None: its own


@dataclass(frozen=True, slots=True)
class CurveFigure:
    """One figure of curves."""

    name: str
    title: str
    machine: Machine
    trace: str
    series: tuple[Series, ...]
    read_at_s: float  # normalized latency at which throughputs are compared

    def published(self, series: Series) -> Curve | None:
        """The paper's curve beside a series."""
        return CURVES[self.name].get(series.published) if series.published else None

    def rates(self, series: Series) -> list[float]:
        """What is asked for at first, requests a second."""
        like = series.like or series.published
        assert like is not None
        highest = max(per_s for per_s, _ in CURVES[self.name][like])
        return [round(share * highest * _ASKED, 3) for share in _SHARES]

    def cases(self, series: Series, rate: float) -> list[Case]:
        """One point: a case a seed."""
        run_s = (
            RUN_S * (series.think_s / 60.0) ** 0.5
        )  # (who thinks longer comes back later: histories need longer to grow)
        return [
            Case(
                self.machine,
                LoadOptions(
                    trace=Path(self.trace),
                    rates=(rate,),
                    duration_s=run_s,
                    think=ThinkTime(series.think_s, exponential=True),
                    seed=seed,
                ),
                series.system,
                series.policy,
                warm_up_s=WARM_UP * run_s,
            )
            for seed in range(SEEDS)
        ]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One number of ours beside the paper's."""

    what: str
    paper: float | None  # None: the paper has none
    ours: float | None  # None: the curve does not get there
    unit: str = ""
    reached: bool | None = None  # where what counts is an order or a sign; None: within 15 %
    slack: float = 0.0  # how well the paper's number could be read
    judged: bool = True  # False: said, but it need not agree

    @property
    def difference(self) -> float | None:
        """Ours over the paper's, less 1."""
        return None if self.paper is None or self.ours is None else self.ours / self.paper - 1.0

    @property
    def good(self) -> bool | None:
        """Whether it is as it should be; None: there is nothing to hold it against."""
        if not self.judged:
            return None
        if self.reached is not None:
            return self.reached
        if self.paper is None:
            return None
        return self.ours is not None and abs(self.ours - self.paper) <= 0.15 * self.paper + self.slack


@dataclass(slots=True)
class Result:
    """A figure simulated."""

    figure: CurveFigure
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)  # by series

    def curve(self, label: str) -> list[tuple[float, float]]:
        """One series' points."""
        return mean_curve(self.outcomes[label])

    def throughput(self, label: str, latency_s: float | None = None) -> float | None:
        """Requests a second of a series at the latency at which the figure is read."""
        return throughput_at(self.curve(label), latency_s or self.figure.read_at_s)

    def published_throughput(self, label: str, latency_s: float | None = None) -> float | None:
        """The same of the paper's curve."""
        series = next(one for one in self.figure.series if one.label == label)
        points = self.figure.published(series)
        return None if points is None else throughput_at(points, latency_s or self.figure.read_at_s)


_OPT13, _LLAMA13 = Machine("opt-13b"), Machine("llama2-13b-gqa")
_OPT66, _LLAMA70 = Machine("opt-66b", devices=4), Machine("llama2-70b", devices=4)
_PENSIEVE = Series("Pensieve", "Pensieve", "pensieve")
_VLLM = Series("baseline (vLLM)", "vLLM", "baseline")
_GPU = Series("GPU cache", "GPU cache", "gpu-only")
_TODAY = Series("stateless, unified batches", None, "stateless", like="vLLM")
_FULL, _SHORT = (_VLLM, _TODAY, _GPU, _PENSIEVE), (_VLLM, _TODAY, _PENSIEVE)

FIGURES = {
    figure.name: figure
    for figure in (
        CurveFigure("10a", "OPT-13B, ShareGPT, one A100", _OPT13, "sharegpt-like", _FULL, RATIOS["10a"][0]),
        CurveFigure("10b", "Llama 2-13B (GQA), ShareGPT, one A100", _LLAMA13, "sharegpt-like", _FULL, RATIOS["10b"][0]),
        CurveFigure("10c", "OPT-13B, UltraChat, one A100", _OPT13, "ultrachat-like", _SHORT, RATIOS["10c"][0]),
        CurveFigure("10d", "Llama 2-13B (GQA), UltraChat, one A100", _LLAMA13, "ultrachat-like", _SHORT, RATIOS["10d"][0]),
        CurveFigure("11a", "OPT-66B, ShareGPT, four A100", _OPT66, "sharegpt-like", _SHORT, RATIOS["11a"][0]),
        CurveFigure("11b", "Llama 2-70B, ShareGPT, four A100", _LLAMA70, "sharegpt-like", _FULL, RATIOS["11b"][0]),
        CurveFigure(
            "13", "One batch for prompts and decodes, or steps of their own (Llama 2-13B, ShareGPT)", _LLAMA13, "sharegpt-like",
            (Series("unified", "unified", "pensieve"), Series("separate", "separate", "pensieve-phased")), 0.12,
        ),
        CurveFigure(
            "14", "Retention value and LRU (OPT-13B, ShareGPT)", _OPT13, "sharegpt-like",
            (Series("retention value", "retention value", "pensieve"), Series("LRU", "LRU", "pensieve", "lru", like="retention value")), 0.12,
        ),
        CurveFigure(
            "15", "Think times (Llama 2-13B, ShareGPT)", _LLAMA13, "sharegpt-like",
            (
                *(Series(f"{think} s", f"{think} s", "pensieve", think_s=float(think)) for think in (30, 60, 120, 300, 600)),
                Series("vLLM, 600 s", "vLLM, 600 s", "baseline", think_s=600.0),
            ),
            0.10,
        ),
    )
}  # fmt: skip

Run = Callable[[Sequence[Case]], list[Outcome]]


def simulate_figures(figures: Sequence[CurveFigure], run: Run) -> list[Result]:
    """Simulate figures, each case once however many figures it is in; curves go on until they can be read.

    Args:
        figures: of `FIGURES`.
        run: what runs cases, `sweep.run_cases` for one.
    """
    known: dict[Case, Outcome] = {}
    results = [Result(figure) for figure in figures]
    wanted = {
        (result.figure.name, series.label): result.figure.rates(series)
        for result in results
        for series in result.figure.series
    }
    for _ in range(1 + _MOST_STEPS):
        new = dict.fromkeys(
            case
            for result in results
            for series in result.figure.series
            for rate in wanted[result.figure.name, series.label]
            for case in result.figure.cases(series, rate)
            if case not in known
        )
        if not new:
            break
        known |= dict(zip(new, run(list(new)), strict=True))
        for result in results:
            for series in result.figure.series:
                rates = wanted[result.figure.name, series.label]
                result.outcomes[series.label] = [
                    known[case] for rate in rates for case in result.figure.cases(series, rate)
                ]
                if max(latency for _, latency in result.curve(series.label)) < 1.25 * result.figure.read_at_s:
                    rates.append(round(rates[-1] * _FURTHER, 3))
    return results


def compare(result: Result) -> list[Comparison]:
    """What a figure says, ours beside the paper's."""
    figure = result.figure
    if figure.name in RATIOS:
        return _ratios(result)
    return {"13": _phases, "14": _policies, "15": _think_times}[figure.name](result)


def _over(result: Result, label: str, base: str, what: str, paper: float | None) -> Comparison:
    return Comparison(what, paper, _quotient(result.throughput(label), result.throughput(base)), "×")


def _quotient(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def _ratios(result: Result) -> list[Comparison]:
    figure = result.figure
    at = f"at {1e3 * figure.read_at_s:.0f} ms a token"
    found = [
        _over(
            result,
            "Pensieve",
            _VLLM.label,
            f"Pensieve's throughput over the baseline's {at}",
            RATIOS[figure.name][1],
        ),
        _over(result, "Pensieve", _TODAY.label, f"over a stateless server with unified batches {at}", None),
    ]
    if _GPU in figure.series:
        paper = _quotient(result.published_throughput("Pensieve"), result.published_throughput("GPU cache"))
        found.append(_over(result, "Pensieve", _GPU.label, f"over what is kept on the GPU alone {at}", paper))
    found += [
        Comparison(
            f"{series.label}: requests a second {at}", result.published_throughput(series.label), result.throughput(series.label), "/s",
            # what must hold is the ratio; absolute figures depend on lengths that are not published
            judged=series is _VLLM and figure.name == "10a",
        )
        for series in figure.series
        if series.published
    ]  # fmt: skip
    return found


def _phases(result: Result) -> list[Comparison]:
    paper = _quotient(result.published_throughput("unified"), result.published_throughput("separate"))
    ours = _quotient(result.throughput("unified"), result.throughput("separate"))
    return [
        Comparison(
            f"unified batches' throughput over separate steps' at {1e3 * result.figure.read_at_s:.0f} ms a token", paper, ours, "×",
            reached=ours is not None and ours > 1.0,
        )
    ]  # fmt: skip


def _policies(result: Result) -> list[Comparison]:
    paper = _quotient(result.published_throughput("retention value"), result.published_throughput("LRU"))
    ours = _quotient(result.throughput("retention value"), result.throughput("LRU"))
    lru_of = {(one.rate, one.case.load.seed): one for one in result.outcomes["LRU"]}
    same = ((one, lru_of.get((one.rate, one.case.load.seed))) for one in result.outcomes["retention value"])
    pairs = [(value, lru) for value, lru in same if lru is not None]
    more = max(100 * (value.summary.cpu_share - lru.summary.cpu_share) for value, lru in pairs)
    fewer = max(
        1.0 - value.summary.recomputed_tokens / lru.summary.recomputed_tokens
        for value, lru in pairs
        if lru.summary.recomputed_tokens
    )
    pressed = [
        (v.summary.recomputed_tokens, u.summary.recomputed_tokens)
        for v, u in pairs
        if u.summary.recomputed_share > 0.02
    ]
    fewer_on_average = fmean(1.0 - value / lru for value, lru in pressed) if pressed else None
    return [
        Comparison(
            f"the retention value's throughput over LRU's at {1e3 * result.figure.read_at_s:.0f} ms a token", paper, ours, "×",
            reached=ours is not None and ours >= 1.0,
        ),
        Comparison("more hits in the CPU tier than with LRU, at most", FIG14_MORE_CPU_HITS_POINTS, more, " points", reached=more > 0.0),
        Comparison("fewer recomputed tokens than with LRU, at most", 100 * FIG14_FEWER_RECOMPUTED, 100 * fewer, " %", reached=fewer > 0.0),
        Comparison(
            "and on average, where over 2 % are recomputed", None, None if fewer_on_average is None else 100 * fewer_on_average, " %"
        ),
    ]  # fmt: skip


def _think_times(result: Result) -> list[Comparison]:
    found = []
    before: float | None = None
    for series in result.figure.series[:-1]:
        ours = result.throughput(series.label)
        found.append(
            Comparison(
                f"requests a second at {1e3 * result.figure.read_at_s:.0f} ms a token, {series.label} of thinking",
                result.published_throughput(series.label), ours, "/s", reached=ours is not None and (before is None or ours <= before),
            )
        )  # fmt: skip
        before = ours
    paper = _quotient(result.published_throughput("600 s"), result.published_throughput("vLLM, 600 s"))
    ours = _quotient(result.throughput("600 s"), result.throughput("vLLM, 600 s"))
    found.append(
        Comparison(
            "over the baseline with 600 s of thinking",
            paper,
            ours,
            "×",
            reached=ours is not None and ours > 1.0,
        )
    )
    return found
