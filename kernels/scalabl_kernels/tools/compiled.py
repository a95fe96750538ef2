"""Compiles the kernel for a GPU that is not present, and reads registers, spills and matrix instructions from the code."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# This is the default of Triton 3.9. Setting it avoids a warning that the default will change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scalabl_kernels.fused import subspace_projection_kernel
from scalabl_kernels.launch import Architecture, LaunchShape, Precision, padded_rank

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# The names of the matrix instructions of each architecture. Blackwell uses Ampere's for small tiles.
MATRIX_INSTRUCTIONS = {
    "sm_80": ("HMMA",),
    "sm_90": ("HGMMA", "HMMA"),
    "sm_100": ("UTCHMMA", "UTCQMMA", "HMMA"),
    "gfx942": ("v_mfma",),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """The resources that the compiled kernel uses.

    Attributes:
        registers: registers for each thread.
        spills: bytes of stack on NVIDIA, or spilled registers on AMD.
        shared: bytes of shared memory for each block.
        matrix: the matrix instruction in the code; None if products run on the ordinary units.
    """

    registers: int
    spills: int
    shared: int
    matrix: str | None


def compile_for(
    architecture: Architecture,
    shape: LaunchShape,
    dtype: str,
    rank: int,
    *,
    precision: Precision | None = None,
    pad: int | None = None,
    num_adapters: int = 1,
) -> Compiled:
    """Compile one launch shape as the launcher would, for contiguous operands with widths divisible by 16.

    Args:
        precision, pad: values other than the launcher's, for experiments.

    Raises:
        RuntimeError: the compilation failed.
    """
    constants = {
        "y_column": 1,
        "x_column": 1,
        "RANK": rank,
        "PADDED_RANK": pad or padded_rank(rank),
        "MANY_ADAPTERS": num_adapters > 1,
        "BLOCK_M": shape.block_m,
        "BLOCK_K": shape.block_k,
        "BLOCK_N": shape.block_n,
        "PRECISION": precision or architecture.fp32,
        "UPCAST": False,
    }
    pointers = {"y": dtype, "x": dtype, "lora_a": dtype, "lora_b": dtype, "s": "fp32", "sample": "i64", "adapter": "i64"}
    aligned = {*pointers, "d_in", "d_out", "y_row", "y_token", "x_row", "x_token"}
    signature, attributes = {}, {}
    for index, name in enumerate(subspace_projection_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = "fp32" if name == "scaling" else "i32"
        if name in aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=subspace_projection_kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    amd = architecture.name.startswith("gfx")
    target = GPUTarget("hip", architecture.name, 64) if amd else GPUTarget("cuda", int(architecture.name[3:]), 32)
    try:
        binary = triton.compile(source, target=target, options=options)
    except Exception as error:  # the compiler's own classes are not public
        raise RuntimeError(f"{architecture.name} {dtype} rank {rank} {shape}: {error}") from error
    return _read_amd(binary, architecture) if amd else _read_nvidia(binary, architecture)


def _read_amd(binary: Any, architecture: Architecture) -> Compiled:
    assembly = binary.asm["amdgcn"]

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    return Compiled(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        shared=int(binary.metadata.shared),
        matrix=_matrix(assembly, architecture),
    )


def _read_nvidia(binary: Any, architecture: Architecture) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    return Compiled(
        registers=registers,
        spills=stack if re.search(r"\b(STL|LDL)\b", sass) else 0,
        shared=int(binary.metadata.shared),
        matrix=_matrix(sass, architecture),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _matrix(assembly: str, architecture: Architecture) -> str | None:
    return next((name for name in MATRIX_INSTRUCTIONS[architecture.name] if re.search(rf"\b{name}", assembly)), None)
