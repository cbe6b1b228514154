"""Which models may be served: refuse at load what would run and answer wrong. Knows transformers' configs and our attention.

Three steps: what the config says, and a forward on `meta` that allocates nothing; one forward that only watches (does every layer attend
once, all with the same KV heads, with the window its config promises?); and a self-test against the model's own eager attention, in
float32 even where the model has 16 bits. Models that mix in state other than KV, or look at a whole batch to choose their positions, are
wrong here without an error: nothing but this gate stands between them and a user.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.errors import ModelRefused
from pensieve.worker.attention import AttentionArgs, KVGeometry, PagedAttention, make_backend
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.kv_store import KVStore
from pensieve.worker.random_weights import outline
from pensieve.worker.widening import choose, decoder_layers, widened

if TYPE_CHECKING:
    from pensieve.worker.model import CausalModel

log = logging.getLogger(__name__)

_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
_LAYER_TYPE_FIELDS = ("layer_types", "layers_block_type", "block_types", "layer_block_types")
# The most of each that is built. Every model known has a tenth of it or less.
_COUNTS = {
    "num_hidden_layers": 2048, "num_attention_heads": 4096, "num_key_value_heads": 4096, "hidden_size": 1 << 20, "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}  # fmt: skip
_BATCH_WIDE_ROPES = {"dynamic", "longrope"}  # choose frequencies by the longest position of a batch
_TOLERANCE = 1e-4  # in float32: of the largest logit, for the largest difference
_HALF_TOLERANCE = 0.08  # in 16 bits, for the root mean square of the difference over that of the logits
_BYTE_TOLERANCE = 0.1  # likewise with weights of 8 bits, which alone make 3 to 8 % in tiny random models
_HALF_FACTOR = 1.6  # in 16 bits, where float32 is known: how many times as far from it as transformers' own answer ours may be
_HALF_FLOOR = 2e-3  # a distance from it that is rounding whatever transformers' own is
# Weights that are computed in float32 at most, so that it takes some seconds: for each thread of a CPU, and anywhere.
_FLOAT_BUDGET_A_THREAD, _FLOAT_BUDGET = 300_000_000, 2_000_000_000
_TEST_CHUNK = 4  # tokens of a chunk in the self-test: small, so that few ids cross many chunks


class ForwardFails(ModelRefused):
    """A model whose forward raises over a paged cache."""


class NotHonoured(Exception):
    """What a layer asked of attention and our attention does not do."""


class PastUs(AssertionError):
    """Attention that was not told what it is to attend to."""


def check_config(config: PretrainedConfig, label: str) -> None:
    """Refuse by a config alone, before anything is fetched, converted or loaded: by what it says, then by a forward on `meta`.

    Raises:
        ModelRefused: with the reason in words.
    """
    from pensieve.worker.model import CausalModel

    check_words(config, label)
    model = outline(copy.deepcopy(config))
    check_class(model, label)
    try:
        CausalModel(model, label, self_test=False, forward="modules")
    except (
        ForwardFails
    ) as error:  # what depends on data cannot be computed there: the probe after loading tells
        log.debug("%s on meta: %s", label, error)


def check_words(config: PretrainedConfig, label: str) -> None:
    """Refuse by what a config says.

    Raises:
        ModelRefused: with the reason in words.
    """
    reason = _why_not(config)
    if reason is not None:
        raise _refused(label, reason)


def check_class(model: PreTrainedModel, label: str) -> None:
    """Refuse by what a model's class says of itself.

    Raises:
        ModelRefused: with the reason in words.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if getattr(model, "_is_stateful", False) and not _attends_everywhere(config):
        raise _refused(
            label,
            f"{name} keeps recurrent or convolution state beside keys and values, not through the attention interface; it cannot be cached yet",
        )
    if not model._supports_attention_backend:
        how = (
            " (it biases scores by distance, ALiBi)"
            if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt")
            else ""
        )
        raise _refused(
            label, f"{name} does not compute its attention through transformers' attention interface{how}"
        )


def _why_not(config: PretrainedConfig) -> str | None:
    try:
        text = config.get_text_config()
    except ValueError:
        return "it is made of several models that read or write text, and is no causal decoder"
    if config.is_encoder_decoder or not getattr(text, "is_causal", True):
        return "it is no causal decoder"
    if (reason := _wrong_number(text)) is not None:
        return reason
    if _number(text, "kv_lora_rank"):
        return (
            f"it keeps keys and values compressed (multi-head latent attention, kv_lora_rank {text.kv_lora_rank}); Pensieve caches whole heads, "
            "with keys and values of one size"
        )
    strange = {kind for field in _LAYER_TYPE_FIELDS for kind in _listed(text, field)} - _LAYER_TYPES
    if strange:
        return f"it has layers of type {', '.join(sorted(strange))}; only full and sliding-window attention can be cached"
    for field, what in (
        ("head_dim", "head size"),
        ("num_key_value_heads", "number of KV heads"),
        ("num_attention_heads", "number of heads"),
    ):
        try:
            values = getattr(text, field, None)
        except Exception:  # transformers' own kind, for a number that differs between layers
            return f"its layers differ in {what} ({field}); all layers of a cache have the same"
        if isinstance(values, (list, tuple)) and len(set(values)) > 1:
            return f"its layers differ in {what} ({field}: {', '.join(map(str, sorted(set(values))))}); all layers of a cache have the same"
    values = _number(text, "v_head_dim")
    keys = _number(text, "head_dim") or _number(text, "qk_head_dim")
    if values and keys and values != keys:
        return f"its keys have {keys} numbers a head and its values {values} (v_head_dim); Pensieve caches both at one size"
    ropes = _rope_types(text) & _BATCH_WIDE_ROPES
    if ropes:
        return f"its rope_type {', '.join(sorted(ropes))} depends on the other requests of a batch"
    return None


def _wrong_number(config: PretrainedConfig) -> str | None:
    """What no model can have of a number: building a million layers takes hours, and one of 0 heads divides by it."""
    for name in _COUNTS:
        try:
            value = getattr(config, name, None)
        except Exception:  # (a number that differs between layers: said below)
            continue
        if value is None or isinstance(value, (list, tuple)):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return f"its {name} is {str(value)[:40]!r}, where a positive whole number is needed"
        if value > _COUNTS[name]:
            return f"its {name} is {value}, more than the {_COUNTS[name]} that are built"
    heads, kv_heads = _number(config, "num_attention_heads"), _number(config, "num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        return f"it has {heads} query heads, which {kv_heads} KV heads do not divide"
    return None


def _number(config: PretrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _listed(config: PretrainedConfig, name: str) -> list[str]:
    values = getattr(config, name, None)
    return [value for value in values if isinstance(value, str)] if isinstance(values, (list, tuple)) else []


def _attends_everywhere(config: PretrainedConfig) -> bool:
    """The config lists its layers' types, and attention is all there is."""
    kinds = {kind for field in _LAYER_TYPE_FIELDS for kind in _listed(config, field)}
    return bool(kinds) and kinds <= _LAYER_TYPES


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

    def watch(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        if layer in seen:
            raise _refused(label, f"layer {layer} attends twice in one forward")
        if (reason := _why_not_shapes(query, key, value)) is not None:
            raise _refused(label, f"layer {layer} has {reason}")
        expected = _window_of(model.config, layer)
        if args.sliding_window != expected:
            raise _refused(
                label, f"layer {layer} attends with window {args.sliding_window}, its config says {expected}"
            )
        seen[layer] = KVGeometry(num_layers, key.shape[1], key.shape[2], key.dtype)
        seen_args[layer] = args
        return torch.zeros_like(query)

    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    _call(label, lambda: model.logits(ids, positions, positions[0], watch))
    if set(seen) != set(range(num_layers)):
        raise _refused(
            label,
            f"only {len(seen)} of its {num_layers} layers attend; the others keep state that cannot be cached",
        )
    if len(set(seen.values())) != 1:
        kinds = sorted({f"{kind.num_kv_heads} x {kind.head_dim}" for kind in seen.values()})
        raise _refused(label, f"its layers differ in KV heads or head size ({', '.join(kinds)})")
    return seen[0], tuple(seen_args[layer] for layer in range(num_layers))


def _why_not_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why a layer's q, k, v, each (T, heads, D), cannot be cached in words; None: they can."""
    if key.shape[2] != value.shape[2]:
        return f"keys of {key.shape[2]} numbers a head and values of {value.shape[2]}; Pensieve caches both at one size"
    if key.shape[1] != value.shape[1]:
        return f"{key.shape[1]} heads of keys and {value.shape[1]} of values; Pensieve caches as many of both"
    if query.shape[2] != key.shape[2]:
        return f"queries of {query.shape[2]} numbers a head and keys of {key.shape[2]}"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads, which {key.shape[1]} KV heads do not divide"
    if not len(query) == len(key) == len(value):
        return f"{len(query)} queries and {len(key)} keys for as many tokens; keys must be the tokens' own"
    return None


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
    wide: (
        dict[str, torch.Tensor] | None
    )  # the same, computed in float32; None: it could not be, or not over all layers


def expect(model: CausalModel, attention: str = "auto") -> Expected:
    """Let the model's modules answer, before anybody takes them apart; where they have 16 bits, in float32 as well, and over a paged cache.

    Raises:
        ModelRefused: they cannot, their answers are not finite, or over a paged cache they differ.
    """
    longest = min(29, model.shape.max_positions)
    lengths = {"pieces": longest, "holes": max(1, longest - 2), "decode": max(1, longest - 18)}
    generator = torch.Generator().manual_seed(0)
    ids = {
        name: torch.randint(model.shape.vocab_size, (length,), generator=generator).tolist()
        for name, length in lengths.items()
    }
    with model.eager() as eager:
        logits = _call(model.label, lambda: _eager(eager, ids))
    if not all(bool(torch.isfinite(answer).all()) for answer in logits.values()):
        kind = str(model.dtype).removeprefix("torch.")
        way = (
            ": try --dtype bfloat16, which overflows far later"
            if model.dtype is torch.float16
            else ": its weights are damaged, fetch it again"
        )
        raise _refused(model.label, f"its own logits are not finite in {kind}{way}")
    wide = None if model.dtype.itemsize != 2 else _expect_wide(model, ids, attention)
    return Expected(ids, logits, wide)


def _expect_wide(
    model: CausalModel, ids: dict[str, list[int]], attention: str
) -> dict[str, torch.Tensor] | None:
    """The answers in float32, after a comparison of both ways to attend; None where there are none, or not of the whole model."""
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
    ) as error:  # modules that insist on their own number type: then the looser test in 16 bits has to do
        log.info("%s is not computed in float32 (%s: %s)", model.label, type(error).__name__, error)
        return None
    _require_close(model.label, _largest(run, wide), _TOLERANCE)
    return wide if computed == every else None


def _kind(args: AttentionArgs) -> tuple[object, ...]:
    return (args.scaling, args.sliding_window, args.softcap, args.sinks is None)


def self_test(model: CausalModel, expected: Expected, attention: str = "auto") -> None:
    """Compare with the model's own eager attention on random ids, in the ways a cache is used.

    Three sequences over scattered slots: one in pieces, one whose first chunks and a hole are computed in the same forward as its
    end, one that decodes. Tolerance: fp32, 1e-4 of the largest logit. In 16 bits, the root mean square of the distance from the answers in
    float32 may be 1.6 times that of transformers' own; where there are none, 8 % of the logits' (rounding alone makes 1 to 3 %).

    Raises:
        ModelRefused: the logits differ.
    """
    _require_close(model.label, *_call(model.label, lambda: _compare(model, expected, attention)))


def _require_close(label: str, error: float, limit: float) -> None:
    if error != error:
        raise _refused(
            label, "over a paged cache its logits are not finite, by transformers' own attention they are"
        )
    if error > limit:
        raise _refused(
            label,
            f"over a paged cache its logits differ from transformers' own by {error:.2g}, {limit:.2g} would be rounding",
        )


def _compare(model: CausalModel, expected: Expected, attention: str) -> tuple[float, float]:
    """The error over all test sequences, and what would be rounding, as `self_test` defines them."""
    run = _paged(model, expected.ids, attention, model.dtype)
    if model.dtype.itemsize > 2:
        return _largest(run, expected.logits), _TOLERANCE
    if "int8" in model.forward_name:
        return _distance(run, expected.wide or expected.logits), _BYTE_TOLERANCE
    if expected.wide is None:
        return _distance(run, expected.logits), _HALF_TOLERANCE
    if (
        model.forward_name == "modules"
    ):  # proven in float32; here an expert that is chosen by a hair may be another one for some tokens
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
    """The same of a token in the middle: half of all tokens are off by no more. NaN stays NaN."""
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
    # Everything of "holes" once, so that the second forward may recompute its beginning and its middle.
    run.step(("pieces", 0, cut), ("holes", 0, b - 1), ("decode", 0, c - 1))
    run.wipe("holes", 0, 3)
    run.wipe("holes", 4, 5)
    hole = (min(4 * _TEST_CHUNK, b - 1), min(5 * _TEST_CHUNK, b - 1))
    parts = [
        cut,
        *(stop for stop in (9, 11, 14, 18, 23) if cut < stop < a),
        a,
    ]  # each answers: more to compare
    run.step(
        *(("pieces", start, stop) for start, stop in itertools.pairwise(parts)), ("holes", 0, min(3 * _TEST_CHUNK, b - 1)), ("holes", *hole), ("holes", b - 1, b), ("decode", c - 1, c)
    )  # fmt: skip
    return run.outputs


def _eager(model: PreTrainedModel, ids: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: _eager_logits(model, tokens) for name, tokens in ids.items()}


def _eager_at_once(model: PreTrainedModel, ids: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The same in one forward: what follows a sequence's end changes nothing before it."""
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
    """Sequences computed through our attention, in forwards chosen by hand."""

    def __init__(
        self, model: CausalModel, attention: str, ids: dict[str, list[int]], dtype: torch.dtype
    ) -> None:
        self.model, self.ids = model, ids
        self.backend: Any = make_backend(
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
        """One forward over token ranges; empty ones are left out."""
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
        """Forget what some chunks hold."""
        self.store.data[list(self.tables[name][first:stop])] = 0


def _call(label: str, forward: Callable[[], Any]) -> Any:
    """A forward through our attention; whatever it raises means that the model cannot be served."""
    try:
        return forward()
    except ModelRefused:
        raise
    except NotHonoured as error:
        raise _refused(label, str(error)) from error
    except PastUs as error:
        raise _refused(
            label,
            "its layers do not hand what our attention needs on to it, as transformers' attention interface asks",
        ) from error
    except Exception as error:
        log.info("%s: its forward fails over a paged cache", label, exc_info=error)
        reason = (
            f"its own code fails over a paged cache ({type(error).__name__} in transformers' {_where(error)})"
        )
        raise ForwardFails(_refused(label, reason).message) from error


def _where(error: Exception) -> str:
    """The function that raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "code" if trace is None else trace.tb_frame.f_code.co_qualname


def _refused(label: str, reason: str) -> ModelRefused:
    return ModelRefused(f"{label} cannot be served: {reason}. `pensieve models` lists models that can")
