"""What docs/gpu.md says of the GPU path besides numbers: its forms, and the claims that only a run can prove."""

from __future__ import annotations

FORMS = """## What runs on a GPU

* **Data types.** `--dtype auto` is bfloat16 on a GPU that has it, else float32. Adapter parameters, samples and logits are
  float32; an adapted layer takes its matrices in the model's type. The kernel adds in float32 and rounds once.
* **TF32 is off.** `load_pretrained` sets torch's precision of float32 products to `highest`. The kernel computes a float32
  product as three TF32 products, with an error near 1e-6.
* **The kernel** runs on a GPU for bfloat16, float16 and float32 up to rank 128 ([kernel.md](kernel.md)).
* **Passes without padding.** Tokens of all rows lie end to end, and SDPA attention runs on the rows of one length at a time,
  so it needs no mask. The samples of an input have one length, so there are at most as many calls as inputs.
  `packing_pays` in `scalabl/model/packing.py` chooses for each pass: without padding if that saves at least 64 tokens for
  each further call, else padded. 64 is an estimate from the launches that a call needs; it was not measured. At the start-up
  both forms are compared, and only the padded one is used if they differ.
* **Nothing waits within a pass.** Index tables are made on the host and go to the GPU in two or three copies from pinned
  memory; draws are copied once (`scalabl/base/transfer.py`). `tests/scalabl/model/test_no_waiting.py` runs passes on a
  simulated device that records each value that the host reads and each copy that it waits for: there are none, padded and
  packed, with a trunk, after a cached prefix and for several adapters, until the logits are read. This does not hold for
  `method: "linearized"`.
* **Not done.** No variable-length attention kernel (flash-attention, nested tensors): it cannot be tested without a GPU. No
  CUDA graph for small passes: it needs fixed addresses and shapes, and a wrong one gives wrong numbers without an error. The
  profile of a small pass shows what either could gain.
"""

# (claim, the part of a run that shows it)
CLAIMS = (
    ("The compiled kernel is the formula, for the data types, strides and ranks of its tests", "correctness"),
    ("Float32 logits on a GPU are within 1e-4 of the CPU's, with and without the shortcuts", "correctness"),
    ("Bfloat16 makes the decisions of float32", "correctness"),
    ("The kernel adds at most 1.5 times its floor at M ≥ 2,048, and 4 µs above one launch at M ≤ 64", "kernel"),
    ("The launch shapes in the table are the fast ones", "kernel"),
    ("The engine is 1.3 times as fast as PEFT's batch, at half of the measured peak (7B, 512 tokens)", "engine"),
    ("Passes without padding, the trunk and the prefix cache save time on a GPU", "engine"),
    ("The memory of a large pass is predicted within 10%", "engine"),
    ("The server's warm-up time, what it adds to a lone request, and p99 at 80% load", "server"),
    ("The real driver makes the host wait nowhere else (`synchronisations` in the profile)", "profile"),
)
