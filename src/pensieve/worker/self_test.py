"""Compares a model over a paged cache with its own eager attention.

Knows forwards and rounding; never configs or weights files.

Float32 is compared even where the model has 16 bits: there rounding hides small errors.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.errors import ModelRefused
from pensieve.worker.attention import AttentionArgs, PagedAttention, make_backend
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.kv_store import KVStore
from pensieve.worker.model import CausalModel
from pensieve.worker.refusal import attempt, refused
from pensieve.worker.widening import choose, decoder_layers, widened

log = logging.getLogger(__name__)

_TOLERANCE = 1e-4  # in float32: of the largest difference, as a share of the largest logit
_HALF_TOLERANCE = 0.08  # in 16 bits: of the difference's root mean square, as a share of the logits'
_BYTE_TOLERANCE = 0.1  # the same with weights of 8 bits, which alone make 3 to 8 % in tiny random models
# in 16 bits, with known float32 logits: how many times as far from them as transformers' own logits ours may
# be
_HALF_FACTOR = 1.6
_HALF_FLOOR = 2e-3  # a distance from them that is always rounding
# The most weights that are computed in float32, so that it takes seconds: for each thread of a CPU, and
# anywhere.
_FLOAT_BUDGET_A_THREAD, _FLOAT_BUDGET = 300_000_000, 2_000_000_000
_TEST_CHUNK = 4  # tokens of a chunk in the self-test: small, so that few ids cross many chunks


@dataclass(frozen=True, slots=True)
class Expected:
    """The logits of the model's own eager attention for the test sequences."""

    ids: dict[str, list[int]]  # by name
    logits: dict[str, torch.Tensor]  # (n, V) in fp32, of a sequence of n tokens
    # the same, computed in float32; None if that failed, or covers not all layers
    wide: dict[str, torch.Tensor] | None


def expect(model: CausalModel, attention: str = "auto") -> Expected:
    """Compute the expected logits with the model's modules, before they are emptied.

    A model with 16 bits is computed in float32 as well, and over a paged cache.

    Raises:
        ModelRefused: the modules fail, their logits are not finite, or over a paged cache they differ.
    """
    longest = min(29, model.shape.max_positions)
    lengths = {"pieces": longest, "holes": max(1, longest - 2), "decode": max(1, longest - 18)}
    generator = torch.Generator().manual_seed(0)
    ids = {
        name: torch.randint(model.shape.vocab_size, (length,), generator=generator).tolist()
        for name, length in lengths.items()
    }
    with model.eager() as eager:
        logits = attempt(model.label, lambda: _eager(eager, ids))
    if not all(bool(torch.isfinite(answer).all()) for answer in logits.values()):
        kind = str(model.dtype).removeprefix("torch.")
        way = (
            ": try --dtype bfloat16, which overflows far later"
            if model.dtype is torch.float16
            else ": its weights are damaged, fetch it again"
        )
        raise refused(model.label, f"its own logits are not finite in {kind}{way}")
    wide = None if model.dtype.itemsize != 2 else _expect_wide(model, ids, attention)
    return Expected(ids, logits, wide)


def _expect_wide(
    model: CausalModel, ids: dict[str, list[int]], attention: str
) -> dict[str, torch.Tensor] | None:
    """The logits in float32, once both kinds of attention agree; None if not of the whole model."""
    layers = decoder_layers(model.model, model.shape.num_layers)
    if layers is None or (model.model.tp_size or 1) > 1:
        return None
    every = list(range(len(layers)))
    budget = (
        _FLOAT_BUDGET
        if model.device.type != "cpu"
        else min(_FLOAT_BUDGET, _FLOAT_BUDGET_A_THREAD * torch.get_num_threads())
    )
    is_large = sum(p.numel() for p in model.model.parameters()) > budget
    computed = choose(layers, [_kind(args) for args in model.attention_args], budget) if is_large else every
    skipped: list[nn.Module] = [layers[index] for index in every if index not in computed]
    try:
        with widened(model.model, layers, skipped):
            with model.eager() as eager:
                wide = _eager_at_once(eager, ids)
            run = _paged(model, ids, attention, torch.float32)
    except ModelRefused:
        raise
    except (
        Exception
    ) as error:  # modules that insist on their own number type: the looser test in 16 bits must do
        log.info("%s is not computed in float32 (%s: %s)", model.label, type(error).__name__, error)
        return None
    _require_close(model.label, _largest(run, wide), _TOLERANCE)
    return wide if computed == every else None


def _kind(args: AttentionArgs) -> tuple[object, ...]:
    return (args.scaling, args.sliding_window, args.softcap, args.sinks is None)


def check(model: CausalModel, expected: Expected, attention: str = "auto") -> None:
    """Compare with the model's own eager attention on random ids, in the ways a cache is used.

    Three sequences over scattered slots: one in pieces, one whose first chunks and a hole are computed in the
    same forward as its end, one that decodes. Tolerance: fp32, 1e-4 of the largest logit. In 16 bits, the
    root mean square of the distance from the float32 logits may be 1.6 times that of transformers' own;
    without float32 logits, 8 % of the logits' (rounding alone makes 1 to 3 %).

    Raises:
        ModelRefused: the logits differ.
    """
    _require_close(model.label, *attempt(model.label, lambda: _compare(model, expected, attention)))


def _require_close(label: str, error: float, limit: float) -> None:
    if error != error:
        raise refused(
            label, "over a paged cache its logits are not finite, by transformers' own attention they are"
        )
    if error > limit:
        raise refused(
            label,
            f"over a paged cache its logits differ from transformers' own by {error:.2g}, {limit:.2g} would "
            "be rounding",
        )


def _compare(model: CausalModel, expected: Expected, attention: str) -> tuple[float, float]:
    """The error over all test sequences, and the limit of what rounding explains, as `check` defines them."""
    run = _paged(model, expected.ids, attention, model.dtype)
    if model.dtype.itemsize > 2:
        return _largest(run, expected.logits), _TOLERANCE
    if "int8" in model.forward_name:
        return _distance(run, expected.wide or expected.logits), _BYTE_TOLERANCE
    if expected.wide is None:
        return _distance(run, expected.logits), _HALF_TOLERANCE
    if (
        model.forward_name == "modules"
    ):  # proven in float32; in 16 bits a close choice between experts may differ for some tokens
        return _typical(run, expected.logits), _HALF_TOLERANCE
    own = [(name, position, expected.logits[name][position]) for name, position, _ in run]
    return _distance(run, expected.wide), max(_HALF_FACTOR * _distance(own, expected.wide), _HALF_FLOOR)


Outputs = list[tuple[str, int, torch.Tensor]]  # (sequence, position, logits there)


def _largest(outputs: Outputs, truth: dict[str, torch.Tensor]) -> float:
    """The largest difference over the largest logit; NaN stays NaN."""
    ours, theirs = _side_by_side(outputs, truth)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _distance(outputs: Outputs, truth: dict[str, torch.Tensor]) -> float:
    """The root mean square of the difference over that of the logits; NaN stays NaN."""
    ours, theirs = _side_by_side(outputs, truth)
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


def _typical(outputs: Outputs, truth: dict[str, torch.Tensor]) -> float:
    """The median token's error: half of all tokens have no larger one. NaN stays NaN."""
    ours, theirs = _side_by_side(outputs, truth)
    errors = (ours - theirs).square().mean(dim=1).sqrt() / theirs.square().mean(dim=1).sqrt()
    return float(errors.median()) if bool(torch.isfinite(errors).all()) else float("nan")


def _side_by_side(outputs: Outputs, truth: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([logits for _, _, logits in outputs]), torch.stack(
        [truth[name][position] for name, position, _ in outputs]
    )


def _paged(model: CausalModel, ids: dict[str, list[int]], attention: str, dtype: torch.dtype) -> Outputs:
    """The test sequences over a paged cache of a number type."""
    run = _TestRun(model, attention, ids, dtype)
    cut = _TEST_CHUNK * 2
    a, b, c = (len(ids[name]) for name in ("pieces", "holes", "decode"))
    # All of "holes" once, so that the second forward may recompute its beginning and its middle.
    run.step(("pieces", 0, cut), ("holes", 0, b - 1), ("decode", 0, c - 1))
    run.wipe("holes", 0, 3)
    run.wipe("holes", 4, 5)
    hole = (min(4 * _TEST_CHUNK, b - 1), min(5 * _TEST_CHUNK, b - 1))
    parts = [
        cut,
        *(stop for stop in (9, 11, 14, 18, 23) if cut < stop < a),
        a,
    ]  # each gives logits: more to compare
    run.step(
        *(("pieces", start, stop) for start, stop in itertools.pairwise(parts)),
        ("holes", 0, min(3 * _TEST_CHUNK, b - 1)), ("holes", *hole), ("holes", b - 1, b), ("decode", c - 1, c)
    )  # fmt: skip
    return run.outputs


def _eager(model: PreTrainedModel, ids: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: _eager_logits(model, tokens) for name, tokens in ids.items()}


def _eager_at_once(model: PreTrainedModel, ids: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The same in one forward: tokens after a sequence's end change nothing before it."""
    longest = max(map(len, ids.values()))
    rows = torch.tensor(
        [tokens + [0] * (longest - len(tokens)) for tokens in ids.values()], device=model.device
    )
    with torch.inference_mode():
        logits = model(input_ids=rows, use_cache=False).logits.float()
    return {name: logits[row, : len(tokens)] for row, (name, tokens) in enumerate(ids.items())}


def _eager_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """(n, V) of a sequence of n tokens, in fp32."""
    with torch.inference_mode():
        logits: torch.Tensor = (
            model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()
        )
    return logits


class _TestRun:
    """Computes sequences through our attention, in forwards chosen by hand."""

    def __init__(
        self, model: CausalModel, attention: str, ids: dict[str, list[int]], dtype: torch.dtype
    ) -> None:
        self.model, self.ids = model, ids
        self.backend = make_backend(
            attention, replace(model.geometry, dtype=dtype), _TEST_CHUNK, model.device
        )
        counts = {name: -(-len(tokens) // _TEST_CHUNK) for name, tokens in ids.items()}
        self.store = KVStore(
            sum(counts.values()), model.geometry.num_layers, self.backend.layer_bytes, model.device
        )
        self.backend.bind(self.store)
        self.builder = BatchBuilder(_TEST_CHUNK, model.device)
        free = torch.randperm(self.store.num_slots, generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = {name: tuple(free.pop() for _ in range(count)) for name, count in counts.items()}
        self.builder.update(BlockTableUpdate(name, 0, slots) for name, slots in self.tables.items())
        self.outputs: Outputs = []

    def step(self, *ranges: tuple[str, int, int]) -> None:
        """Run one forward over token ranges, without empty ones."""
        spans = tuple(
            Span(name, start, stop, tuple(self.ids[name][start:stop]), True)
            for name, start, stop in ranges
            if start < stop
        )
        batch = self.builder.build(spans, lambda span: 0)
        for span, row in zip(
            spans, self.model.forward(batch, PagedAttention(self.backend, batch)).float(), strict=True
        ):
            self.outputs.append((span.request_id, span.stop - 1, row))

    def wipe(self, name: str, first: int, stop: int) -> None:
        """Zero the slots of some chunks."""
        self.store.data[list(self.tables[name][first:stop])] = 0
