"""Machines as numbers, each with its source. Knows rates and sizes; never models, plans or time.

Peaks are the vendors' data sheets; what of a peak a kernel reaches is an efficiency, and efficiencies of the
A100 are taken from the paper's own small measurements (Fig. 3 and 4), so that those two figures check the
arithmetic and not the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pensieve.errors import ConfigError

GB = 1_000_000_000  # rates and sizes of devices are decimal


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device (a GPU, or a CPU that computes) with its links. All rates are of one device."""

    name: str
    matrix_flops_per_s: float  # dense, 16 bit, peak
    matrix_efficiency: float  # share of it that large products reach
    attention_flops_per_s: float  # what long tiles of queries reach in attention
    attention_rows: float  # query rows of a tile at which attention reaches half of that
    memory_bytes_per_s: float  # peak
    memory_efficiency: float  # share of it that streaming weights and KV reaches
    memory_bytes: float
    link_bytes_per_s: float  # to host memory, each way, as reached
    duplex_share: float  # of a link's rate that is left to each direction while both are busy
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    peer_bytes_per_s: float  # between devices, each way; 0: there are no others
    peer_latency_s: float  # of one all-reduce, however small
    launch_s: (
        float  # the host's time to launch one layer's kernels: a step cannot be shorter than all of them
    )

    def __post_init__(self) -> None:
        for name in (
            "matrix_flops_per_s",
            "attention_flops_per_s",
            "memory_bytes_per_s",
            "memory_bytes",
            "link_bytes_per_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} of hardware {self.name!r} must be positive, got {getattr(self, name)}"
                )
        for name in ("matrix_efficiency", "memory_efficiency", "duplex_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} of hardware {self.name!r} must lie in (0, 1], got {getattr(self, name)}"
                )


# Fig. 3 of the paper, 13B on an A100, batch of 32:
#   a prompt of 128 tokens each takes 0.5 s, so 122 us a token for 26 GFLOP: 0.66 of 312 TFLOP/s;
#   a decode step goes from 24.5 ms at 128 past tokens to 88.5 ms at 4,096: 104 GB of KV in 64 ms, 0.80 of
# 2.04 TB/s;
#   a prompt of 4,096 takes 42 us a token more than one of 128, for 1.7 GFLOP of attention: 40 TFLOP/s.
# Fig. 4: 32 queries over 16,384 tokens take 1.5 times a layer's other work (0.39 ms): 18 TFLOP/s. A rate of
# 40 r / (r + 34) TFLOP/s for r rows
# has both.
_A100_MATRIX, _A100_MEMORY, _A100_ATTENTION, _A100_ROWS = 0.66, 0.80, 40e12, 34.0
# §5 of the paper: both directions at once cost each of them 18 to 20 %.
_DUPLEX = 0.81

_ALL = (
    # NVIDIA A100 80GB data sheet (SXM): 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways together, PCIe 4.0
    # x16 (31.5 GB/s, 25 reached).
    Hardware(
        name="a100-80gb",
        matrix_flops_per_s=312e12,
        matrix_efficiency=_A100_MATRIX,
        attention_flops_per_s=_A100_ATTENTION,
        attention_rows=_A100_ROWS,
        memory_bytes_per_s=2_039e9,
        memory_efficiency=_A100_MEMORY,
        memory_bytes=80e9,
        link_bytes_per_s=25e9,
        duplex_share=_DUPLEX,
        disk_read_bytes_per_s=6e9,  # one data-centre NVMe drive, PCIe 4.0
        disk_write_bytes_per_s=3e9,
        peer_bytes_per_s=300e9
        * 0.75,  # ring all-reduce reaches about three quarters of a direction (NCCL tests' bus bandwidth)
        peer_latency_s=20e-6,
        launch_s=60e-6,  # about 12 kernels of 5 us
    ),
    # NVIDIA H100 data sheet (SXM): 989 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s, PCIe 5.0 x16 (63 GB/s, 50
    # reached). Efficiencies: as the A100's; attention in proportion to the matrix peak. Not measured by us.
    Hardware(
        name="h100",
        matrix_flops_per_s=989e12,
        matrix_efficiency=_A100_MATRIX,
        attention_flops_per_s=_A100_ATTENTION * 989 / 312,
        attention_rows=_A100_ROWS,
        memory_bytes_per_s=3_350e9,
        memory_efficiency=_A100_MEMORY,
        memory_bytes=80e9,
        link_bytes_per_s=50e9,
        duplex_share=_DUPLEX,
        disk_read_bytes_per_s=12e9,  # one data-centre NVMe drive, PCIe 5.0
        disk_write_bytes_per_s=6e9,
        peer_bytes_per_s=450e9 * 0.75,
        peer_latency_s=15e-6,
        launch_s=50e-6,
    ),
    # NVIDIA H200 data sheet: an H100 with 141 GB at 4.8 TB/s.
    Hardware(
        name="h200",
        matrix_flops_per_s=989e12,
        matrix_efficiency=_A100_MATRIX,
        attention_flops_per_s=_A100_ATTENTION * 989 / 312,
        attention_rows=_A100_ROWS,
        memory_bytes_per_s=4_800e9,
        memory_efficiency=_A100_MEMORY,
        memory_bytes=141e9,
        link_bytes_per_s=50e9,
        duplex_share=_DUPLEX,
        disk_read_bytes_per_s=12e9,
        disk_write_bytes_per_s=6e9,
        peer_bytes_per_s=450e9 * 0.75,
        peer_latency_s=15e-6,
        launch_s=50e-6,
    ),
    # Two cores of a server CPU with AVX512-BF16, as this project's own figures have them
    # (docs/performance.md): products of 512 rows at
    # 1.2 TFLOP/s, weights streamed at 18 GB/s, KV at 25 GB/s, copies within memory at 11 GB/s (22 read and
    # written).
    # `pensieve profile` measures better: --profile FILE.
    Hardware(
        name="laptop-cpu",
        matrix_flops_per_s=2e12,
        matrix_efficiency=0.6,
        attention_flops_per_s=0.2e12,
        attention_rows=4.0,
        memory_bytes_per_s=25e9,
        memory_efficiency=0.75,
        memory_bytes=24e9,
        link_bytes_per_s=11e9,
        duplex_share=0.5,  # both directions share the same memory
        disk_read_bytes_per_s=1.5e9,
        disk_write_bytes_per_s=1.5e9,
        peer_bytes_per_s=0.0,
        peer_latency_s=0.0,
        launch_s=50e-6,
    ),
)

HARDWARE: Mapping[str, Hardware] = MappingProxyType({hardware.name: hardware for hardware in _ALL})


def find_hardware(name: str) -> Hardware:
    """A machine of the table by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in HARDWARE:
        raise ConfigError(
            f"no hardware is called {name!r}: take one of {', '.join(HARDWARE)}, or a measured one "
            "(--profile FILE)"
        )
    return HARDWARE[name]
