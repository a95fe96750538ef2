"""K samples by what one would do otherwise and by ours, feature by feature: time, share of the matrix peak, memory.

python -m benchmarks.serving --model <folder> [--only brute,trunk,prefix,…] [--prompts medium] [--samples 10] [--rounds 5]

Every table is of one run in which the methods take turns; its ratios are of times within a round, and their median. All
methods are first seen to give the same probabilities. Runs on the device that `load_pretrained` chooses; made for a CPU.

Without --adapter it is a fresh one of rank 8 on every q_proj and v_proj and on the head: random, which time does not see.

* `brute`: the loop and PEFT beside one batch of all rows, and the same with each feature on top of the ones before it;
  with --vllm-python also K requests to a vLLM server beside this process. Last the base model in 8 bits, whose answers are
  others: by how much is said.
* `profile`: where the time of a pass goes, with the largest number of samples.
* `trunk`: the adapter cut to the last third of the blocks, with and without the shared trunk.
* `prefix`: prompts of which 80% are alike, with and without the prefix cache.
* `memory`: what a pass takes beyond what the process holds, each in a process of its own.
* `load`: a real server under load (`benchmarks.load`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import load
from benchmarks.figures import save_figures
from benchmarks.lower_precision import Int8
from benchmarks.machine import describe
from benchmarks.peers import Peers
from benchmarks.prefix import prefix
from benchmarks.profiling import print_profile, profiled
from benchmarks.ratios import ratio, shown
from benchmarks.turns import in_turns
from scalabl.base.pretrained import load_pretrained
from scalabl.evaluation.precision_change import QuantizationChange
from scalabl.files.adapter_directory import load_adapter, load_weights, read_config, read_weights, save_adapter
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from scalabl.prompt import Prompter

if TYPE_CHECKING:
    from benchmarks.vllm_peer import VllmPeer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "intent_router"
PARTS = ("brute", "profile", "trunk", "prefix", "memory", "load")
LENGTHS = {"short": (10, 20), "medium": (50, 90), "long": (220, 380)}  # tokens of the shortest and the longest input
SAME = 1e-4  # how far probabilities of two methods may be apart

# A feature and those before it -> (shared trunk, last MLP trimmed, first products shared, no padding). Without padding rows
# fan out after the trunk always, which is before the first block where all are adapted.
FEATURES = {
    "one padded batch": (False, False, False, False),
    "+ no padding": (True, False, False, True),
    "+ first products shared": (True, False, True, True),
    "+ last MLP trimmed": (True, True, True, True),
}
BEST = "+ last MLP trimmed"
VLLM = "vLLM, K requests"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="base model: a folder (examples.intent_router.base_model)")
    parser.add_argument("--adapter", type=Path, help="a folder (default: a fresh one)")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts (default: all)")
    parser.add_argument("--prompts", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    parser.add_argument("--inputs", type=int, default=4, help="of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="leave out the loop and PEFT")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM, for K requests to it (see Makefile)")
    parser.add_argument("--output", type=Path, help="a folder for serving.txt and serving.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # a process that measures itself: "method K"
    load.arguments(parser)
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(PARTS)}")
    if options.memory_of:
        print(json.dumps(_memory_of_this(options)))
        return
    report = Report(options)
    with tempfile.TemporaryDirectory() as scratch:
        options.adapter = options.adapter or fresh_adapter(options.model, Path(scratch))
        measures = {
            "brute": brute,
            "profile": profile,
            "trunk": trunk,
            "prefix": prefix,
            "memory": memory,
            "load": load.load,
        }
        for part, measure in measures.items():
            if part in parts:
                report.results[part] = measure(options, report.line)
    report.save()


def fresh_adapter(model: str, folder: Path) -> Path:
    """An adapter on every block, for the example's task, whose samples differ."""
    config = read_config(EXAMPLE / "adapter").model_copy(
        update={"target_modules": ("q_proj", "v_proj", "lm_head"), "layers_to_transform": None}
    )
    made = ScalaBLModel(load_pretrained(model).model, config)
    made.reset_adapter(0, std_init=0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in made.adapted.values():
            layer.lora_B.normal_(0, 0.02, generator=generator)
    save_adapter(folder, config, made.adapter_parameters())
    return folder


class Report:
    """The lines that are printed, and the numbers behind them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._folder, self._lines = options.output, list[str]()
        load = os.getloadavg()[0]
        self.results: dict[str, Any] = {
            "machine": describe(),
            "threads": torch.get_num_threads(),
            "load_at_start": load,
            "model": Path(options.model).name,
            "inputs": options.inputs,
            "rounds": options.rounds,
        }
        self.line(f"{describe()}, {torch.get_num_threads()} threads; load average at the start {load:.1f}")
        self.line(f"{Path(options.model).name}, {options.inputs} inputs a batch, {options.rounds} rounds in turns")

    def line(self, text: str) -> None:
        """Print and keep."""
        print(text, flush=True)
        self._lines.append(text)

    def save(self) -> None:
        """Write text, numbers and figures, where they were asked for."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "serving.txt").write_text("\n".join(self._lines) + "\n", encoding="utf-8")
            (self._folder / "serving.json").write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")
            save_figures(self.results, self._folder)


def inputs_of(prompter: Prompter, kind: str, count: int) -> list[list[int]]:
    """`count` prompts of ragged lengths, made of the example's queries."""
    queries = (EXAMPLE / "queries.txt").read_text(encoding="utf-8").splitlines()
    shortest, longest = LENGTHS[kind]
    found = []
    for index in range(count):
        wanted = shortest + (longest - shortest) * index // max(1, count - 1)
        words = " ".join(queries[index % len(queries) :] + queries).split() * 4
        low, high = 1, len(words)  # the most words that fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(prompter.encode(" ".join(words[:middle]))) <= wanted else (low, middle - 1)
        found.append(prompter.encode(" ".join(words[:low])))
    return found


class Ours:
    """A model whose features can be switched."""

    def __init__(self, model: ScalaBLModel) -> None:
        self.model = model
        find_shared_work(model)
        self._found = model.trunk.verified, model.trunk.trims, {n: layer.shared_input for n, layer in model.adapted.items()}
        self._packs = model.packs

    def run(self, sequences: Sequence[Sequence[int]], draws: Draws, features: tuple[bool, bool, bool, bool]) -> Tensor:
        """[B, K, C] with no more than these features; those that are not possible stay off."""
        trunk, trims, shared = self._found
        self.model.trunk.verified, self.model.trunk.trims = trunk and features[0], trims and features[1]
        for name, layer in self.model.adapted.items():
            layer.shared_input = shared[name] and features[2]
        self.model.packs = self._packs and features[3]
        return self.model.logits(TokenBatch.of(sequences), draws)


def brute(options: argparse.Namespace, line: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every length and number of samples: seconds for each input, and ratios to the loop and to PEFT."""
    pretrained = load_pretrained(options.model)
    prompter = Prompter(read_config(options.adapter).task, pretrained.tokenizer)
    ours = Ours(load_adapter(pretrained.model, options.adapter))
    peers = None if options.no_peers else Peers(options.adapter, options.model, prompter, max(options.samples))
    int8 = Int8(options.model, options.adapter)
    found = []
    with _vllm(options, prompter) as vllm:
        for kind in options.prompts:
            sequences = inputs_of(prompter, kind, options.inputs)
            for count in options.samples:
                found.append(_brute(ours, peers, vllm, int8, sequences, count, options.rounds))
                found[-1]["prompts"] = kind
                _print_brute(found[-1], line)
    return found


def _vllm(options: argparse.Namespace, prompter: Prompter) -> AbstractContextManager[VllmPeer | None]:
    if options.vllm_python is None:
        return nullcontext()
    from benchmarks.vllm_peer import vllm_peer  # what starts the server is the tests'

    longest = max(LENGTHS[kind][1] for kind in options.prompts)
    most = max(options.samples)
    return vllm_peer(options.vllm_python, options.adapter, options.model, prompter, num_samples=most, longest=longest)


def _brute(
    ours: Ours,
    peers: Peers | None,
    vllm: VllmPeer | None,
    int8: Int8,
    sequences: list[list[int]],
    count: int,
    rounds: int,
) -> dict[str, Any]:
    draws = ours.model.draws(count)
    passes: dict[str, Callable[[], Tensor]] = {}
    if peers is not None:
        passes["loop, as published"] = lambda: peers.loop(sequences, count)
        passes["loop, last position"] = lambda: peers.loop(sequences, count, last_only=True)
        passes["PEFT, mixed batch"] = lambda: peers.mixed_batch(sequences, count)
    for name, features in FEATURES.items():
        passes[name] = lambda features=features: ours.run(sequences, draws, features)
    apart = _apart(passes)
    best = passes[BEST]()
    change = int8.change(best, sequences, draws)
    result: dict[str, Any] = {
        "num_samples": count,
        "lengths": [len(ids) for ids in sequences],
        "largest_difference": apart,
        "int8_change": change.model_dump(),
    }
    if vllm is not None:
        passes[VLLM] = lambda: vllm.run(sequences, count)
        result["vllm_difference"] = float((passes[VLLM]().softmax(-1) - best.softmax(-1)).abs().max())
    products, flops = _products(ours.model, count * sum(map(len, sequences)))
    products()
    alone = "matrix products alone"
    seconds = in_turns({**passes, "+ int8": lambda: int8.run(sequences, draws), alone: products}, rounds)
    mm = seconds.pop(alone)
    result |= {
        "matrix_gflops": flops / statistics.median(mm) / 1e9,
        "share_of_matrix_rate": ratio(mm, seconds["+ no padding"]),
        "best_share_of_matrix_rate": ratio(mm, seconds[BEST]),
        "int8_over_float32": ratio(seconds[BEST], seconds["+ int8"]),
        "methods": {},
    }
    for name, taken in seconds.items():
        row: dict[str, Any] = {"seconds_per_input": statistics.median(taken) / len(sequences), "seconds": taken}
        if peers is not None:
            row["over_loop"] = ratio(seconds["loop, as published"], taken)
            row["over_peft"] = ratio(seconds["PEFT, mixed batch"], taken)
        row["over_rows"] = ratio(seconds["one padded batch"], taken)
        result["methods"][name] = row
    return result


def _apart(passes: Mapping[str, Callable[[], Tensor]]) -> float:
    """Run every method once; how far apart any two are in a sample's probabilities."""
    found = [run().softmax(-1) for run in passes.values()]
    apart = max(float((one - found[-1]).abs().max()) for one in found)
    assert apart <= SAME, f"the methods differ by {apart}"
    return apart


def _products(model: ScalaBLModel, tokens: int) -> tuple[Callable[[], None], float]:
    """The matrix products of all blocks over so many tokens and nothing else, and how many operations these are."""
    linears = [m for block in model.trunk.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    inputs = {m.in_features: torch.randn(tokens, m.in_features).to(m.weight) for m in linears}

    @torch.inference_mode()
    def run() -> None:
        for linear in linears:
            torch.mm(inputs[linear.in_features], linear.weight.T)

    return run, float(sum(2 * tokens * m.in_features * m.out_features for m in linears))


def _print_brute(result: dict[str, Any], line: Callable[[str], None]) -> None:
    share = result["share_of_matrix_rate"]
    line(
        f"\n{result['prompts']} prompts of {result['lengths']} tokens, K = {result['num_samples']}; products alone "
        f"{result['matrix_gflops']:.0f} GFLOP/s, a pass without padding at {share['median']:.0%} of that "
        f"({share['lowest']:.0%} to {share['highest']:.0%}), with all features at "
        f"{result['best_share_of_matrix_rate']['median']:.0%}, counting real tokens; probabilities within "
        f"{result['largest_difference']:.0e}"
        + (f", vLLM's within {result['vllm_difference']:.0e}" if "vllm_difference" in result else "")
    )
    line(f"{'method':<26}{'s / input':>11}{'x loop':>22}{'x PEFT':>22}{'x padded batch':>22}")
    for name, row in result["methods"].items():
        cells = [shown(row[key]) if key in row else "" for key in ("over_loop", "over_peft", "over_rows")]
        line(f"{name:<26}{row['seconds_per_input']:>11.3f}" + "".join(f"{cell:>22}" for cell in cells))
    change = QuantizationChange(**result["int8_change"])
    line(f"int8 is {shown(result['int8_over_float32'])} times as fast as the row before it; {change}")


def profile(options: argparse.Namespace, line: Callable[[str], None]) -> list[dict[str, Any]]:
    """Each length with the largest number of samples: what a pass with all features spends its time on."""
    pretrained = load_pretrained(options.model)
    prompter = Prompter(read_config(options.adapter).task, pretrained.tokenizer)
    ours = Ours(load_adapter(pretrained.model, options.adapter))
    count = max(options.samples)
    draws, found = ours.model.draws(count), []
    for kind in options.prompts:
        sequences = inputs_of(prompter, kind, options.inputs)
        run = partial(ours.run, sequences, draws, FEATURES[BEST])
        run()
        found.append({"prompts": kind, "num_samples": count, **profiled(run, options.rounds)})
        print_profile(found[-1], line)
    return found


def trunk(options: argparse.Namespace, line: Callable[[str], None]) -> list[dict[str, Any]]:
    """The adapter cut to the last third of the blocks: with the shared trunk over without it."""
    pretrained = load_pretrained(options.model)
    config, weights = read_config(options.adapter), read_weights(options.adapter)
    depth = pretrained.model.config.get_text_config().num_hidden_layers
    config = config.model_copy(update={"layers_to_transform": tuple(range(depth - depth // 3, depth))})
    model = ScalaBLModel(pretrained.model, config)
    load_weights(model, {name: t for name, t in weights.items() if name.rpartition(".")[0] in model.adapted})
    ours = Ours(model.requires_grad_(False).eval())
    prompter = Prompter(config.task, pretrained.tokenizer)
    line(f"\nAdapter on blocks {depth - depth // 3} to {depth - 1} of {depth}: shared trunk over the same without it")
    line(f"{'prompts':<10}{'K':>4}{'without, s / input':>20}{'with':>9}{'ratio':>22}{'probabilities within':>23}")
    found = []
    forms = {"without": (False, True, True, False), "with": (True, True, True, False)}  # padded both, for the trunk alone
    for kind in options.prompts:
        sequences = inputs_of(prompter, kind, options.inputs)
        for count in options.samples:
            passes = {name: partial(ours.run, sequences, model.draws(count), each) for name, each in forms.items()}
            apart = _apart(passes)
            seconds = in_turns(passes, options.rounds)
            row = {"prompts": kind, "num_samples": count, "largest_difference": apart, "seconds": seconds}
            row["ratio"] = ratio(seconds["without"], seconds["with"])
            found.append(row)
            each = [statistics.median(seconds[name]) / len(sequences) for name in passes]
            line(f"{kind:<10}{count:>4}{each[0]:>20.3f}{each[1]:>9.3f}{shown(row['ratio']):>22}{apart:>23.0e}")
    return found


def memory(options: argparse.Namespace, line: Callable[[str], None]) -> list[dict[str, Any]]:
    """MiB that a process holds before a pass and that the pass takes on top, for each method and number of samples."""
    line("\nMemory in MiB, each pass in a process of its own: held before it, and the highest during it beyond that")
    line(f"{'method':<26}{'prompts':<10}{'K':>4}{'held':>10}{'pass':>10}")
    found = []
    for kind in options.prompts:
        for method in ("ours",) if options.no_peers else ("ours", "PEFT, mixed batch"):
            for count in options.samples:
                command = [sys.executable, "-m", "benchmarks.serving", "--memory-of", f"{method} {count}"]
                command += ["--model", options.model, "--adapter", str(options.adapter)]
                command += ["--prompts", kind, "--inputs", str(options.inputs)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                row = {"method": method, "prompts": kind, "num_samples": count, **json.loads(output)}
                found.append(row)
                line(f"{method:<26}{kind:<10}{count:>4}{row['held_mib']:>10.0f}{row['pass_mib']:>10.0f}")
    return found


def _memory_of_this(options: argparse.Namespace) -> dict[str, float]:
    method, _, number = options.memory_of.rpartition(" ")
    count = int(number)
    pretrained = load_pretrained(options.model)
    prompter = Prompter(read_config(options.adapter).task, pretrained.tokenizer)
    (kind,) = options.prompts
    sequences = inputs_of(prompter, kind, options.inputs)
    run: Callable[[int], Tensor]
    if method == "ours":
        ours = Ours(load_adapter(pretrained.model, options.adapter))
        draws = {each: ours.model.draws(each) for each in (1, count)}
        run = partial(_run_ours, ours, sequences, draws)
    else:
        del pretrained
        run = partial(Peers(options.adapter, options.model, prompter, count).mixed_batch, sequences)
    run(1)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    held = _status("VmRSS")
    run(count)
    return {"held_mib": held, "pass_mib": _status("VmHWM") - held}


def _run_ours(ours: Ours, sequences: list[list[int]], draws: Mapping[int, Draws], count: int) -> Tensor:
    return ours.run(sequences, draws[count], FEATURES[BEST])


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    main()
