"""Maps the tensor names in weight files to a model's. Knows names and shapes; never weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pensieve.worker.weight_files import Stored, listed, refused

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Tensors that may be left over, each with the reason why nothing is lost.
_HARMLESS = (
    (re.compile(r"(^|[._])(original_)?inv_freq$"), "rotary frequencies: computed from the config"),
    (re.compile(r"(^|\.)position_ids$"), "0, 1, 2, ...: counted instead"),
    (re.compile(r"(^|\.)(mtp|mtp_\w+|nextn)\."), "heads that guess several tokens ahead: never asked"),
    (
        re.compile(r"(^|\.)(k|v)_scale$|\.(k|v)_proj\.output_scale$"),
        "scales of an 8-bit KV cache: keys and values are kept as computed",
    ),
)
# A causal mask: applied by position instead.
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|crossattention)\.(masked_)?bias$")
OTHER_SENSES = re.compile(
    r"^(model\.|thinker\.|base_model\.)*"
    r"(visual|vision\w*|image\w*|audio\w*|video\w*|speech\w*|sound\w*|embed_vision|embed_audio|"
    r"multi_modal_projector|mm_projector|"
    r"vit\w*|vpm|apm|resampler|talker|token2wav|code2wav)\."
)
# Parts of names that mean nothing, wherever they are.
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_ADAPTER = re.compile(r"(^|\.)lora_|\.base_layer\.")
_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")


def key_mapping(stored: Mapping[str, Stored], model: PreTrainedModel, label: str) -> dict[str, str]:
    """How to rewrite the names in the files so that they are the model's: patterns and their replacements.

    Args:
        stored: the tensors in the files.
        model: on any device, `meta` included.
        label: for messages.

    Raises:
        ModelRefused: the files hold an adapter, or two sets of weights.
    """
    if adapters := {name for name in stored if _ADAPTER.search(name)}:
        raise refused(
            label,
            f"it holds {len(adapters)} tensors of a LoRA adapter ({listed(adapters)}), which must be merged "
            "into its base model first "
            "(`merge_and_unload` of peft)",
        )
    known = TensorNames.of(model)
    wrapped = {name for name in stored if _WRAPPERS.search(name)}
    mapping = {
        re.escape(wrapper): "" for wrapper in sorted({w for name in wrapped for w in _WRAPPERS.findall(name)})
    }
    names: dict[str, str] = {}  # names in the files, by the name without wrappers
    for name in stored:
        bare = _WRAPPERS.sub("", name)
        if bare in names:
            raise refused(
                label, f"it holds two sets of weights: {names[bare]} and {name} are one tensor of it"
            )
        names[bare] = name
    if known is None:
        return mapping
    target = known.target
    fitting = {found for name in names if (found := target(name)) is not None}
    strays = [
        name
        for name in names
        if target(name) is None and why_harmless(name, stored[names[name]].shape, model.config) is None
    ]
    prefix = _common_prefix(strays, target, fitting, label)
    return mapping | ({"^" + re.escape(prefix): ""} if prefix else {})


def _common_prefix(
    strays: list[str], target: Callable[[str], str | None], fitting: set[str], label: str
) -> str | None:
    """The one prefix without which stray names are the model's; None if there is none."""
    fits: dict[str, dict[str, str]] = {}  # by prefix, the model's names and those in the files
    for name in strays:
        for end in (match.end() for match in re.finditer(r"\.", name)):
            if (found := target(name[end:])) is not None:
                fits.setdefault(name[:end], {})[found] = name
    if not fits:
        return None
    # The prefix that fits most names wins; of equals the shortest ("language_model." and
    # "language_model.model.").
    best = max(fits, key=lambda prefix: (len(fits[prefix]), -len(prefix)))
    rivals = [prefix for prefix in fits if not prefix.startswith(best) and not best.startswith(prefix)]
    both = next((name for prefix in rivals for name in fits[prefix] if name in fits[best]), None)
    direct = next((name for name in fits[best] if name in fitting), None)
    if both is not None or direct is not None:
        one = fits[best][both or direct or ""]
        other = both and next(fits[prefix][both] for prefix in rivals if both in fits[prefix])
        raise refused(
            label, f"it holds two sets of weights: {one} and {other or direct} would be one tensor of it"
        )
    return best


class TensorNames:
    """Maps tensor names of files to a model's, as transformers renames them."""

    def __init__(
        self,
        model: PreTrainedModel,
        renamings: list[Any],
        converters: list[Any],
        rename: Callable[..., tuple[str, str | None]],
    ):
        self._state, self._base = model.state_dict(), model.base_model_prefix
        self._renamings, self._converters, self._rename = renamings, converters, rename

    @classmethod
    def of(cls, model: PreTrainedModel) -> TensorNames | None:
        """The mapping for a model; None if this version of transformers cannot tell."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

            transforms = get_model_conversion_mapping(model)
        except (ImportError, TypeError, AttributeError):
            return None
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        return cls(
            model, renamings, [t for t in transforms if isinstance(t, WeightConverter)], rename_source_key
        )

    def target(self, name: str) -> str | None:
        """The model's name of a tensor of the files; None if the model has no place for it."""
        renamed, _ = self._rename(name, self._renamings, self._converters, self._base, self._state)
        if renamed not in self._state:  # as transformers does: perhaps it should not have been renamed
            renamed, _ = self._rename(name, [], [], self._base, self._state)
        return renamed if renamed in self._state else None

    def is_converted(self, name: str) -> bool:
        """Whether more than its name changes: it is cut, or stacked with others."""
        return self._rename(name, self._renamings, self._converters, self._base, self._state)[1] is not None


def why_harmless(name: str, shape: tuple[int, ...] | None, config: PretrainedConfig) -> str | None:
    """Why nothing is lost with a tensor that the model has no place for; None if something would be."""
    for pattern, reason in _HARMLESS:
        if pattern.search(name):
            return reason
    if (
        _MASK.search(name)
        and shape is not None
        and (shape == () or shape == (1,) or (len(shape) == 4 and shape[-1] == shape[-2]))
    ):
        return "a causal mask: applied by position instead"
    text = config.get_text_config()
    guesses = getattr(text, "num_nextn_predict_layers", None) or 0
    if guesses and (layer := _LAYER.search(name)):
        first = num_layers(config)
        if first is not None and first <= int(layer[3]) < first + guesses:
            return "a layer that guesses several tokens ahead: never asked"
    if OTHER_SENSES.search(name):
        return "of the part that sees or hears: this model is served for text"
    return None


def layers_held(names: Iterable[str]) -> int | None:
    """The number of layers in the text part of some files; None if it has none."""
    numbers: Counter[str] = Counter()
    most: dict[str, int] = {}
    for name in names:
        if not OTHER_SENSES.search(name) and (match := _LAYER.search(name)):
            prefix = name[: match.start(3)]
            numbers[prefix] += 1
            most[prefix] = max(most.get(prefix, 0), int(match[3]) + 1)
    return most[numbers.most_common(1)[0][0]] if numbers else None


def num_layers(config: PretrainedConfig) -> int | None:
    """The number of layers in a config; None if it does not say."""
    text = config.get_text_config()
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return None
