"""The roofline of the operation: its bytes and operations, and the time they take at a chip's published peak rates.

Nothing here is measured. The time is a lower bound, not a forecast: it ignores launches and latency, and assumes that caches
keep nothing from one kernel to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

from scalabl_kernels.launch import padded_rank

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Chip:
    """Published peak rates of a chip, for dense products.

    Attributes:
        bandwidth: of device memory, bytes per second.
        half, single: operations per second of the matrix units in bf16/fp16, and in float32 as the kernel computes it.
        source: the source of the numbers.
    """

    name: str
    bandwidth: float
    half: float
    single: float
    source: str


# By architecture. A float32 product on NVIDIA is three TF32 products.
CHIPS = {
    "sm_80": Chip("A100", 2.039e12, 312e12, 156e12 / 3, "NVIDIA A100 80GB SXM data sheet"),
    "sm_90": Chip("H100", 3.35e12, 989e12, 494.5e12 / 3, "NVIDIA H100 SXM data sheet"),
    "sm_100": Chip("B200", 7.7e12, 2250e12, 1100e12 / 3, "NVIDIA DGX B200 data sheet, an eighth of it"),
    "gfx942": Chip("MI300X", 5.3e12, 1307e12, 163.4e12, "AMD Instinct MI300X data sheet"),
}


@dataclass(frozen=True)
class Work:
    """Bytes that must be read from or written to device memory, and operations (an addition or a multiplication is one)."""

    bytes: int
    operations: int

    def seconds(self, chip: Chip, dtype: str) -> float:
        """The lower bound of the time: the longer of the times for the bytes and for the operations."""
        return max(self.bytes / chip.bandwidth, self.operations / (chip.single if dtype == "fp32" else chip.half))


def projection_work(
    rows: int, d_in: int, d_out: int, rank: int, dtype: str, num_samples: int = 16, fan_out: int = 1
) -> Work:
    """The work of the fused kernel: x, A, B, s and indices are moved once, y twice; products use the padded rank.

    Args:
        rows: M, the number of rows of y.
        fan_out: rows of y for each row of x.
    """
    width, padded, inputs = BYTES[dtype], padded_rank(rank), rows // fan_out
    moved = width * (inputs * d_in + 2 * rows * d_out + rank * (d_in + d_out)) + 4 * num_samples * rank + 8 * rows
    return Work(moved, 2 * padded * (inputs * d_in + rows * d_out))


def base_work(rows: int, d_in: int, d_out: int, dtype: str) -> Work:
    """The work of the base layer's matrix product: x, W0 and y are moved once."""
    return Work(BYTES[dtype] * (rows * d_in + d_in * d_out + rows * d_out), 2 * rows * d_in * d_out)
