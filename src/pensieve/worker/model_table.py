"""The table of `pensieve models`. Knows presets and the default model; never weights or the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pensieve.worker import embedded
from pensieve.worker.presets import PRESETS, Preset


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of `pensieve models`."""

    name: str
    kind: Literal["embedded", "preset", "how-to"]
    num_parameters: int | None
    weight_bytes: int | None  # in bfloat16
    kv_bytes_per_token: int | None  # in bfloat16
    max_context: int | None  # tokens
    detail: str


def describe_models() -> list[ModelRow]:
    """The rows of `pensieve models`: the embedded default, the presets, and how to name other models."""
    rows = [
        _preset_row(
            PRESETS[embedded.PRESET],
            embedded.NAME,
            "embedded",
            f"SmolLM2-135M-Instruct, the default: {embedded.state()}",
        )
    ]
    for preset in PRESETS.values():
        detail = (
            f"real weights: {preset.hub_id}" if preset.hub_id else "random weights only (never published)"
        )
        rows.append(_preset_row(preset, preset.name, "preset", detail))
    how_to = {
        "ORG/NAME": (
            "a hub id: fetched into the Hugging Face cache, used from there when offline; "
            "ORG/NAME:Q4_K_M a GGUF file of it"
        ),
        "FOLDER": "a local folder with config.json, safetensors (or .bin) files and a tokenizer",
        "FILE.gguf": (
            "a GGUF file, or any part of a split one: converted once, kept in the cache "
            "(needs pensieve-serve[gguf])"
        ),
    }
    rows.extend(ModelRow(name, "how-to", None, None, None, None, detail) for name, detail in how_to.items())
    return rows


def _preset_row(preset: Preset, name: str, kind: Literal["embedded", "preset"], detail: str) -> ModelRow:
    count, shape = preset.num_parameters, preset.shape
    return ModelRow(name, kind, count, 2 * count, shape.kv_bytes_per_token(2), shape.max_positions, detail)
