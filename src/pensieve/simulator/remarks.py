"""What a reader of the simulated figures must know: how they came about, and why they differ where they do. Words only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

HOW: tuple[str, ...] = (
    "Every curve comes out of the scheduler and the cache that serve, unchanged, in virtual time, against a worker that costs instead of computing: a "
    "roofline of products, weights, attention and KV, copies over links with a rate each way, swap-ins layer by layer, swap-outs in the background. "
    "Conversations have the means of the paper's datasets; the shapes around the means are not published, and chosen.",
    "Three numbers were fitted, on vLLM's curve of Figure 10a alone, and hold for every other figure, model and system: 9 ms of a step and 0.2 ms of "
    "each request in it that are not the device's, and how long a run lasts (15 minutes; it begins with nobody, so its length decides how long histories get). "
    "The A100's efficiencies are from Figures 3 and 4. Nothing else was adjusted.",
    "The baseline is the paper's: it keeps nothing between turns, and prompts and decodes have steps of their own. Latency is read as the 90th percentile of "
    "normalized latency. A point is the mean of two seeds, which all systems share; requests sent in the first quarter of a run do not count. With think times "
    "beyond a minute runs are longer, by the root of the factor. Throughputs are compared at the latency at which the paper compares them.",
)

REMARKS: Mapping[str, tuple[str, ...]] = MappingProxyType({})
