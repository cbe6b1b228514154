"""The paper's figures of single operations, from the cost model alone: Fig. 3, 4 and 12. Knows costs; never schedulers or time.

The A100's efficiencies are taken from Fig. 3 and 4, so these two check the arithmetic (what grows with what) rather than predict; Fig. 12 predicts.
"""

from __future__ import annotations

from dataclasses import dataclass

from paper.published import (
    FIG3_GENERATION_S,
    FIG3_HISTORY,
    FIG3_PREFILL_S,
    FIG4_CONTEXT,
    FIG4_RATIO,
    FIG12_MS,
    FIG12_PAST,
)
from pensieve.core.plan import Span
from pensieve.simulator.case import Machine
from pensieve.simulator.cost_model import Roofline

_BATCH, _DECODES, _NEW = 32, 200, 32  # Fig. 3; "a short new prompt" is taken to be a chunk
_CHUNK = 32  # Fig. 4
_QUERIES = 8  # Fig. 12


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a small figure: ours and the paper's over the same places."""

    label: str
    at: tuple[int, ...]
    paper: tuple[float, ...]
    ours: tuple[float, ...]

    @property
    def largest_difference(self) -> float:
        """Of ours over the paper's, less 1; the one farthest from 0."""
        return max((ours / paper - 1.0 for ours, paper in zip(self.ours, self.paper, strict=True)), key=abs)


@dataclass(frozen=True, slots=True)
class SmallFigure:
    """A figure of lines."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


def _span(start: int, stop: int) -> Span:
    return Span("", start, stop, None, emits_token=False)


def figure_3() -> SmallFigure:
    """Prefill of a batch of 32 against 200 decode steps of it, by history: the device's time alone, for there is no server in it."""
    machine = Machine("opt-13b")
    cost = machine.cost()
    prefill = tuple(cost.step_s([_span(0, past + _NEW)] * _BATCH) for past in FIG3_HISTORY)
    generation = tuple(
        sum(
            cost.step_s([_span(past + _NEW + step, past + _NEW + step + 1)] * _BATCH)
            for step in range(_DECODES)
        )
        for past in FIG3_HISTORY
    )
    return SmallFigure(
        "3",
        "A history costs more to prefill than an answer to generate (13B, A100, batch of 32)",
        "tokens of history",
        "seconds",
        (
            Line("prefill", FIG3_HISTORY, FIG3_PREFILL_S, prefill),
            Line("200 decode steps", FIG3_HISTORY, FIG3_GENERATION_S, generation),
        ),
    )


def figure_4() -> SmallFigure:
    """Attention of a 32-token chunk over the rest of a layer's work."""
    cost = _roofline("opt-13b")
    ratio = tuple(cost.attention_s(_CHUNK, context) / cost.linear_s(_CHUNK) for context in FIG4_CONTEXT)
    return SmallFigure(
        "4",
        "Attention of a 32-token chunk over a layer's other work (13B, A100)",
        "tokens of context",
        "ratio",
        (Line("attention / rest", FIG4_CONTEXT, FIG4_RATIO, ratio),),
    )


def figure_12() -> SmallFigure:
    """Ways to compute attention of 8 new tokens each for 32 requests, one layer.

    The shape is not published. 32 heads of 128 is the one of the usual that fits: with a 13B model's 40 the paper's times would need more than an
    A100's bandwidth, with 10 KV heads a third of it.
    """
    machine = Machine("llama2-7b")
    cost, device, numbers = _roofline(machine.model), machine.device(), machine.numbers()
    layers = numbers.shape.num_layers
    bytes_per_s = device.memory_bytes_per_s * device.memory_efficiency
    ours: dict[str, list[float]] = {label: [] for label in FIG12_MS}
    for past in FIG12_PAST:
        together = _BATCH * cost.attention_s(_QUERIES, past + _QUERIES) / layers
        ours["Pensieve"].append(together)
        ours["contiguous (ideal)"].append(
            together
        )  # the index arrays that paging adds are small beside K and V
        copied = 2 * _BATCH * past * numbers.kv_bytes_per_token / layers  # read and written
        ours["copy out, then attention"].append(together + copied / bytes_per_s)
        ours["one token a round"].append(
            sum(_BATCH * cost.attention_s(1, past + query + 1) / layers for query in range(_QUERIES))
        )
    return SmallFigure(
        "12",
        "Attention of 8 new tokens each for 32 requests, one layer of 32 heads (A100)",
        "past tokens",
        "milliseconds",
        tuple(
            Line(label, FIG12_PAST, FIG12_MS[label], tuple(1e3 * seconds for seconds in ours[label]))
            for label in FIG12_MS
        ),
    )


def _roofline(model: str) -> Roofline:
    machine = Machine(model)
    return Roofline(machine.numbers(), machine.device())


SMALL_FIGURES = {"3": figure_3, "4": figure_4, "12": figure_12}
