"""The compile report: its limits catch what they are for, and the launch table's rules. No GPU is needed."""

from __future__ import annotations

import dataclasses

import pytest
from scalabl_kernels.launch import FEW_ROWS, MAX_RANK, TABLE, LaunchShape, blocks_per_program, choose, nearest, padded_rank
from scalabl_kernels.tools import report, roofline

compiled = pytest.importorskip("scalabl_kernels.tools.compiled", reason="triton is not installed; it is for Linux")


def test_a_row_of_the_table_is_within_the_limits() -> None:
    line = report.check(report.Case("sm_90", "bf16", "many", 8))
    assert line.faults == ()
    assert (line.spills, line.matrix) == (0, "HGMMA")


def test_an_oversized_tile_spills() -> None:
    made = compiled.compile_for(TABLE["sm_80"], LaunchShape(128, 64, 128, 4, 3), "bf16", 128)
    assert made.spills > 0


def test_float32_products_without_tf32_use_no_matrix_unit() -> None:
    architecture = TABLE["sm_80"]
    assert compiled.compile_for(architecture, architecture.few[4], "fp32", 16, precision="ieee").matrix is None
    assert compiled.compile_for(architecture, architecture.few[4], "fp32", 16).matrix == "HMMA"


def test_a_rank_padded_too_little_has_no_matrix_instruction_on_amd() -> None:
    architecture = TABLE["gfx942"]
    assert compiled.compile_for(architecture, architecture.few[2], "bf16", 8, pad=8).matrix is None
    assert compiled.compile_for(architecture, architecture.few[2], "bf16", 8).matrix == "v_mfma"


def test_the_gate_names_every_limit_that_a_line_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = dataclasses.replace(TABLE["sm_80"], many={2: LaunchShape(128, 64, 128, 4, 4), 4: TABLE["sm_80"].many[4]})
    monkeypatch.setitem(TABLE, "sm_80", bad)
    monkeypatch.setattr(report, "MAX_SHARED", 1024)
    monkeypatch.setattr(report, "MAX_REGISTERS", 16)
    monkeypatch.setitem(report.EXPECTED["sm_80"], "many", "HGMMA")
    faults = " ".join(report.check(report.Case("sm_80", "bf16", "many", 64)).faults)
    for limit in ("spills", "expected HGMMA", "registers, at most 16", "bytes shared, at most 1024"):
        assert limit in faults


def test_the_report_covers_every_row_of_the_table() -> None:
    covered = {(case.architecture, report.BYTES[case.dtype], case.shape) for case in report.cases()}
    for name, architecture in TABLE.items():
        for rows in (architecture.few, architecture.many, architecture.wide):
            for width, shape in rows.items():
                assert (name, width, shape) in covered


@pytest.mark.parametrize(
    ("device", "row"),
    [("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_75", "sm_80"), ("sm_90", "sm_90"),
     ("sm_103", "sm_100"), ("sm_120", "sm_100"), ("gfx942", "gfx942"), ("gfx90a", "gfx942")],
)  # fmt: skip
def test_a_device_that_is_not_in_the_table_uses_the_closest_older_row(device: str, row: str) -> None:
    assert nearest(device).name == row


def test_the_rule_for_shapes() -> None:
    architecture = TABLE["sm_90"]
    assert choose(architecture, FEW_ROWS, 8, 2) == architecture.few[2]
    assert choose(architecture, FEW_ROWS + 1, 8, 2) == architecture.many[2]
    assert choose(architecture, FEW_ROWS + 1, 65, 2) == architecture.wide[2]
    assert choose(architecture, FEW_ROWS + 1, 64, 2) == architecture.many[2]
    assert choose(architecture, FEW_ROWS + 1, 64, 2, num_adapters=2) == architecture.wide[2]
    assert choose(architecture, FEW_ROWS + 1, 32, 2, num_adapters=2) == architecture.many[2]
    assert [padded_rank(rank) for rank in (1, 8, 16, 17, 64, 65, MAX_RANK)] == [16, 16, 16, 32, 64, 128, 128]


@pytest.mark.parametrize("rows", [1, 64, 300, 5000, 10**6])
@pytest.mark.parametrize("d_out", [10, 576, 4096])
def test_programs_along_the_columns_cover_them_once_and_fill_the_chip_where_they_can(rows: int, d_out: int) -> None:
    architecture = TABLE["sm_90"]
    shape = choose(architecture, rows, 8, 2)
    blocks = blocks_per_program(architecture, shape, rows, d_out)
    columns, row_blocks = -(-d_out // shape.block_n), -(-rows // shape.block_m)
    programs = -(-columns // blocks)
    assert (programs - 1) * blocks < columns <= programs * blocks
    assert programs == 1 or programs * row_blocks <= architecture.processors
    if row_blocks >= architecture.processors:
        assert programs == 1


def test_the_roofline_counts_what_a_naive_count_counts() -> None:
    rows, d_in, d_out, rank = 2048, 4096, 1024, 8
    work = roofline.projection_work(rows, d_in, d_out, rank, "bf16", num_samples=16)
    x, y, weights = rows * d_in, rows * d_out, rank * (d_in + d_out)
    assert work.bytes == 2 * (x + 2 * y + weights) + 16 * rank * 4 + rows * 8
    assert work.operations == 2 * 16 * (x + y)  # the rank is padded to 16
    shared = roofline.projection_work(rows, d_in, d_out, rank, "bf16", num_samples=16, fan_out=16)
    assert work.bytes - shared.bytes == 2 * (x - x // 16)
    assert roofline.base_work(rows, d_in, d_out, "bf16").operations == 2 * rows * d_in * d_out
