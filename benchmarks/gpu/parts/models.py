"""Whether models on the GPU have the CPU's logits: the authors' checkpoint, and tiny ones of several architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.record import Bench
from benchmarks.published import CHECKPOINT, load_published
from benchmarks.random_model import ARCHITECTURES, COLOURS, adapter_config, random_adapter, random_base
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work

SAME = 1e-4  # largest difference of logits over the largest logit, in float32
KL = 0.05  # nats, of the mean predictive in bfloat16 from the one in float32, averaged over inputs
LENGTHS, NUM_SAMPLES = (3, 9, 1, 14, 40, 9), 5
ROOT = Path(__file__).resolve().parents[3]
SHARED = (ROOT / "build" / "gpu", ROOT.parent / "shared")  # where the checkpoint may be


def measure(bench: Bench) -> None:
    """Compare, most important first."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    bench.attempt("the authors' checkpoint", lambda: _checkpoint(bench))
    for name in ("llama",) if bench.dry else ARCHITECTURES:
        bench.attempt(f"tiny {name}", lambda name=name: _tiny(bench, name))


def _tiny(bench: Bench, name: str) -> None:
    config, targets = ARCHITECTURES[name]
    lengths = LENGTHS[:2] if bench.dry else LENGTHS
    batch = TokenBatch.of([[(7 * place + length) % 250 + 3 for place in range(length)] for length in lengths])

    def model_on(device: str, dtype: torch.dtype) -> ScalaBLModel:
        return random_adapter(random_base(config).to(device, dtype), adapter_config(name, targets, COLOURS))

    reference = model_on("cpu", torch.float32)
    draws = reference.draws(NUM_SAMPLES)
    _compare(bench, f"tiny {name}", model_on, (batch, draws), reference.logits(batch, draws))


def _checkpoint(bench: Bench) -> None:
    # A dry run has it only if it was collected, and then as the machine with the GPU has it.
    folders = SHARED[:1] if bench.dry else SHARED
    shared = next((folder for folder in folders if (folder / CHECKPOINT).is_dir()), None)
    if shared is None:
        bench.add("left_out", "the authors' checkpoint, which was not collected")
        return

    def load(device: str, dtype: torch.dtype) -> Any:
        return load_published(shared, Path(mkdtemp(dir=bench.scratch)), device=device, dtype=dtype)

    expected = load("cpu", torch.float32)
    batch, draws, theirs = expected.batch, expected.draws, expected.logits
    if bench.dry:  # the interpreter is slow
        batch, draws = TokenBatch(batch.input_ids[:1], batch.attention_mask[:1]), draws.part(0, 1)
        theirs = theirs[:1, :1]
    logits = expected.model.logits(batch, draws)
    difference = _relative(logits, theirs)
    bench.put("cpu_from_authors", difference)

    def model_on(device: str, dtype: torch.dtype) -> ScalaBLModel:
        model: ScalaBLModel = load(device, dtype).model
        return model

    _compare(bench, "the authors' checkpoint", model_on, (batch, draws), logits)
    assert difference <= SAME, f"on the CPU logits differ from the authors' by {difference:.1e}"


def _compare(
    bench: Bench,
    name: str,
    model_on: Callable[[str, torch.dtype], ScalaBLModel],
    asked: tuple[TokenBatch, Draws],
    expected: Tensor,
) -> None:
    """The device's logits beside the CPU's, computed plainly in float32: of float32 with and without the shortcuts that the
    probes allow, and of bfloat16.

    Raises:
        AssertionError: the difference is larger than it may be.
    """
    model = model_on(bench.device, torch.float32)
    row: dict[str, Any] = {"name": name, "float32_plain": _relative(model.logits(*asked), expected)}
    if not bench.dry:  # the probes run many passes
        find_shared_work(model)
    row |= {"packs": model.packs, "trunk": model.trunk.verified, "float32": _relative(model.logits(*asked), expected)}
    half = model_on(bench.device, torch.bfloat16)
    if not bench.dry:
        find_shared_work(half)
    logits = half.logits(*asked).cpu()
    before, after = (tensor.softmax(-1).mean(1).double() for tensor in (expected, logits))
    row["same_decisions"] = float((before.argmax(-1) == after.argmax(-1)).double().mean())
    row["kl"] = float((before * (before / after).log()).sum(-1).mean())
    bench.add("models", row)
    worst = max(row["float32"], row["float32_plain"])
    assert worst <= SAME, f"float32 logits differ by {worst:.1e} of the largest, {SAME:.0e} is allowed"
    assert row["kl"] <= KL, f"bfloat16 is {row['kl']:.3f} nats from float32, {KL} is allowed"


def _relative(logits: Tensor, expected: Tensor) -> float:
    return float((logits.cpu() - expected).abs().max() / expected.abs().max())
