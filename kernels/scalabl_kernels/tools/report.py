"""Compiles the kernel for GPUs that are not present and reports what it uses: `python -m scalabl_kernels.tools.report`.

One line for each architecture x dtype x launch shape x rank: registers, spills, shared memory and the matrix instruction,
read from the machine code. Then the roofline table, computed from shapes and published peak rates. With `--check` the exit
status is 1 if a line exceeds a limit. Neither needs nor uses a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from scalabl_kernels.launch import (
    FEW_ROWS,
    MAX_RANK,
    TABLE,
    WIDE_RANK,
    WIDE_RANK_OF_SEVERAL,
    LaunchShape,
    choose,
    largest_rank,
)
from scalabl_kernels.tools.roofline import BYTES, CHIPS, base_work, projection_work

RANKS = (8, 16, 32, 64, 128)
# The limits for a thread and a block. A thread can address 255 registers; up to WIDE_RANK, where speed matters, 224 leave
# room for two blocks of four warps on a processor. 80 KiB are half of the smallest shared memory in the table (sm_80).
MAX_REGISTERS, MAX_REGISTERS_WIDE, MAX_SHARED = 224, 255, 80 * 1024
# The expected matrix instructions. Few-row tiles are too small for Hopper's and Blackwell's warp-group instructions.
EXPECTED = {
    "sm_80": {"few": "HMMA", "many": "HMMA", "fp32": "HMMA"},
    "sm_90": {"few": "HMMA", "many": "HGMMA", "fp32": "HMMA"},
    "sm_100": {"few": "HMMA", "many": "UTCHMMA", "fp32": "HMMA"},
    "gfx942": {"few": "v_mfma", "many": "v_mfma", "fp32": "v_mfma"},
}
ROOFLINE_ROWS, ROOFLINE_WIDTHS = (16, 64, 256, 2048, 8192), (576, 2048, 4096, 8192)


@dataclass(frozen=True)
class Case:
    """One compilation: an entry of the launch table with a rank and a number of adapters."""

    architecture: str
    dtype: str
    rows: str  # few or many
    rank: int
    num_adapters: int = 1

    @property
    def shape(self) -> LaunchShape:
        rows = FEW_ROWS if self.rows == "few" else FEW_ROWS + 1
        return choose(TABLE[self.architecture], rows, self.rank, BYTES[self.dtype], self.num_adapters)


@dataclass(frozen=True)
class Line:
    """A case, the resources that its machine code uses, and the limits that it exceeds (`faults`)."""

    case: Case
    registers: int
    spills: int
    shared: int
    matrix: str | None
    faults: tuple[str, ...]


def cases() -> Iterator[Case]:
    """Every entry of the launch table with every rank, and with several adapters at the smallest and the largest."""
    for architecture in TABLE:
        for dtype in BYTES:
            for rows in ("few", "many"):
                for rank in RANKS:
                    yield Case(architecture, dtype, rows, rank)
                for rank in (RANKS[0], largest_rank(BYTES[dtype], 2)):
                    yield Case(architecture, dtype, rows, rank, num_adapters=2)


def check(case: Case) -> Line:
    """Compile one case and compare it with the limits."""
    from scalabl_kernels.tools.compiled import compile_for

    compiled = compile_for(TABLE[case.architecture], case.shape, case.dtype, case.rank, num_adapters=case.num_adapters)
    expected = EXPECTED[case.architecture]["fp32" if case.dtype == "fp32" else case.rows]
    # A wide rank uses a few-row tile if no larger one fits.
    if case.rank > WIDE_RANK_OF_SEVERAL and case.shape == TABLE[case.architecture].few[BYTES[case.dtype]]:
        expected = EXPECTED[case.architecture]["few"]
    most = MAX_REGISTERS_WIDE if case.rank > WIDE_RANK else MAX_REGISTERS
    faults = []
    if compiled.spills:
        faults.append(f"spills {compiled.spills}")
    if compiled.matrix != expected:
        faults.append(f"matrix instruction {compiled.matrix}, expected {expected}")
    if compiled.registers > most:
        faults.append(f"{compiled.registers} registers, at most {most}")
    if compiled.shared > MAX_SHARED:
        faults.append(f"{compiled.shared} bytes shared, at most {MAX_SHARED}")
    return Line(case, compiled.registers, compiled.spills, compiled.shared, compiled.matrix, tuple(faults))


def roofline() -> Iterator[dict[str, str | int | float]]:
    """Roofline times of the operation and of the base layer's product, for rank 8 and K = 16, in microseconds."""
    for architecture, chip in CHIPS.items():
        for width in ROOFLINE_WIDTHS:
            for rows in ROOFLINE_ROWS:
                work, base = projection_work(rows, width, width, 8, "bf16"), base_work(rows, width, width, "bf16")
                ours, theirs = work.seconds(chip, "bf16"), base.seconds(chip, "bf16")
                yield {
                    "chip": chip.name,
                    "architecture": architecture,
                    "rows": rows,
                    "d": width,
                    "bytes": work.bytes,
                    "operations": work.operations,
                    "microseconds": ours * 1e6,
                    "base_microseconds": theirs * 1e6,
                    "ratio": ours / theirs,
                }


def main() -> int:
    """Print the report; returns 1 if `--check` was given and a line exceeds a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a line exceeds a limit")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        lines = list(pool.map(check, cases()))
    broken = [line for line in lines if line.faults]
    if options.json:
        print(json.dumps({"compiled": [asdict(line) for line in lines], "roofline": list(roofline())}, indent=1))
    else:
        _print(lines)
    for line in broken:
        print(f"{line.case}: {'; '.join(line.faults)}", file=sys.stderr)
    if options.check:
        print(f"kernel report: {len(lines)} compilations, {len(broken)} outside the limits", file=sys.stderr)
    return 1 if options.check and broken else 0


def _print(lines: list[Line]) -> None:
    print(f"ranks up to {MAX_RANK}; tiles are rows x columns of x x columns of y, warps, stages")
    print(
        f"{'target':<8}{'dtype':<6}{'rows':<6}{'rank':>5}{'adapters':>9}  {'tile':<18}{'registers':>9}{'spills':>7}"
        f"{'shared':>8}  matrix"
    )
    for line in lines:
        case, shape = line.case, line.case.shape
        tile = f"{shape.block_m}x{shape.block_k}x{shape.block_n} {shape.num_warps}w {shape.num_stages}s"
        print(
            f"{case.architecture:<8}{case.dtype:<6}{case.rows:<6}{case.rank:>5}{case.num_adapters:>9}  {tile:<18}"
            f"{line.registers:>9}{line.spills:>7}{line.shared:>8}  {line.matrix}"
        )
    print("\nroofline, bf16, rank 8, K = 16: computed from shapes and published peaks, not measured")
    print(f"{'chip':<8}{'rows':>6}{'d':>6}{'bytes':>13}{'operations':>13}{'floor us':>10}{'base us':>10}{'ratio':>8}")
    for row in roofline():
        print(
            f"{row['chip']:<8}{row['rows']:>6}{row['d']:>6}{row['bytes']:>13,}{row['operations']:>13.2e}"
            f"{row['microseconds']:>10.2f}{row['base_microseconds']:>10.2f}{row['ratio']:>8.1%}"
        )


if __name__ == "__main__":
    sys.exit(main())
