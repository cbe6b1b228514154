"""A machine out of a profile file: what it costs, how it is served, and what a bad file is told."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from simulator_worlds import CHUNK_BYTES, DOCUMENT, PROFILE, small

from pensieve.core.plan import Span
from pensieve.errors import ConfigError
from pensieve.simulator.case import SYSTEMS, Machine, run_case
from pensieve.simulator.cost_model import Overheads
from pensieve.simulator.measured import load_machine
from pensieve.workloads.load_plan import LoadOptions


def written(folder: Path, content: dict[str, Any] | str) -> Path:
    path = folder / "profile.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def measured_machine(folder: Path, **changes: Any) -> Machine:
    return Machine.of_profile(
        load_machine(written(folder, DOCUMENT | changes)), 40 * CHUNK_BYTES / 1e9, 60 * CHUNK_BYTES / 1e9
    )


def test_a_machine_comes_out_of_its_file(tmp_path: Path) -> None:
    machine = measured_machine(tmp_path)
    assert machine.measured is not None and machine.measured.profile == PROFILE
    assert (machine.model, machine.hardware) == ("some model", "some CPU")
    assert [tier.num_slots for tier in machine.tiers(SYSTEMS["pensieve"], 32)] == [40, 60]
    assert machine.host_overheads() == Overheads(1e-4, 3e-6, 5e-5, 2e-6, 2e-4)
    assert machine.cost().step_s([Span("r", 0, 1, None, emits_token=True)]) == pytest.approx(0.012 + 1e-6)
    links = machine.links(32)
    assert links.up_s(1) == pytest.approx(CHUNK_BYTES / 2e9) and links.down_s(0) == pytest.approx(
        CHUNK_BYTES / 1e9
    )
    assert machine.chunk_costs(machine.cost(), 32, 8192).of_chunk(1) == pytest.approx(0.041)


def test_copies_come_first_where_all_tiers_are_in_ram(tmp_path: Path) -> None:
    assert measured_machine(tmp_path).copies_first
    assert not measured_machine(tmp_path, device_type="cuda").copies_first
    assert not Machine().copies_first


@pytest.mark.parametrize("system", ["pensieve", "gpu-only", "stateless"])
def test_a_case_of_it_is_a_value_that_runs(tmp_path: Path, system: str) -> None:
    case = small(system, machine=measured_machine(tmp_path))
    assert pickle.loads(pickle.dumps(case)) == case
    outcome = run_case(case, keep_records=True)
    assert outcome.summary.sent == 60 and not outcome.summary.failed
    assert outcome.summary == run_case(case).summary


def test_a_result_is_taken_in_before_the_next_step_is_planned(tmp_path: Path) -> None:
    alone = LoadOptions(users=1, turns=1, new_tokens=10, output_tokens=5)
    machine = measured_machine(tmp_path)
    outcome = run_case(small(machine=machine, load=alone), keep_records=True)
    (record,) = outcome.records
    assert outcome.simulated_s - record.finished_s == pytest.approx(
        5e-5 + 2e-6 + 2e-4
    )  # an answer is there before that
    assert outcome.busy_share < 1.0


def test_chunks_are_those_that_were_measured(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="measured with chunks of 32 tokens, the simulation has chunks of 16"
    ):
        run_case(small(machine=measured_machine(tmp_path), chunk_tokens=16))


def test_there_is_no_disk_in_a_profile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a profile measures no disk"):
        dataclasses.replace(measured_machine(tmp_path), disk_cache_gb=1.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        (DOCUMENT | {"format": 1}, "its format is 1, this version reads 2: measure again"),
        ({key: value for key, value in DOCUMENT.items() if key != "step_points"}, "step_points is missing"),
        (DOCUMENT | {"step_points": [[1, 0.1]]}, "step_points must be at least 2 pairs"),
        (DOCUMENT | {"step_points": [[8, 0.1], [1, 0.2]]}, "step_points must be at least 2 pairs"),
        (DOCUMENT | {"step_points": "many"}, "step_points cannot be read"),
        (DOCUMENT | {"answer_points": [[1, -1.0]]}, "answer_points must be at least 0, got -1.0"),
        (DOCUMENT | {"decode_token_s": float("nan")}, "decode_token_s must be at least 0, got nan"),
        (DOCUMENT | {"copy_bytes_per_s": {"gpu->cpu": 1e9}}, "copy_bytes_per_s has no 'cpu->gpu'"),
        (
            DOCUMENT | {"copy_bytes_per_s": {"gpu->cpu": 1e9, "cpu->gpu": 0.0}},
            "copy_bytes_per_s must be positive, got 0.0",
        ),
        ({key: value for key, value in DOCUMENT.items() if key != "shape"}, "shape is missing"),
        (
            DOCUMENT | {"shape": DOCUMENT["shape"] | {"num_layers": 0}},
            "shape.num_layers must be an integer of at least 1, got 0",
        ),
        (DOCUMENT | {"bytes_per_value": "two"}, "bytes_per_value must be of type int, got 'two'"),
    ],
)
def test_a_bad_file_is_told_what_is_wrong(tmp_path: Path, content: Any, words: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as error:
        load_machine(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        load_machine(tmp_path / "none.json")
