"""`pensieve profile` as a user types it; what it prints as JSON is a machine for the simulator."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from simulator_worlds import PROFILE

from pensieve.cli import profile as profile_command
from pensieve.cli.commands import cli
from pensieve.runtime import profiling as profile_module
from pensieve.simulator.measured import load_machine
from pensieve.worker.gate import admit
from pensieve.worker.model import CausalModel
from tiny_models import tiny


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> CausalModel:
    """A small model whose profile is known."""
    model = admit(tiny("llama"), "some/llama", test=False)
    resolved = SimpleNamespace(label="some/llama", weights="random", note="")
    monkeypatch.setattr(
        profile_command,
        "load_model",
        lambda *_, **__: SimpleNamespace(resolved=resolved, model=model, shape=model.shape, dtype="float32"),
    )

    def known(*_: Any, **__: Any) -> Any:
        return PROFILE

    monkeypatch.setattr(profile_module, "load_or_measure", known)
    return model


def test_the_table_has_everything(measured: CausalModel) -> None:
    result = CliRunner().invoke(cli, ["profile"], standalone_mode=False)
    assert result.exception is None, result.exception
    for words in (
        "ms a chunk",
        "     512      521.00",
        "       8      3.00",
        "attention 1.00 us a token that one query sees, 13.00 us a token before a chunk",
        "planning 0.10 ms a step and 3 us a request in it, committing 0.05 ms, 2 us, and 200 us an answer's end",
        "prefill 850 tokens/s, decode step 12.0 ms",
        "copy cpu->gpu 2.0 GB/s",
    ):
        assert words in result.stdout


def test_the_json_is_a_machine_for_the_simulator(measured: CausalModel, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["profile", "--json"], standalone_mode=False)
    assert result.exception is None, result.exception
    path = tmp_path / "profile.json"
    path.write_text(result.stdout)
    machine = load_machine(path)
    assert machine.profile == PROFILE and machine.shape == measured.shape
    assert (machine.model, machine.device_type, machine.bytes_per_value) == ("some/llama", "cpu", 4)
    assert machine.tiers_in_ram
