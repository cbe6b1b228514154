"""Small simulations: a small model, tiers of a few dozen chunks, conversations of a few hundred tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from pensieve.simulator.case import Case, Machine
from pensieve.simulator.cost_model import Overheads
from pensieve.worker.measurements import Profile
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.load_plan import LoadOptions

CHUNK_BYTES = 32 * 23_040  # smollm2-135m
MACHINE = Machine(
    "smollm2-135m",
    "a100-80gb",
    gpu_cache_gb=40 * CHUNK_BYTES / 1e9,
    cpu_cache_gb=60 * CHUNK_BYTES / 1e9,
    overheads=Overheads(1e-3, 1e-5),
)
LOAD = LoadOptions(
    users=12,
    turns=5,
    new_tokens=40,
    first_tokens=90,
    output_tokens=30,
    think=ThinkTime(0.3, exponential=True),
    seed=3,
)

PROFILE = Profile(
    chunk_tokens=32,
    points=((32, 0.040), (64, 0.041), (128, 0.043)),
    rest_s=0.039,
    prefill_tokens_per_s=850.0,
    decode_step_s=0.012,
    copy_bytes_per_s={"gpu->cpu": 1e9, "cpu->gpu": 2e9},
    step_points=((1, 0.010), (512, 0.521)),
    answer_points=((1, 0.002), (8, 0.003)),
    decode_token_s=1e-6,
    chunk_token_s=1.3e-5,
    plan_step_s=1e-4,
    plan_request_s=3e-6,
    commit_step_s=5e-5,
    commit_request_s=2e-6,
    commit_end_s=2e-4,
)
DOCUMENT: dict[str, Any] = {
    "format": 2,
    "model": "some model",
    "shape": {
        "num_layers": 30, "hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "intermediate_size": 1536,
        "vocab_size": 49152, "max_positions": 8192,
    },
    "dtype": "bfloat16",
    "bytes_per_value": 2,
    "device": "some CPU",
    "device_type": "cpu",
    "threads": 1,
    **dataclasses.asdict(PROFILE),
}  # fmt: skip


def small(
    system: str = "pensieve",
    policy: str = "retention",
    load: LoadOptions = LOAD,
    machine: Machine = MACHINE,
    **more: object,
) -> Case:
    """A case that runs in a fraction of a second."""
    case = Case(
        machine, load, system, policy, max_context=1024, max_batch_tokens=192, max_running=8, debug=True
    )
    return replace(case, **more)  # type: ignore[arg-type]
