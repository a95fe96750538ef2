"""The kernel's time beside other forms of the same operation and beside its floor, and launch shapes around the table's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from scalabl_kernels import launch, subspace_projection
from scalabl_kernels.fused import architecture_of
from scalabl_kernels.launch import LaunchShape
from scalabl_kernels.tools.roofline import base_work, projection_work

from benchmarks import kernel
from benchmarks.gpu.parts.device_time import ceilings, replayed_seconds, seconds_of
from benchmarks.gpu.record import Bench

BYTES = 2  # of an element in bfloat16
ROWS, WIDTHS, RANKS = (2048, 64, 8192, 16, 256, 512, 1024), (4096, 2048, 8192), (8, 64)
FEW = 256  # rows up to which the host's work for a launch may be longer than the kernel's
SHAPES_FOR = ((2048, 8), (64, 8), (2048, 64), (64, 64))  # (rows, rank) for which launch shapes are compared
SHAPES_WIDTH, RESERVE = 4096, 25.0
DRY_ROWS, DRY_WIDTH, DRY_SHAPES_FOR = (16, 300), 32, ((16, 8),)


@torch.inference_mode()
def measure(bench: Bench) -> None:
    """Time, the most asked for first."""
    bench.attempt("ceilings", lambda: bench.put("ceilings", ceilings(bench.device).as_json()))
    bench.attempt("forms", lambda: _forms(bench))
    bench.attempt("launch shapes", lambda: _launch_shapes(bench))


def _forms(bench: Bench) -> None:
    cases = list(product((8,), (DRY_WIDTH,), DRY_ROWS)) if bench.dry else list(product(RANKS, WIDTHS, ROWS))
    for rank, d, rows in bench.while_time("forms", cases, reserve=0 if bench.dry else RESERVE):
        step = f"{rows} rows, d = {d}, rank {rank}"
        bench.attempt(step, lambda rows=rows, d=d, rank=rank: bench.add("forms", _row(bench.device, rows, d, rank)))


def _row(device: str, rows: int, d: int, rank: int) -> dict[str, Any]:
    """Seconds of each form; what the adapter adds to the base product, beside the least that it could take."""
    ceiling = ceilings(device)
    functions = kernel.forms(rows, d, torch.device(device), torch.bfloat16, rank)
    seconds = {name: seconds_of(function, device) for name, function in functions.items()}
    work, base = projection_work(rows, d, d, rank, "bf16"), base_work(rows, d, d, "bf16")
    alone = seconds_of(_alone(device, rows, d, rank), device)
    floor = ceiling.seconds(work.bytes, work.operations)
    row: dict[str, Any] = {"rows": rows, "d": d, "rank": rank, "seconds": seconds, "alone": alone}
    row |= {"floor": floor, "base_floor": ceiling.seconds(base.bytes, base.operations)}
    row |= {"share_of_bandwidth": work.bytes / alone / ceiling.bandwidth}
    if rows <= FEW:
        try:
            row["replayed"] = {name: replayed_seconds(functions[name], device) for name in ("base", "ours")}
        except RuntimeError as error:  # something in it cannot be captured: the times of launches remain
            row["replay_error"] = str(error)[:300]
    return row


def _alone(device: str, rows: int, d: int, rank: int) -> Callable[[], object]:
    """The operation without the base product."""
    x, y, b = (torch.randn(shape, device=device).to(torch.bfloat16) for shape in ((rows, d), (rows, d), (d, rank)))
    a, s = torch.randn(rank, d, device=device).to(torch.bfloat16), torch.randn(kernel.NUM_SAMPLES, rank, device=device)
    sample = torch.arange(rows, device=device) % kernel.NUM_SAMPLES
    return lambda: subspace_projection(y, x, a, b, s, sample, 1e-3, inplace=True)


def _launch_shapes(bench: Bench) -> None:
    device, d = bench.device, DRY_WIDTH if bench.dry else SHAPES_WIDTH
    architecture = architecture_of(torch.device(device))
    for rows, rank in DRY_SHAPES_FOR if bench.dry else SHAPES_FOR:
        table = launch.choose(architecture, rows, rank, BYTES)
        run = _alone(device, rows, d, rank)
        shapes = [table, *neighbours(table)]
        for shape in bench.while_time(f"launch shapes for {rows} rows, rank {rank}", shapes[:2] if bench.dry else shapes):
            row: dict[str, Any] = {"rows": rows, "d": d, "rank": rank, "shape": asdict(shape), "table": shape == table}
            try:
                with _used_for_all(shape):
                    row["seconds"] = seconds_of(run, device)
            except Exception as error:  # more shared memory than the device has, for example
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            bench.add("launch_shapes", row)


def neighbours(shape: LaunchShape) -> list[LaunchShape]:
    """Shapes that differ in one number: blocks half and twice as large, other numbers of warps and stages."""
    changed = []
    for name, least, most in (("block_m", 16, 128), ("block_k", 32, 256), ("block_n", 32, 256), ("num_warps", 2, 8)):
        size = getattr(shape, name)
        changed += [replace(shape, **{name: other}) for other in (size // 2, 2 * size) if least <= other <= most]
    changed += [replace(shape, num_stages=stages) for stages in (2, 3, 4) if stages != shape.num_stages]
    return changed


@contextmanager
def _used_for_all(shape: LaunchShape) -> Iterator[None]:
    """While the context lasts, the table has this shape for every architecture, number of rows and rank."""
    before = dict(launch.TABLE)
    sizes = {BYTES: shape}
    launch.TABLE.update({name: replace(entry, few=sizes, many=sizes, wide=sizes) for name, entry in before.items()})
    try:
        yield
    finally:
        launch.TABLE.update(before)
