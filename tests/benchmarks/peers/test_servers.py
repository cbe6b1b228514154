"""Each system's command line, and what it may keep."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from peers.install import Peers, llama_options, missing_tools, vllm_requirements
from peers.machine import cpu_flags
from peers.servers import LABELS, Server, Site, make, vllm_blocks
from peers.workloads import (
    BLOCK_TOKENS,
    KV_BYTES_PER_TOKEN,
    LLAMA,
    PENSIEVE,
    STATELESS,
    SYSTEMS,
    TRANSFORMERS,
    VLLM,
    VLLM_NONE,
    Kv,
    Measurement,
    conversation_tokens,
    workloads,
)

from pensieve.cli.commands import cli
from pensieve.config import slots_for_bytes

KV = Kv(9216, 18432)
CHUNK_TOKENS = 32


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(1000))
    return Site(Peers(tmp_path / "peers"), tmp_path / "model", 2, tmp_path / "scratch")


def option(server: Server, name: str) -> str:
    return server.command[server.command.index(name) + 1]


def test_pensieve_is_this_checkouts_and_its_tiers_hold_what_they_are_to(site: Site) -> None:
    server = make(PENSIEVE, site, KV, 8123)
    assert (
        server.command[:4] == (sys.executable, "-m", "pensieve", "serve")
        and option(server, "--port") == "8123"
    )
    assert Path(server.variables["PYTHONPATH"]) == Path(__file__).parents[3] / "src"
    chunk_bytes = CHUNK_TOKENS * KV_BYTES_PER_TOKEN
    for name, tokens in (("--gpu-cache", 9216), ("--cpu-cache", 18432)):
        assert (
            slots_for_bytes(int(float(option(server, name)) * 1_000_000_000), chunk_bytes)
            == tokens / CHUNK_TOKENS
        )
    assert option(make(PENSIEVE, site, Kv(9216), 1), "--cpu-cache") == "0"
    assert (
        server.kv_bytes == 27648 * 23040
        and server.weight_bytes == 1000
        and server.url == "http://127.0.0.1:8123"
    )
    stateless = make(STATELESS, site, KV, 8123)
    assert stateless.command == (*server.command, "--stateless") and stateless.system == STATELESS


@pytest.mark.parametrize("system", [PENSIEVE, STATELESS])
def test_pensieve_knows_the_options_it_is_given(site: Site, system: str) -> None:
    told = CliRunner().invoke(cli, ["serve", "--help"], terminal_width=200).output
    assert all(word in told for word in make(system, site, KV, 1).command[4:] if word.startswith("--"))


@pytest.mark.parametrize(
    "measurement", [one for workload in workloads() for one in (*workload.measurements, *workload.quick)]
)
def test_the_client_knows_the_options_it_is_given(measurement: Measurement) -> None:
    told = CliRunner().invoke(cli, ["bench", "--help"], terminal_width=200).output
    words = [word for call in measurement.calls() for word in call.arguments()]
    assert all(
        word in told
        for word in [*words, "--fresh-connections", "--seed", "--json", "--model", "--url"]
        if word.startswith("--")
    )
    assert ("--users" in words) != ("--rate" in words)


def test_vllm_with_and_without_its_cache(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "peers.servers.ctypes.util.find_library", lambda name: f"lib{name}.so.4"
    )  # this machine may have none
    server, without = make(VLLM, site, KV, 8123), make(VLLM_NONE, site, KV, 8123)
    assert server.command[0] == str(site.peers.vllm / "bin" / "python") and option(server, "--model") == str(
        site.model_folder
    )
    assert (
        option(server, "--num-gpu-blocks-override") == "217" and option(server, "--max-model-len") == "8192"
    )  # 216 blocks, and its own
    assert (
        server.variables["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
        and "tcmalloc_minimal" in server.variables["LD_PRELOAD"]
    )
    assert (
        float(server.variables["VLLM_CPU_KVCACHE_SPACE"]) * 2**30
        > vllm_blocks(KV) * BLOCK_TOKENS * KV_BYTES_PER_TOKEN
    )
    assert (
        without.command == (*server.command, "--no-enable-prefix-caching")
        and without.variables == server.variables
    )


def test_llama_cpp_divides_its_first_tier_into_slots(site: Site) -> None:
    server = make(LLAMA, site, Kv(9216, 18432, slots=8), 8123)
    assert (
        option(server, "-np") == "8"
        and option(server, "-c") == "9216"
        and option(server, "--cache-ram") == "405"
    )  # MiB
    assert option(server, "-t") == option(server, "-tb") == "2" and "--jinja" in server.command
    assert "--cache-ram" not in make(LLAMA, site, Kv(65536), 1).command and server.bench_options == (
        "--fresh-connections",
    )


def test_transformers_serves_the_model_by_its_folder(site: Site) -> None:
    server = make(TRANSFORMERS, site, Kv(65536), 8123)
    assert (
        option(server, "--cb-num-blocks") == "2048"
        and option(server, "--cb-block-size") == "32"
        and "--continuous-batching" in server.command
    )
    assert (
        server.model == str(site.model_folder) in server.command
        and server.variables["OMP_NUM_THREADS"] == "2"
    )


def test_what_would_set_up_a_server_by_accident_is_not_inherited(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "OMP_NUM_THREADS", "LD_PRELOAD", "VLLM_USE_V1", "HF_HOME"):
        monkeypatch.setenv(name, "of whoever runs this")
    for system in SYSTEMS:
        environment = make(system, site, KV, 1).environment()
        assert "of whoever runs this" not in environment.values() and environment["PATH"]


def test_every_system_has_a_label_and_a_command(site: Site) -> None:
    assert set(LABELS) == set(SYSTEMS)
    with pytest.raises(KeyError):
        make("other", site, KV, 1)


def test_a_conversations_tokens() -> None:
    assert conversation_tokens(1, 1005, 0) == 1035
    assert conversation_tokens(2, 10, 5, first_tokens=100) == 30 + 100 + 5 + 11 + 10 + 5


def test_under_pressure_everybody_has_the_same_bytes() -> None:
    known = {workload.name: workload for workload in workloads()}
    all_of_them = 24 * conversation_tokens(6, 100, 64)
    fits, tight, third = (known[name].kv for name in ("fits", "tight", "third"))
    assert fits[PENSIEVE].tokens == fits[VLLM].tokens >= all_of_them and fits[VLLM].second == 0
    assert fits[VLLM].tokens / BLOCK_TOKENS >= 24 * -(
        -conversation_tokens(6, 100, 64) // BLOCK_TOKENS
    )  # blocks are not shared by conversations
    assert tight[PENSIEVE].tokens == tight[VLLM].tokens == pytest.approx(0.6 * fits[VLLM].tokens, rel=0.02)
    assert tight[PENSIEVE].first == pytest.approx(0.5 * fits[VLLM].tokens, rel=0.02)
    assert third[VLLM].tokens == third[PENSIEVE].first == third[LLAMA].first == fits[VLLM].tokens / 3
    assert third[PENSIEVE] == fits[PENSIEVE] and third[LLAMA].first / third[
        LLAMA
    ].slots >= conversation_tokens(6, 100, 64)
    for kv in [*fits.values(), *tight.values(), *third.values()]:
        assert kv.first % BLOCK_TOKENS == kv.second % BLOCK_TOKENS == 0
    assert all(
        set(known["open"].kv) == {PENSIEVE, VLLM} and kv.tokens == fits[VLLM].tokens
        for kv in known["open"].kv.values()
    )


def test_where_memory_is_no_matter_all_conversations_fit() -> None:
    for name in ("users", "alone", "stateless"):
        workload = next(workload for workload in workloads() if workload.name == name)
        for one in workload.measurements:
            wanted = (
                one.users
                * one.conversations
                * conversation_tokens(one.turns, one.new_tokens, one.output_tokens, one.first_tokens)
            )
            assert all(
                kv.tokens >= wanted and kv.first / kv.slots >= wanted / one.users / one.conversations
                for kv in workload.kv.values()
            )


def test_vllms_requirements_lose_what_serves_pictures_and_other_machines() -> None:
    metadata = """\
Metadata-Version: 2.4
Name: vllm-cpu
Requires-Dist: numpy
Requires-Dist: torch==2.13.0+cpu; python_version > '3'
Requires-Dist: torchvision
Requires-Dist: pandas; extra == 'bench'
Requires-Dist: six>=1.16; python_version > '3.0'

Requires-Dist: nothing, for this is the description
"""
    assert vllm_requirements(metadata) == ["numpy", "six>=1.16"]


def test_llama_cpp_is_built_for_the_processor_and_never_for_amx() -> None:
    old, new = llama_options({"avx2", "fma"}), llama_options({"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    assert "-DGGML_AVX2=ON" in old and "-DGGML_AVX512=OFF" in old and "-DGGML_FMA=ON" in old
    assert {
        "-DGGML_AVX512=ON",
        "-DGGML_AVX512_BF16=ON",
        "-DGGML_AMX_BF16=OFF",
        "-DGGML_NATIVE=OFF",
        "-DGGML_FMA=OFF",
    } <= set(new)
    assert (
        cpu_flags("model name : x\nflags\t\t: fpu avx2 amx_tile sse\n") == {"avx2", "amx_tile"}
        and cpu_flags("") == frozenset()
    )


def test_all_that_is_missing_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peers.install.shutil.which", lambda name: None)
    monkeypatch.setattr("peers.install.ctypes.util.find_library", lambda name: None)
    monkeypatch.setattr("peers.install.cpu_flags", lambda: frozenset({"avx2"}))
    told = "\n".join(missing_tools(Peers(tmp_path), ("vllm", "llama.cpp", "transformers")))
    assert all(word in told for word in ("cmake", "C++ compiler", "libtcmalloc", "apt install"))
    assert missing_tools(Peers(tmp_path), ("transformers",)) == []
