"""What a reader of the simulated figures must know: how they came about, and why they differ where they do. Words only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

HOW: tuple[str, ...] = ()
REMARKS: Mapping[str, tuple[str, ...]] = MappingProxyType({})
