"""A machine as `pensieve profile --json` measured it. Knows that file; never requests, schedulers or how
anything was measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pensieve.config import ModelShape
from pensieve.core.cost import CostProfile
from pensieve.errors import ConfigError
from pensieve.simulator.cost_model import Measured, Overheads
from pensieve.simulator.worker import Links
from pensieve.worker.measurements import Profile, parse

# Both directions on a machine whose tiers all lie in RAM share its memory; a link to a device is shared as
# little as the paper's (§5).
_DUPLEX_SHARE = {"cpu": 0.5}
_LINK_DUPLEX_SHARE = 0.81


@dataclass(frozen=True, slots=True)
class MeasuredMachine:
    """One model on one machine."""

    model: str  # as the profile calls it
    shape: ModelShape
    bytes_per_value: int  # of KV
    device: str
    device_type: str  # "cpu", "cuda"
    profile: Profile

    @property
    def tiers_in_ram(self) -> bool:
        """The first tier lies in main memory, like the second: copies cost next to nothing."""
        return self.device_type == "cpu"

    def chunk_bytes(self, chunk_tokens: int) -> int:
        """One chunk over all layers."""
        return self.shape.kv_bytes_per_token(self.bytes_per_value) * chunk_tokens

    def cost(self) -> Measured:
        """What its steps cost."""
        profile = self.profile
        return Measured(
            self.shape.num_layers, profile.step_points, profile.answer_points, profile.decode_token_s, profile.chunk_token_s,
            profile.chunk_tokens,
        )  # fmt: skip

    def chunk_costs(self, chunk_tokens: int) -> CostProfile:
        """Cost(l), by which a server on this machine evicts.

        Raises:
            ConfigError: chunks of another size were measured.
        """
        if chunk_tokens != self.profile.chunk_tokens:
            raise ConfigError(
                f"the profile was measured with chunks of {self.profile.chunk_tokens} tokens, the simulation "
                f"has chunks of {chunk_tokens}: take the same"
            )
        return CostProfile(self.profile.points, chunk_tokens)

    def overheads(self) -> Overheads:
        """What the scheduler takes."""
        found = self.profile
        return Overheads(
            found.plan_step_s,
            found.plan_request_s,
            found.commit_step_s,
            found.commit_request_s,
            found.commit_end_s,
        )

    def links(self, chunk_tokens: int) -> Links:
        """What its copies take. There is no disk: none was measured."""
        rates = self.profile.copy_bytes_per_s
        up, down = rates["cpu->gpu"], rates["gpu->cpu"]
        share = _DUPLEX_SHARE.get(self.device_type, _LINK_DUPLEX_SHARE)
        return Links(self.chunk_bytes(chunk_tokens), up, up, down, share, host_down_bytes_per_s=down)


def load_machine(path: Path) -> MeasuredMachine:
    """A machine from the file that `pensieve profile --json` printed (or kept).

    Raises:
        ConfigError: it cannot be read, or something in it is missing or makes no sense; the message says
            what.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the profile {path} cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(
            f"the profile {path} is no JSON: {error}; `pensieve profile --json > {path.name}` writes one"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"the profile {path} is no JSON object; `pensieve profile --json > {path.name}` writes one"
        )
    try:
        return read_machine(content)
    except ValueError as error:
        raise ConfigError(f"the profile {path} cannot be used: {error}") from error


def read_machine(content: Mapping[str, Any]) -> MeasuredMachine:
    """A machine from what such a file holds.

    Raises:
        ValueError: something in it is missing or makes no sense; the message says what.
    """
    profile = parse(content)
    for direction in ("gpu->cpu", "cpu->gpu"):
        if direction not in profile.copy_bytes_per_s:
            raise ValueError(f"copy_bytes_per_s has no {direction!r}")
    values: dict[str, Any] = {}
    for name, kind in (
        ("model", str),
        ("device", str),
        ("device_type", str),
        ("bytes_per_value", int),
        ("shape", dict),
    ):
        if name not in content:
            raise ValueError(f"{name} is missing")
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {content[name]!r}")
        values[name] = content[name]
    if values["bytes_per_value"] < 1:
        raise ValueError(f"bytes_per_value must be at least 1, got {values['bytes_per_value']}")
    return MeasuredMachine(**(values | {"shape": _shape(values["shape"])}), profile=profile)


def _shape(content: dict[str, Any]) -> ModelShape:
    names = [field.name for field in dataclasses.fields(ModelShape)]
    for name in names:
        value = content.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"shape.{name} must be an integer of at least 1, got {value!r}")
    return ModelShape(**{name: content[name] for name in names})
