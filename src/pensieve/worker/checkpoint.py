"""Compares a folder's weight files with its config: every tensor is accounted for, or the model is refused.

Knows tensor names and shapes; never what a model computes. transformers fills what no file holds with random
numbers, ignores what it has no place for, and logs both. Here either refuses the model.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pensieve.errors import ModelRefused

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_SHOWN = 4  # names of a list that a message shows
_LONGEST_HEADER = 100 << 20  # bytes; the format allows no longer header

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
_MASK = re.compile(
    r"(^|\.)(attn|attention|self_attn|crossattention)\.(masked_)?bias$"
)  # a causal mask: applied by position instead
_OTHER_SENSES = re.compile(
    r"^(model\.|thinker\.|base_model\.)*"
    r"(visual|vision\w*|image\w*|audio\w*|video\w*|speech\w*|sound\w*|embed_vision|embed_audio|"
    r"multi_modal_projector|mm_projector|"
    r"vit\w*|vpm|apm|resampler|talker|token2wav|code2wav)\."
)
_WRAPPERS = re.compile(
    r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\."
)  # parts of names that mean nothing, wherever they are
_ADAPTER = re.compile(r"(^|\.)lora_|\.base_layer\.")
_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a weight file."""

    shape: tuple[int, ...]
    file: str


@dataclass(slots=True)
class Differences:
    """Differences between files and config. Names are the model's, if it has one."""

    missing: set[str] = field(default_factory=set)
    left_over: set[str] = field(default_factory=set)
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=dict
    )  # shapes (in the files, by the config)
    broken: dict[str, str] = field(
        default_factory=dict
    )  # why a tensor could not be made of those in the files

    def __bool__(self) -> bool:
        return bool(self.missing or self.left_over or self.misshapen or self.broken)


def refused(label: str, reason: str) -> ModelRefused:
    """The refusal of a folder's files, with the ways out."""
    return ModelRefused(
        f"{label} is not what its config says: {reason}. Nothing is invented: fetch its files again, or name "
        "a folder whose files are complete"
    )


# --- what lies in the files
# ----------------------------------------------------------------------------------------


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the folder's index names and that are missing."""
    for single, index in WEIGHT_FILES:
        if (folder / single).exists():
            return []
        if (folder / index).exists():
            return sorted(
                name for name in set(_index(folder, index).values()) if not (folder / name).exists()
            )
    return []


def stored_tensors(folder: Path, label: str) -> dict[str, Stored]:
    """Every tensor of the files that transformers loads a folder from, by name. Reads no weights.

    Raises:
        ModelRefused: a file is damaged, cut off or missing, files and index disagree, or there are two sets
            of weights.
    """
    for single, index in WEIGHT_FILES:
        pattern = single.replace(".", "*.", 1)  # model*.safetensors
        shards = {p.name for p in folder.glob(pattern) if re.search(r"-\d+-of-\d+\.", p.name)}
        if (folder / single).exists():
            if shards:
                raise refused(
                    label,
                    f"it holds two sets of weights, {single} and {_list(shards)}: move one of them away",
                )
            return _read(folder, {single}, label)
        if not (folder / index).exists():
            continue
        named = _index(folder, index)
        if gone := missing_shards(folder):
            raise refused(label, f"{index} names {len(gone)} files that are not there ({_list(gone)})")
        if strays := shards - set(named.values()):
            raise refused(label, f"{len(strays)} weight files are not in {index} ({_list(strays)})")
        found = _read(folder, set(named.values()), label)
        if lost := {name for name, file in named.items() if name not in found or found[name].file != file}:
            raise refused(
                label, f"{len(lost)} tensors are not in the files that {index} names for them ({_list(lost)})"
            )
        return found
    raise refused(label, f"there are no weight files in {folder}")


def _index(folder: Path, index: str) -> dict[str, str]:
    try:
        return dict(json.loads((folder / index).read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelRefused(
            f"{folder / index} is damaged ({type(error).__name__}: {error}): fetch the model again"
        ) from error


def _read(folder: Path, files: set[str], label: str) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in sorted(files):
        try:
            shapes = _header(folder / file) if file.endswith(".safetensors") else _pickled(folder / file)
        except Exception as error:  # JSON, struct, pickle and zip files each fail in their own ways
            raise ModelRefused(
                f"{label} could not be loaded from {folder}: {file} is damaged or cut off ({error}): fetch "
                "it again"
            ) from error
        if twice := found.keys() & shapes.keys():
            raise refused(label, f"{len(twice)} tensors are in more than one file ({_list(twice)})")
        found |= {name: Stored(shape, file) for name, shape in shapes.items()}
    return found


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if not 0 < length <= _LONGEST_HEADER:
            raise ValueError(f"no safetensors header, {length} bytes long")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    need = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if (size := path.stat().st_size) < need:
        raise ValueError(f"{size} bytes, {need} belong to it")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _pickled(path: Path) -> dict[str, tuple[int, ...]]:
    state = torch.load(path, map_location="meta", weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


# --- which name is which
# -------------------------------------------------------------------------------------------


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
            f"it holds {len(adapters)} tensors of a LoRA adapter ({_list(adapters)}), which must be merged "
            "into its base model first "
            "(`merge_and_unload` of peft)",
        )
    known = _Names.of(model)
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


class _Names:
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
    def of(cls, model: PreTrainedModel) -> _Names | None:
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
        first = _num_layers(config)
        if first is not None and first <= int(layer[3]) < first + guesses:
            return "a layer that guesses several tokens ahead: never asked"
    if _OTHER_SENSES.search(name):
        return "of the part that sees or hears: this model is served for text"
    return None


# --- the verdict
# ---------------------------------------------------------------------------------------------------


def require_experts(stored: Mapping[str, Stored], label: str) -> None:
    """Refuse files in which experts between others are missing: stacked, they would get wrong numbers.

    Raises:
        ModelRefused: with the first that is missing.
    """
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in stored:
        if match := _EXPERT.match(name):
            numbers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    counts: dict[str, int] = {}
    for (prefix, _), found in numbers.items():
        counts[prefix] = max(counts.get(prefix, 0), max(found) + 1)
    gone = [
        f"{prefix}.{n}.{rest}"
        for (prefix, rest), found in numbers.items()
        for n in range(counts[prefix])
        if n not in found
    ]
    if gone:
        raise refused(label, f"{len(gone)} tensors of experts are in no file ({_list(gone)})")


@contextlib.contextmanager
def watching() -> Iterator[list[Any]]:
    """Collect the reports of transformers' loads in this block, before its own ignore lists are applied."""
    from transformers import PreTrainedModel

    reports: list[Any] = []
    original = PreTrainedModel._adjust_missing_and_unexpected_keys

    def keep(self: PreTrainedModel, report: Any) -> None:
        reports.append(report)

    PreTrainedModel._adjust_missing_and_unexpected_keys = keep
    try:
        yield reports
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = original


def differences_of(report: Any) -> Differences:
    """The differences in transformers' report of a load."""
    shapes = {name: (tuple(stored), tuple(expected)) for name, stored, expected in report.mismatched_keys}
    return Differences(
        set(report.missing_keys),
        set(report.unexpected_keys),
        shapes,
        dict(getattr(report, "conversion_errors", None) or {}),
    )


def expected_differences(
    stored: Mapping[str, Stored], mapping: Mapping[str, str], model: PreTrainedModel
) -> Differences | None:
    """The differences before anything is loaded, from names and shapes alone.

    None if tensors are made of several, or quantised: only loading can tell.
    """
    names = _Names.of(model)
    if names is None or getattr(model.config, "quantization_config", None) is not None:
        return None
    state = model.state_dict()
    differences = Differences(missing=set(state))
    for name, entry in stored.items():
        for pattern, replacement in mapping.items():
            name = re.sub(pattern, replacement, name)
        becomes = names.target(name)
        if becomes is None:
            differences.left_over.add(name)
            continue
        if names.is_converted(name):
            return None
        differences.missing.discard(becomes)
        if entry.shape != tuple(state[becomes].shape):
            differences.misshapen[becomes] = (entry.shape, tuple(state[becomes].shape))
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    groups = {
        source: {source, *(target for target, other in tied.items() if other == source)}
        for source in tied.values()
    }
    for group in groups.values():
        if not group <= differences.missing:  # one of them is there, and stands for all
            differences.missing -= group
    return differences


def judge(differences: Differences, stored: Mapping[str, Stored], model: PreTrainedModel, label: str) -> None:
    """Refuse a model whose files and config differ in more than names known to be harmless.

    Raises:
        ModelRefused: with the number of tensors and their names.
    """
    shapes = {name: entry.shape for name, entry in stored.items()}
    left = {
        name
        for name in differences.left_over
        if why_harmless(name, _shape_of(name, shapes), model.config) is None
    }
    buffers = {name for name, _ in model.named_buffers()}
    missing = {
        name
        for name in differences.missing
        if not (name in buffers and why_harmless(name, None, model.config))
    }
    if not (left or missing or differences.misshapen or differences.broken):
        return
    reasons = []
    held, says = _layers_held(shapes), _num_layers(model.config)
    if held and says and held != says and (left or missing):
        reasons.append(f"its files hold {held} layers, its config says {says}")
    if missing:
        heads = (
            " although the config does not tie it to the embedding (tie_word_embeddings)"
            if missing == {"lm_head.weight"}
            else ""
        )
        reasons.append(f"{_count(missing)} in no file ({_list(missing)}){heads}")
    if left:
        reasons.append(f"{_count(left, 'has', 'have')} no place in the model ({_list(left)})")
    if differences.misshapen:
        listed = [
            f"{n} is {in_files} in the files, {by_config} by the config"
            for n, (in_files, by_config) in sorted(differences.misshapen.items())
        ]
        reasons.append(
            f"{_count(listed)} of another shape: "
            f"{'; '.join(listed[:_SHOWN])}{', ...' if len(listed) > _SHOWN else ''}"
        )
    if differences.broken:
        reasons.append(
            f"{_count(differences.broken)} made of several, and those in the files do not go together "
            f"({_list(differences.broken)})"
        )
    raise refused(label, "; ".join(reasons))


def require_ties(model: PreTrainedModel, label: str) -> None:
    """Refuse files with two different tensors that the config says are one.

    Raises:
        ModelRefused: with their names.
    """
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source):
            raise refused(
                label,
                f"its files hold a {target} that differs from {source}, and its config ties them into one: "
                "set tie_word_embeddings to false in "
                "config.json if the model was trained so",
            )


def left_out(differences: Differences) -> str | None:
    """A note on the part of a model that is not served; None if there is none."""
    senses = [name for name in differences.left_over if _OTHER_SENSES.search(name)]
    return (
        f"served for text: {len(senses)} tensors of the part that sees or hears are left out"
        if senses
        else None
    )


def require_finite(model: PreTrainedModel, label: str) -> None:
    """Refuse weights that are not finite.

    Raises:
        ModelRefused: with the first of them.
    """
    bad = [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point() and not _is_finite(tensor)
    ]
    if bad:
        kind = str(model.dtype).removeprefix("torch.")
        way = "; float16 overflows above 65504: try --dtype bfloat16" if model.dtype is torch.float16 else ""
        raise ModelRefused(
            f"{label} cannot be served: {_count(bad)} not finite in {kind} ({_list(bad)}){way}. Fetch its "
            "files again, or name another model"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0 or tensor.dtype.itemsize == 1:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _shape_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a tensor whose name may have lost or gained a prefix; None if it is in no file."""
    if name in shapes:
        return shapes[name]
    return next(
        (
            shape
            for other, shape in shapes.items()
            if other.endswith("." + name) or name.endswith("." + other)
        ),
        None,
    )


def _layers_held(names: Iterable[str]) -> int | None:
    """The number of layers in the text part of some files; None if it has none."""
    numbers: Counter[str] = Counter()
    most: dict[str, int] = {}
    for name in names:
        if not _OTHER_SENSES.search(name) and (match := _LAYER.search(name)):
            prefix = name[: match.start(3)]
            numbers[prefix] += 1
            most[prefix] = max(most.get(prefix, 0), int(match[3]) + 1)
    return most[numbers.most_common(1)[0][0]] if numbers else None


def _num_layers(config: PretrainedConfig) -> int | None:
    text = config.get_text_config()
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return None


def _count(what: Collection[str], one: str = "is", more: str = "are") -> str:
    return f"1 tensor {one}" if len(what) == 1 else f"{len(what)} tensors {more}"


def _list(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")
