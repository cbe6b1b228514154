"""What a step costs, against numbers worked out by hand, and what must hold of any machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pensieve.config import ModelShape
from pensieve.core.plan import Span
from pensieve.errors import ConfigError
from pensieve.simulator.case import SYSTEMS, Machine
from pensieve.simulator.cost_model import Measured, ModelNumbers, Roofline, chunk_costs
from pensieve.simulator.hardware import HARDWARE, Hardware, find_hardware
from pensieve.worker.presets import PRESETS

# 1 TFLOP/s and 1 TB/s, all of them reached; attention of any tile at 1 TFLOP/s
EVEN = Hardware("even", 1e12, 1.0, 1e12, 0.0, 1e12, 1.0, 1e12, 1e9, 0.8, 1e9, 1e9, 1e12, 1e-6, 0.0)
MODEL = ModelNumbers(ModelShape(10, 1000, 10, 5, 100, 4000, 100, 4096), 100_000_000)


def span(start: int, stop: int) -> Span:
    return Span("r", start, stop, None, emits_token=False)


def test_a_decode_reads_its_weights_and_its_context() -> None:
    kv = 2 * 10 * 5 * 100 * 2
    assert MODEL.kv_bytes_per_token == kv
    # weights: 200 MB at 1 TB/s; attention: 1,000 tokens of 20 kB to read, or 4 * 10 * 10 * 100 FLOPs each, which take longer
    assert Roofline(MODEL, EVEN).step_s([span(999, 1000)]) == pytest.approx(
        200e6 / 1e12 + 1000 * max(kv, 40_000) / 1e12
    )


def test_a_prompt_multiplies() -> None:
    # 2 FLOPs a weight and token; each query sees itself and what is before it: 1, 2, ..., 512
    pairs = 512 * 513 / 2
    assert Roofline(MODEL, EVEN).step_s([span(0, 512)]) == pytest.approx(
        512 * 2e8 / 1e12 + pairs * 40_000 / 1e12
    )


def test_devices_share_the_work_and_tell_each_other() -> None:
    alone, four = Roofline(MODEL, EVEN), Roofline(MODEL, EVEN, 4)
    reduced = 20 * (
        1e-6 + 1.5 * 512 * 1000 * 2 / 1e12
    )  # 2 a layer: latency, and 2 (n - 1) / n of the activations
    assert four.step_s([span(0, 512)]) == pytest.approx(alone.step_s([span(0, 512)]) / 4 + reduced)


def test_a_step_is_no_shorter_than_launching_it() -> None:
    assert Machine("smollm2-135m").cost().step_s([span(0, 1)]) == pytest.approx(
        30 * find_hardware("a100-80gb").launch_s
    )


@given(
    st.sampled_from(sorted(HARDWARE)),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 500)), min_size=1, max_size=8),
)
def test_more_work_takes_longer(name: str, pieces: list[tuple[int, int]]) -> None:
    cost = Roofline(MODEL, HARDWARE[name])
    spans = [span(start, start + length) for start, length in pieces]
    assert 0 < cost.step_s(spans) <= cost.step_s([*spans, span(7, 8)]) * (1 + 1e-12)
    longer = [span(start + 1, start + length + 1) for start, length in pieces]
    assert cost.step_s(spans) <= cost.step_s(longer) * (1 + 1e-12)


def test_costs_of_chunks_rise_and_have_no_less_than_the_weights() -> None:
    profile = chunk_costs(Machine("opt-13b").cost(), 32, 16_384)
    costs = [profile.of_chunk(index) for index in range(512)]
    assert costs == sorted(costs)
    assert costs[0] > 0.015  # 26 GB of weights
    assert (
        1.2 < (costs[-1] - costs[0]) / costs[0] < 1.6
    )  # Fig. 4: at 16,384 tokens attention takes half as much again as the rest


def test_an_input_embedding_counts_where_it_is_the_outputs_too() -> None:
    assert Machine("opt-13b").numbers().matrix_parameters == PRESETS["opt-13b"].num_parameters
    untied = PRESETS["llama2-70b"]
    assert Machine("llama2-70b").numbers().matrix_parameters == untied.num_parameters - 32_000 * 8192
    assert Machine("llama3.2-1b").numbers().matrix_parameters == PRESETS["llama3.2-1b"].num_parameters


def test_tiers_hold_what_the_paper_gives_them() -> None:
    gpu, cpu = Machine("opt-13b").tiers(SYSTEMS["pensieve"], 32)
    assert gpu.num_slots * 32 == pytest.approx(40e9 / 819_200, abs=32)
    assert cpu.num_slots * 32 == pytest.approx(220e9 / 819_200, abs=32)
    assert len(Machine("opt-13b").tiers(SYSTEMS["gpu-only"], 32)) == 1
    four = Machine("llama2-70b", devices=4).tiers(SYSTEMS["pensieve"], 32)
    assert four[0].num_slots * 32 == pytest.approx(160e9 / 327_680, abs=32)
    assert len(Machine("opt-13b", disk_cache_gb=100.0).tiers(SYSTEMS["pensieve"], 32)) == 3


def test_measured_points_are_met_and_extended() -> None:
    cost = Measured(
        30, [(1, 0.010), (8, 0.012), (512, 0.150)], [(1, 0.002), (5, 0.004)], 1e-6, 3.2e-5 - 31e-7, 32
    )
    assert cost.linear_s(1) == pytest.approx(0.010)
    assert cost.linear_s(8) == pytest.approx(0.012)
    assert cost.linear_s(1016) == pytest.approx(0.150 + (0.150 - 0.012))
    assert cost.linear_s(8, 1) == pytest.approx(0.014)
    assert cost.linear_s(8, 3) == pytest.approx(0.015)
    assert cost.linear_s(8, 9) == pytest.approx(0.018)
    assert cost.step_s([span(99, 100)]) == pytest.approx(0.010 + 100e-6)
    assert cost.step_s([]) == 0.0
    with pytest.raises(ConfigError, match=r"at least 2 ascending \(count, seconds\) for steps"):
        Measured(30, [(8, 0.1), (1, 0.2)], [(1, 0.0)], 1e-6, 1e-5)
    with pytest.raises(ConfigError, match=r"at least 1 ascending \(count, seconds\) for answers"):
        Measured(30, [(1, 0.1), (8, 0.2)], [], 1e-6, 1e-5)


def test_what_attention_reads_and_what_it_multiplies_are_told_apart() -> None:
    # one query: 1 us a token; a chunk of 32: 16.5 us. So 0.5 us to read a token, and 0.5 us a query and token.
    cost = Measured(30, [(1, 0.0), (8, 0.0)], [(1, 0.0)], 1e-6, 16.5e-6, 32)
    assert cost.attention_s(1, 1000) == pytest.approx(1e-3)
    assert cost.attention_s(32, 1000) == pytest.approx(0.5e-6 * 1000 + 0.5e-6 * 32 * (1000 - 15.5))
    assert cost.attention_s(32, 2000) - cost.attention_s(32, 1000) == pytest.approx(
        16.5e-3
    )  # as it was measured


def test_an_answer_costs_more_than_a_token() -> None:
    cost = Measured(30, [(1, 0.010), (8, 0.017)], [(1, 0.002), (8, 0.009)], 0.0, 0.0, 32)
    prompt = [Span("p", 0, 8, None, emits_token=True)]
    decodes = [Span(str(row), 0, 1, None, emits_token=True) for row in range(8)]
    assert cost.step_s(prompt) == pytest.approx(0.019)
    assert cost.step_s(decodes) == pytest.approx(0.026)


def test_hardware_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory_efficiency of hardware 'odd' must lie in"):
        Hardware("odd", 1e12, 1.0, 1e12, 0.0, 1e12, 1.5, 1e12, 1e9, 0.8, 1e9, 1e9, 1e12, 1e-6, 0.0)
    with pytest.raises(ConfigError, match="link_bytes_per_s of hardware 'odd' must be positive"):
        Hardware("odd", 1e12, 1.0, 1e12, 0.0, 1e12, 0.5, 1e12, 0.0, 0.8, 1e9, 1e9, 1e12, 1e-6, 0.0)
