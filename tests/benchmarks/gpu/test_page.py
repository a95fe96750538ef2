"""docs/gpu.md is what its generator writes, and says that nothing ran until something did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.page import PAGE, Run, page, read_runs, readme_sentence
from benchmarks.gpu.parts.fused_tests import CHOSEN, REHEARSED
from benchmarks.gpu.policy import CLAIMS
from benchmarks.gpu.tables import PARTS
from tests.kernels import test_fused

NOTHING = "No run has been made on a GPU"


def test_the_page_is_the_generator_s() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_runs()), "run python -m benchmarks.gpu.page"


def test_the_readme_says_the_same() -> None:
    assert readme_sentence(read_runs()) in (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")


def test_without_a_run_it_says_so_and_every_claim_is_unproven() -> None:
    text = page([])
    assert NOTHING in text
    assert text.count("**unproven**") == len(CLAIMS)
    assert {part for _, part in CLAIMS} <= set(PARTS)


def test_a_part_that_ended_well_proves_its_claims_alone() -> None:
    kernel: dict[str, Any] = {"part": "kernel", "status": "done", "failures": [], "results": {}, "seconds": 1.0}
    text = page([Run("2030-01-01-h100", {"machine": {}, "dry_run": False}, {"kernel": kernel})])
    assert NOTHING not in text
    assert text.count("see the runs below") == sum(part == "kernel" for _, part in CLAIMS)


def test_a_dry_run_is_not_shown(tmp_path: Path) -> None:
    for name, dry in (("one", True), ("other", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"machine": {}, "dry_run": dry}), encoding="utf-8")
    assert [run.name for run in read_runs(tmp_path)] == ["other"]


def test_the_chosen_tests_of_the_kernel_exist() -> None:
    for test in CHOSEN + REHEARSED:
        file, _, name = test.partition("::")
        assert Path(test_fused.__file__).as_posix().endswith(file)
        function, _, parameters = name.partition("[")
        assert callable(getattr(test_fused, function))
        if parameters:
            rows, width, rank, dtype = parameters.removesuffix("]").split("-")
            assert int(rows) in test_fused.ROWS
            assert int(width) in test_fused.WIDTHS
            assert int(rank) in test_fused.RANKS
            assert dtype in map(str, test_fused.TOLERANCES)
