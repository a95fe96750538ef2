"""What a base model with K samples as LoRAs takes in vLLM, by formula: memory, throughput, and when samples are free.

python -m benchmarks.sizing prints the tables of docs/scaling.md. Nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RANK = 8  # of the adapter, and the smallest rank above 1 that vLLM has slots of
BYTES = 2  # bfloat16: weights, LoRA slots, keys and values
UTILISATION = 0.5  # of the peak, which prefill of this size reaches; the one number here that is assumed
USABLE = 0.9  # of a GPU's memory: vLLM's --gpu-memory-utilization
WORKSPACE = 4e9  # bytes of each GPU for activations, graphs and buffers
SAMPLES = (8, 16, 32)
LENGTHS = (70, 512)  # tokens of a prompt: a query of the example, a page


@dataclass(frozen=True)
class Base:
    """A base model's shape, as its config.json has it."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Linear modules of a block: (d_in, d_out)."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key),
            "v_proj": (self.hidden, self.key),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """Of all linear modules, the embedding and the head."""
        return self.layers * sum(i * o for i, o in self.modules.values()) + 2 * self.vocabulary * self.hidden

    @property
    def computed(self) -> int:
        """Parameters that each token is multiplied by: all but the embedding and the head (which sees last tokens only)."""
        return self.parameters - 2 * self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        return BYTES * self.parameters

    @property
    def kv_per_token(self) -> int:
        """Bytes of keys and values."""
        return BYTES * 2 * self.layers * self.key

    def slot(self, kinds: Sequence[str]) -> int:
        """Bytes of a LoRA slot for these kinds of modules and the head."""
        values = self.layers * sum(sum(self.modules[kind]) for kind in kinds) + self.hidden + self.vocabulary
        return BYTES * RANK * values

    def flops(self, length: int) -> float:
        """Of one sequence's forward pass: 2 for each weight and token, and causal attention's two products."""
        attention = self.layers * 2 * self.query * length**2
        return 2.0 * self.computed * length + attention + 2.0 * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Gpu:
    """Peak of dense bfloat16 (FLOP/s), memory (bytes) and its bandwidth (bytes/s), as NVIDIA's data sheets have them."""

    name: str
    flops: float
    memory: float
    bandwidth: float

    @property
    def balance(self) -> float:
        """Tokens of a step above which products take longer than reading the weights: 2 FLOP and `BYTES` for each weight."""
        return self.flops / self.bandwidth * BYTES / 2


BASES = (
    Base("7B", 28, 3584, 28, 4, 128, 18944, 152064),
    Base("32B", 64, 5120, 40, 8, 128, 27648, 152064),
    Base("72B", 80, 8192, 64, 8, 128, 29568, 152064),
)
GPUS = (
    Gpu("A100 SXM 80 GB", 312e12, 80e9, 2.039e12),
    Gpu("L40S", 362e12, 48e9, 0.864e12),
    Gpu("H100 SXM", 989e12, 80e9, 3.35e12),
    Gpu("H200 SXM", 989e12, 141e9, 4.8e12),
)
ADAPTED = ("q_proj", "v_proj")


def gpus_for(base: Base, gpu: Gpu, num_samples: int) -> int:
    """The smallest power of two that holds weights, slots and the keys and values of one full batch of 8,192 tokens."""
    count = 1
    while True:
        need = base.weights + num_samples * base.slot(ADAPTED) + 8192 * base.kv_per_token
        if need <= count * (USABLE * gpu.memory - WORKSPACE):
            return count
        count *= 2


def inputs_per_second(base: Base, gpus: float, length: int, num_samples: int) -> float:
    """Compute-bound: every sample is a pass of its own over every token."""
    return UTILISATION * gpus / (num_samples * base.flops(length))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def memory() -> str:
    """Weights, slots, keys and values."""
    rows = []
    for base in BASES:
        wide, narrow = base.slot(list(base.modules)), base.slot(ADAPTED)
        rows.append(
            [base.name, f"{base.parameters / 1e9:.1f} B", f"{base.weights / 1e9:.1f} GB", f"{wide / 1e6:.1f} MB",
             f"{narrow / 1e6:.1f} MB", *(f"{k * narrow / 1e9:.2f} GB" for k in SAMPLES), f"{base.kv_per_token / 1e3:.0f} kB"]
        )  # fmt: skip
    head = ["base", "parameters", "weights", "slot, all modules", "slot, q, v and head"]
    return table([*head, *(f"K = {k}" for k in SAMPLES), "KV, a token"], rows)


def throughput() -> str:
    """Inputs a second of one server, on as few H100 as hold it."""
    gpu = GPUS[2]
    rows = []
    for base in BASES:
        for length in LENGTHS:
            count = gpus_for(base, gpu, max(SAMPLES))
            rates = [inputs_per_second(base, count * gpu.flops, length, k) for k in SAMPLES]
            caches = [f"{k * length * base.kv_per_token / 1e6:,.0f} MB" for k in SAMPLES]
            rows.append([base.name, str(count), str(length), *(f"{rate:.1f}" for rate in rates), *caches])
    head = ["base", "H100", "tokens"]
    return table([*head, *(f"inputs/s, K = {k}" for k in SAMPLES), *(f"KV of an input, K = {k}" for k in SAMPLES)], rows)


def balance() -> str:
    """How many samples of an input one reading of the weights is enough for."""
    rows = []
    for gpu in GPUS:
        free = [math.floor(gpu.balance / length) for length in LENGTHS]
        rows.append(
            [gpu.name, f"{gpu.flops / 1e12:.0f}", f"{gpu.bandwidth / 1e12:.2f}", f"{gpu.balance:.0f}", *map(str, free)]
        )
    head = ["GPU", "TFLOP/s", "TB/s", "tokens of a step"]
    return table([*head, *(f"samples of an input of {length}" for length in LENGTHS)], rows)


def overhead() -> str:
    """What the LoRAs themselves add to a step of 8,192 tokens."""
    rows = []
    for base in BASES:
        values = base.layers * sum(sum(base.modules[kind]) for kind in ADAPTED)
        flops = 2 * RANK * values / (2 * base.computed)
        read = [k * base.slot(ADAPTED) / base.weights for k in SAMPLES]
        rows.append([base.name, f"{flops:.2%}", *(f"{share:.2%}" for share in read)])
    return table(["base", "FLOPs", *(f"bytes read, K = {k}" for k in SAMPLES)], rows)


def main() -> None:
    """Print all tables."""
    for title, table_of in (("Memory", memory), ("Throughput", throughput), ("Balance", balance), ("LoRAs", overhead)):
        print(f"**{title}**\n\n{table_of()}\n")


if __name__ == "__main__":
    main()
