"""Which models may be served: refuse at load what would run and answer wrong. Knows transformers' configs and our attention.

Three steps: what the config says; one forward that only watches (does every layer attend once, all with the same KV heads, with the
window its config promises?); and a self-test against the model's own eager attention. Models that mix in state other than KV, or look
at a whole batch to choose their positions, are wrong here without an error: nothing but this gate stands between them and a user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.errors import ModelRefused
from pensieve.worker.attention import AttentionArgs, KVGeometry, PagedAttention, make_backend
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.kv_store import KVStore

if TYPE_CHECKING:
    from pensieve.worker.model import CausalModel

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_BATCH_WIDE_ROPES = {"dynamic", "longrope"}  # choose frequencies by the longest position of a batch
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit, for the largest difference
_HALF_TOLERANCE = 0.08  # in 16 bits, for the root mean square of the difference over that of the logits
_TEST_CHUNK = 4  # tokens of a chunk in the self-test: small, so that few ids cross many chunks


def check_config(model: PreTrainedModel, label: str) -> None:
    """Refuse by what a model says of itself.

    Raises:
        ModelRefused: with the reason.
    """
    config = model.config.get_text_config()
    if not model._supports_attention_backend:
        raise _refused(label, f"{type(model).__name__} does not compute its attention through transformers' attention interface")
    if config.is_encoder_decoder or not getattr(config, "is_causal", True):
        raise _refused(label, "it is no causal decoder")
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise _refused(label, f"it has layers of type {', '.join(sorted(strange))}; only full and sliding-window attention can be cached")
    ropes = _rope_types(config) & _BATCH_WIDE_ROPES
    if ropes:
        raise _refused(label, f"its rope_type {', '.join(sorted(ropes))} depends on the other requests of a batch")


def _rope_types(config: PretrainedConfig) -> set[str]:
    found: set[str] = set()
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if not isinstance(parameters, dict):
            continue
        for part in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
            found |= {part[key] for key in ("rope_type", "type") if isinstance(part.get(key), str)}
    return found


def probe(model: CausalModel) -> tuple[KVGeometry, tuple[AttentionArgs, ...]]:
    """Watch one forward: what its layers hand to attention is what must be cached, and how each of them attends.

    Raises:
        ModelRefused: a layer does not attend, or not like the others, or with another window than its config says.
    """
    seen: dict[int, KVGeometry] = {}
    seen_args: dict[int, AttentionArgs] = {}
    num_layers, label = model.shape.num_layers, model.label

    def watch(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
        if layer in seen:
            raise _refused(label, f"layer {layer} attends twice in one forward")
        if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
            raise _refused(label, f"layer {layer} has q, k, v of shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
        expected = _window_of(model.config, layer)
        if args.sliding_window != expected:
            raise _refused(label, f"layer {layer} attends with window {args.sliding_window}, its config says {expected}")
        seen[layer] = KVGeometry(num_layers, key.shape[1], key.shape[2], key.dtype)
        seen_args[layer] = args
        return torch.zeros_like(query)

    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    _call(label, lambda: model.logits(ids, positions, positions[0], watch))
    if set(seen) != set(range(num_layers)):
        raise _refused(label, f"only {len(seen)} of its {num_layers} layers attend; the others keep state that cannot be cached")
    if len(set(seen.values())) != 1:
        kinds = sorted({f"{kind.num_kv_heads} x {kind.head_dim}" for kind in seen.values()})
        raise _refused(label, f"its layers differ in KV heads or head size ({', '.join(kinds)})")
    return seen[0], tuple(seen_args[layer] for layer in range(num_layers))


def _window_of(config: PretrainedConfig, layer: int) -> int | None:
    """The window that a config promises for a layer; None: full attention."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the model's own eager attention answers to the sequences of the self-test."""

    ids: dict[str, list[int]]  # by name
    logits: dict[str, torch.Tensor]  # (n, V) in fp32, of a sequence of n tokens


def expect(model: CausalModel) -> Expected:
    """Let the model's modules answer, before anybody takes them apart.

    Raises:
        ModelRefused: they cannot.
    """
    longest = min(29, model.shape.max_positions)
    lengths = {"pieces": longest, "holes": max(1, longest - 2), "decode": max(1, longest - 18)}
    generator = torch.Generator().manual_seed(0)
    ids = {name: torch.randint(model.shape.vocab_size, (length,), generator=generator).tolist() for name, length in lengths.items()}
    with model.eager() as eager:
        return Expected(ids, _call(model.label, lambda: {name: _eager_logits(eager, tokens) for name, tokens in ids.items()}))


def self_test(model: CausalModel, expected: Expected, attention: str = "auto") -> None:
    """Compare with the model's own eager attention on random ids, in the ways a cache is used.

    Three sequences over scattered slots: one in pieces, one whose first chunks and a hole are computed in the same forward as its
    end, one that decodes. Tolerance: fp32, 1e-4 of the largest logit; 16 bits, a root mean square of 8 % of theirs
    (rounding alone makes 1 to 3 %, one wrong key of a short context far more).

    Raises:
        ModelRefused: the logits differ.
    """
    error = _call(model.label, lambda: _compare(model, expected, attention))
    limit = _TOLERANCES.get(model.dtype, _HALF_TOLERANCE)
    if not error <= limit:
        raise _refused(
            model.label, f"over a paged cache its logits differ from transformers' own by {error:.2g}, {limit:.2g} would be rounding"
        )


def _compare(model: CausalModel, expected: Expected, attention: str) -> float:
    """The error over all test sequences, as `self_test` defines it; NaN stays NaN."""
    run = _TestRun(model, attention, expected.ids)
    cut = _TEST_CHUNK * 2
    a, b, c = (len(expected.ids[name]) for name in ("pieces", "holes", "decode"))
    # Everything of "holes" once, so that the second forward may recompute its beginning and its middle.
    run.step(("pieces", 0, cut), ("holes", 0, b - 1), ("decode", 0, c - 1))
    run.wipe("holes", 0, 3)
    run.wipe("holes", 4, 5)
    hole = (min(4 * _TEST_CHUNK, b - 1), min(5 * _TEST_CHUNK, b - 1))
    run.step(
        ("pieces", cut, a), ("holes", 0, min(3 * _TEST_CHUNK, b - 1)), ("holes", *hole), ("holes", b - 1, b), ("decode", c - 1, c)
    )  # fmt: skip
    ours = torch.stack([logits for _, _, logits in run.outputs])
    theirs = torch.stack([expected.logits[name][position] for name, position, _ in run.outputs])
    difference = (ours - theirs).abs()
    if model.dtype in _TOLERANCES:
        return float(difference.max() / theirs.abs().max())
    return float(difference.square().mean().sqrt() / theirs.square().mean().sqrt())


def _eager_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """(n, V) of a sequence of n tokens, in fp32."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()
    return logits


class _TestRun:
    """Sequences computed through our attention, in forwards chosen by hand."""

    def __init__(self, model: CausalModel, attention: str, ids: dict[str, list[int]]) -> None:
        self.model, self.ids = model, ids
        self.backend: Any = make_backend(attention, model.geometry, _TEST_CHUNK, model.device)
        counts = {name: -(-len(tokens) // _TEST_CHUNK) for name, tokens in ids.items()}
        self.store = KVStore(sum(counts.values()), model.geometry.num_layers, self.backend.layer_bytes, model.device)
        self.backend.bind(self.store)
        self.builder = BatchBuilder(_TEST_CHUNK, model.device)
        free = torch.randperm(self.store.num_slots, generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = {name: tuple(free.pop() for _ in range(count)) for name, count in counts.items()}
        self.builder.update(BlockTableUpdate(name, 0, slots) for name, slots in self.tables.items())
        self.outputs: list[tuple[str, int, torch.Tensor]] = []  # (sequence, position, logits there)

    def step(self, *ranges: tuple[str, int, int]) -> None:
        """One forward over token ranges; empty ones are left out."""
        spans = tuple(Span(name, start, stop, tuple(self.ids[name][start:stop]), True) for name, start, stop in ranges if start < stop)
        batch = self.builder.build(spans, lambda span: 0)
        for span, row in zip(spans, self.model.forward(batch, PagedAttention(self.backend, batch)).float(), strict=True):
            self.outputs.append((span.request_id, span.stop - 1, row))

    def wipe(self, name: str, first: int, stop: int) -> None:
        """Forget what some chunks hold."""
        self.store.data[list(self.tables[name][first:stop])] = 0


def _call(label: str, forward: Callable[[], Any]) -> Any:
    """A forward through our attention; whatever it raises means that the model cannot be served."""
    try:
        return forward()
    except ModelRefused:
        raise
    except Exception as error:
        raise _refused(label, f"its forward fails over a paged cache: {type(error).__name__}: {error}") from error


def _refused(label: str, reason: str) -> ModelRefused:
    return ModelRefused(f"{label} cannot be served: {reason}. `pensieve models` lists models that can")
