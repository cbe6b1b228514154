"""What only a CUDA device can show.

Real streams, page-locked memory, graphs, and a step in which nothing waits for the device.
"""

from __future__ import annotations

import functools

import pytest
import torch

from oracle import TOLERANCE, Lab
from pensieve.config import TierConfig
from pensieve.core.plan import BlockTableUpdate, Copy, RequestStart, Span, StepPlan
from pensieve.core.request import Request, SamplingParams
from pensieve.worker.gate import admit
from pensieve.worker.kv_store import KVStore, SlotCopy
from pensieve.worker.memory import device_share
from pensieve.worker.model import CausalModel
from pensieve.worker.transfer import Transfer
from pensieve.worker.worker import ModelWorker
from tiny_models import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@functools.cache
def model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> CausalModel:
    return admit(tiny(architecture, 0, dtype).to(CUDA))


def assert_answer(request: Request, architecture: str) -> None:
    """Every token is the eager forward's on a CPU, or a near-tie there."""
    reference = tiny(architecture)
    reference.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([request.tokens]), use_cache=False).logits[0].float()
    for position, token in enumerate(request.output, start=request.num_prompt):
        row = logits[position - 1]
        assert float(row.max() - row[token]) <= 10 * TOLERANCE * float(row.abs().max())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("graph_rows", [0, 4])
def test_answers_are_the_stateless_ones(architecture: str, graph_rows: int) -> None:
    lab = Lab(model(architecture), (14, 40), ahead=True, graph_rows=graph_rows, real_graphs=True)
    logs: dict[str, list[int]] = {f"c{i}": [] for i in range(4)}
    for turn in range(3):
        for name, log in logs.items():
            prompt = [*log, *((ord(name[1]) * 7 + 5 * i + turn) % 199 for i in range(17))]
            lab.submit(f"{name}-{turn}", name, prompt, 6, len(log))
        lab.run()
        for name in logs:
            request = lab.done[f"{name}-{turn}"]
            assert_answer(request, architecture)
            logs[name] = request.tokens
    assert lab.scheduler.num_copies_failed == 0
    lab.close()


def test_a_step_of_decodes_waits_for_nothing() -> None:
    tiers = (TierConfig("gpu", 40),)
    worker = ModelWorker(model(), tiers, 8, graph_rows=4)
    names = ("a", "b", "c")
    samplings = (
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_p=0.9, seed=2, logprobs=3),
    )
    prompts = tuple(Span(name, 0, 20, tuple(range(20)), True) for name in names)
    started = tuple(
        RequestStart(name, sampling, tuple(range(20)))
        for name, sampling in zip(names, samplings, strict=True)
    )
    tables = tuple(
        BlockTableUpdate(name, 0, tuple(range(10 * index, 10 * index + 5)))
        for index, name in enumerate(names)
    )
    worker.run(StepPlan(0, prompts, (), (), started, tables, (), ()))
    for step in range(1, 4):  # compiled and captured by now
        worker.run(
            StepPlan(
                step,
                tuple(Span(name, 19 + step, 20 + step, None, True) for name in names),
                (),
                (),
                (),
                (),
                (),
                (),
            )
        )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        worker.begin(
            StepPlan(4, tuple(Span(name, 23, 24, None, True) for name in names), (), (), (), (), (), ())
        )
        worker.begin(
            StepPlan(5, tuple(Span(name, 24, 25, None, True) for name in names), (), (), (), (), (), ())
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(worker.finish().tokens) for _ in range(2)] == [3, 3]
    worker.close()


@pytest.mark.parametrize("layer", [None, 1])
def test_slots_cross_the_link_whole_or_by_layer(layer: int | None) -> None:
    device, host = KVStore(20, 3, 4096, CUDA), KVStore(30, 3, 4096, CPU, pinned=True)
    host.data.copy_(torch.randint(256, host.data.shape, dtype=torch.uint8))
    sources, targets = [3, 4, 5, 17, 29], [0, 1, 2, 9, 19]
    move = SlotCopy(host, sources, device, targets)
    move.whole() if layer is None else move.layer(layer)
    torch.cuda.synchronize()
    layers = range(3) if layer is None else [layer]
    for each in layers:
        assert torch.equal(device.data[targets, each].cpu(), host.data[sources, each])
    SlotCopy(device, targets, host, [10, 11, 12, 13, 14]).whole()
    torch.cuda.synchronize()
    assert torch.equal(host.data[10:15], device.data[targets].cpu())


def test_out_and_in_again_with_checksums() -> None:
    stores = [KVStore(40, 4, 8192, CUDA), KVStore(40, 4, 8192, CPU, pinned=True)]
    stores[0].data.copy_(torch.randint(256, stores[0].data.shape, dtype=torch.uint8))
    before = stores[0].data[:20].cpu().clone()
    transfer = Transfer(stores, verify=True)
    transfer.start((), tuple(Copy(index, 0, index, 1, 39 - index) for index in range(20)))
    transfer.wait()
    ticket = transfer.start(tuple(Copy(100 + index, 1, 39 - index, 0, 20 + index) for index in range(20)), ())
    ticket.wait()
    done, failed = transfer.end_step()
    assert len(done) == 40 and not failed
    assert torch.equal(stores[0].data[20:].cpu(), before)
    transfer.close()


def test_the_first_tier_that_was_found_fits() -> None:
    room = device_share(model(), max_batch_tokens=512, max_running=16, chunk_tokens=8, graph_rows=4)
    slots = room.tier // (2 * 2 * 2 * 12 * 8 * 4)
    assert 0 < room.step < room.free and slots > 1000
