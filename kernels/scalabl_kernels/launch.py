"""Launch shapes of the Triton kernel: a small table for each architecture, and the rule that selects a shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["ieee", "tf32x3"]

# Up to this number of rows, the tile is as small as the matrix instruction allows, and the output's columns are split over
# a second grid axis, so that the whole chip has work.
FEW_ROWS = 256
# Above this padded rank the tiles for many rows do not fit into the registers.
WIDE_RANK = 64
# The same with several adapters, which need more registers.
WIDE_RANK_OF_SEVERAL = 32
# Above this rank no tile was found that fits, and `subspace_projection` runs in plain torch.
MAX_RANK = 128


@dataclass(frozen=True)
class LaunchShape:
    """One way to launch the kernel.

    Attributes:
        block_m: rows of x in a program.
        block_k: columns of x in a step of the shrink (A x).
        block_n: columns of y in a step of the expand (B u).
        num_warps, num_stages: Triton's launch options.
    """

    block_m: int
    block_k: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture for which the kernel is compiled.

    Attributes:
        name: its name in Triton's compiler: sm_80, sm_90, sm_100, gfx942.
        processors: number of streaming multiprocessors or compute units of the chip in `roofline.CHIPS`.
        fp32: how float32 products are computed: three TF32 products on NVIDIA, native on AMD.
        few, many, wide: the launch shapes for few rows, many rows, and many rows of a padded rank above WIDE_RANK, each by
            bytes per element.
    """

    name: str
    processors: int
    fp32: Precision
    few: dict[int, LaunchShape]
    many: dict[int, LaunchShape]
    wide: dict[int, LaunchShape]


_FEW_NVIDIA = {2: LaunchShape(16, 128, 128, 4, 3), 4: LaunchShape(16, 64, 64, 4, 2)}
_FEW_AMD = {2: LaunchShape(16, 128, 128, 4, 2), 4: LaunchShape(16, 64, 64, 4, 2)}
# At rank 128 a many-row tile spills registers, in float32 on all chips and in two bytes on AMD: few-row tiles instead.
_WIDE_NVIDIA = {2: LaunchShape(64, 64, 64, 8, 3), 4: _FEW_NVIDIA[4]}

TABLE: dict[str, Architecture] = {
    "sm_80": Architecture(
        "sm_80",
        108,
        "tf32x3",
        few=_FEW_NVIDIA,
        many={2: LaunchShape(64, 64, 64, 4, 3), 4: LaunchShape(32, 32, 64, 4, 2)},
        wide=_WIDE_NVIDIA,
    ),
    "sm_90": Architecture(
        "sm_90",
        132,
        "tf32x3",
        few=_FEW_NVIDIA,
        many={2: LaunchShape(64, 64, 64, 4, 3), 4: LaunchShape(32, 32, 64, 4, 2)},
        wide=_WIDE_NVIDIA,
    ),
    "sm_100": Architecture(
        "sm_100",
        148,
        "tf32x3",
        few=_FEW_NVIDIA,
        many={2: LaunchShape(64, 64, 64, 8, 3), 4: LaunchShape(32, 32, 64, 4, 2)},
        wide=_WIDE_NVIDIA,
    ),
    "gfx942": Architecture(
        "gfx942",
        304,
        "ieee",
        few=_FEW_AMD,
        many={2: LaunchShape(64, 64, 64, 4, 2), 4: LaunchShape(32, 32, 64, 4, 2)},
        wide=_FEW_AMD,
    ),
}


def nearest(name: str) -> Architecture:
    """The table's entry for an architecture: its own, or the closest older one's; all AMD devices share one."""
    if name in TABLE:
        return TABLE[name]
    if not name.startswith("sm_"):
        return TABLE["gfx942"]
    known = sorted(int(row.removeprefix("sm_")) for row in TABLE if row.startswith("sm_"))
    older = [number for number in known if number <= int(name.removeprefix("sm_"))]
    return TABLE[f"sm_{older[-1] if older else known[0]}"]


def padded_rank(rank: int) -> int:
    """The rank, rounded up for the matrix instructions: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def largest_rank(bytes_per_element: int, num_adapters: int) -> int:
    """The largest rank for which there is a tile; several adapters in float32 need too many registers above `WIDE_RANK`."""
    return WIDE_RANK if num_adapters > 1 and bytes_per_element == 4 else MAX_RANK


def choose(architecture: Architecture, rows: int, rank: int, bytes_per_element: int, num_adapters: int = 1) -> LaunchShape:
    """The launch shape for a number of rows of x, a rank, an element size and a number of adapters."""
    if rows <= FEW_ROWS:
        return architecture.few[bytes_per_element]
    wide = padded_rank(rank) > (WIDE_RANK if num_adapters == 1 else WIDE_RANK_OF_SEVERAL)
    return (architecture.wide if wide else architecture.many)[bytes_per_element]


def blocks_per_program(architecture: Architecture, shape: LaunchShape, rows: int, d_out: int) -> int:
    """How many blocks of y's columns one program computes: all, unless there are too few row blocks to fill the chip.

    If the columns are split, each program computes the shrink of its rows again, which is cheap for few rows.
    """
    row_blocks = -(-rows // shape.block_m)
    column_blocks = -(-d_out // shape.block_n)
    splits = min(column_blocks, max(1, architecture.processors // row_blocks))
    return -(-column_blocks // splits)


# One number of rows for each launch shape that a model with one rank and one dtype can need.
WARM_UP_ROWS = (1, FEW_ROWS + 1)
