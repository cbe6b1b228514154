"""Small simulations: a small model, tiers of a few dozen chunks, conversations of a few hundred tokens."""

from __future__ import annotations

from dataclasses import replace

from pensieve.simulator.case import Case, Machine
from pensieve.simulator.cost_model import Overheads
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.load_plan import LoadOptions

CHUNK_BYTES = 32 * 23_040  # smollm2-135m
MACHINE = Machine(
    "smollm2-135m", "a100-80gb", gpu_cache_gb=40 * CHUNK_BYTES / 1e9, cpu_cache_gb=60 * CHUNK_BYTES / 1e9, overheads=Overheads(1e-3, 1e-5)
)
LOAD = LoadOptions(users=12, turns=5, new_tokens=40, first_tokens=90, output_tokens=30, think=ThinkTime(0.3, exponential=True), seed=3)


def small(
    system: str = "pensieve", policy: str = "retention", load: LoadOptions = LOAD, machine: Machine = MACHINE, **more: object
) -> Case:
    """A case that runs in a fraction of a second."""
    case = Case(machine, load, system, policy, max_context=1024, max_batch_tokens=192, max_running=8, debug=True)
    return replace(case, **more)  # type: ignore[arg-type]
