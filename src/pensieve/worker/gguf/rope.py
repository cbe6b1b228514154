"""Rotary positions of a GGUF file as transformers' `rope_parameters`.

Knows keys and factors; never layers. Defaults for missing keys are llama.cpp's: base 10,000, all of a head
rotated, linear scaling if only a factor is given.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pensieve.worker.gguf.keys import Keys

_CLOSE = 1e-4  # two factors that differ less, relatively, are the same: files keep them as float32
_LLAMA3_CONTEXTS = tuple(2**n for n in range(8, 21))  # tokens of context before frequencies were scaled


def rope_parameters(
    keys: Keys, head_dim: int, context: int, *, partial: bool = False, scaled: bool = True
) -> dict[str, Any]:
    """`rope_parameters` of a config for all layers.

    Args:
        keys: of the file.
        head_dim: size of a head.
        context: the model's context in the file, tokens.
        partial: whether the model can leave a part of each head unrotated.
        scaled: False leaves out the scaling, which the caller handles.

    Raises:
        ModelRefused: a kind of scaling that transformers lacks, or a partly rotated head in a model that can
            have none.
    """
    parameters = {
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        **(_scaling(keys, context) if scaled else {}),
    }
    dimensions = keys.whole("rope.dimension_count", head_dim)
    if partial:
        parameters["partial_rotary_factor"] = _share(dimensions, head_dim)
    elif dimensions != head_dim:
        raise keys.refused(
            f"it rotates {dimensions} of the {head_dim} numbers of a head, and transformers rotates all for "
            "this kind"
        )
    return parameters


def _scaling(keys: Keys, context: int) -> dict[str, Any]:
    """The kind of scaling and its numbers, without the base."""
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    original = keys.whole("rope.scaling.original_context_length", 0) or context
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    kind = keys.get("rope.scaling.type") or "linear"
    match kind:
        case "none":
            factor = 1.0
        case "linear":
            pass
        case "yarn":
            return _yarn(keys, factor, original, attention)
        case "longrope":
            raise keys.refused(
                "its rotary positions are scaled by longrope, and it holds no factors for that"
            )
        case _:
            raise keys.refused(f"its rotary positions are scaled in a way that is not known here ({kind!r})")
    if abs(attention - 1) > _CLOSE:
        raise keys.refused(
            f"it scales attention by {attention:g} (rope.scaling.attn_factor), which transformers does for "
            "yarn only"
        )
    return {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _yarn(keys: Keys, factor: float, original: int, attention: float) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for name, key in (
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ):
        if (beta := keys.number(key, 0.0)) > 0:
            parameters[name] = beta
    keys.require("rope.scaling.yarn_ext_factor", 1.0, "transformers extrapolates by 1")
    usual = _mscale(factor, 1.0)
    if multiplier := keys.number("rope.scaling.yarn_log_multiplier", 0.0):
        usual /= _mscale(factor, multiplier)
        parameters["attention_factor"] = usual
    # Converters write the whole factor into yarn_attn_factor and, in some architectures, into attn_factor;
    # llama.cpp multiplies the latter with the usual one. The meaning is certain only if both readings agree.
    if (whole := keys.number("rope.scaling.yarn_attn_factor", 0.0)) > 0:
        parameters["attention_factor"] = whole
    elif not (math.isclose(attention, 1.0, rel_tol=_CLOSE) or math.isclose(attention, usual, rel_tol=_CLOSE)):
        raise keys.refused(
            f"it scales attention by {attention:g} (rope.scaling.attn_factor), yarn by {factor:g} usually by "
            f"{usual:.4g}"
        )
    return parameters


def _mscale(factor: float, multiplier: float) -> float:
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope(
    keys: Keys, parameters: dict[str, Any], long: list[float], short: list[float], context: int
) -> dict[str, Any]:
    """`parameters` of kind longrope with its lists of factors (dimensions / 2,) and its attention factor.

    The attention factor is left out if it is the usual one.
    """
    original = parameters["original_max_position_embeddings"]
    attention = keys.number("rope.scaling.attn_factor", 0.0)
    ratio = context / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    found = {**parameters, "rope_type": "longrope", "long_factor": long, "short_factor": short}
    if attention > 0 and not math.isclose(attention, usual, rel_tol=_CLOSE):
        found["attention_factor"] = attention
    return found


def llama3(keys: Keys, plain: dict[str, Any], factors: npt.NDArray[np.float32]) -> dict[str, Any]:
    """`plain` parameters with Llama 3's scaling, found from its factors `rope_freqs.weight` (dimensions /
    2,).

    Llama 3.1 and later divide long wavelengths by a factor, leave short ones as they are, and blend between
    (transformers' `rope_type` "llama3"). The file keeps only the resulting factors; we find the rule again,
    or refuse the file.

    Raises:
        ModelRefused: no rule that transformers has gives these factors.
    """
    if np.allclose(factors, 1.0, rtol=_CLOSE):
        return plain
    if plain["rope_type"] != "default":
        raise keys.refused(
            f"it scales rotary positions twice (rope_freqs.weight and rope.scaling.type {plain['rope_type']})"
        )
    count, factor = factors.size, float(factors.max())
    wavelengths = 2 * math.pi * plain["rope_theta"] ** (np.arange(count, dtype=np.float64) / count)
    for context in _LLAMA3_CONTEXTS:
        smooth = np.clip((context / wavelengths - 1.0) / 3.0, 0.0, 1.0)
        if np.allclose(1.0 / ((1 - smooth) / factor + smooth), factors, rtol=_CLOSE):
            return {
                **plain, "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": context,
            }  # fmt: skip
    raise keys.refused(
        "its rotary frequency factors (rope_freqs.weight) follow no rule that transformers has"
    )


def _share(dimensions: int, head_dim: int) -> float:
    """The share of a head that is rotated, such that transformers rounds it down to the same number of
    dimensions.
    """
    share = dimensions / head_dim
    return share if int(head_dim * share) == dimensions else math.nextafter(share, 2.0)
