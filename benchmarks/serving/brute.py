"""K samples by every method, in turns: seconds of each input, and ratios. What a method does is in a module of its own."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lower_precision import Int8
from benchmarks.report import Line
from benchmarks.serving.features import BEST, FEATURES, SwitchableModel, largest_difference
from benchmarks.serving.peers import Peers
from benchmarks.serving.vllm_peer import VllmPeer, vllm_peer
from benchmarks.serving.workload import LENGTHS, inputs_of
from benchmarks.timing import in_turns, ratio, ratio_text
from scalabl.base.pretrained import load_pretrained
from scalabl.evaluation.precision_change import QuantizationChange
from scalabl.files.adapter_directory import load_adapter, read_config
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.prompt import Prompter

VLLM = "vLLM, K requests"
INT8 = "+ int8"
PRODUCTS = "matrix products alone"


def brute(options: argparse.Namespace, line: Line) -> list[dict[str, Any]]:
    """Every length and number of samples: seconds for each input, and ratios to the loop and to PEFT."""
    pretrained = load_pretrained(options.model)
    prompter = Prompter(read_config(options.adapter).task, pretrained.tokenizer)
    ours = SwitchableModel(load_adapter(pretrained.model, options.adapter))
    peers = None if options.no_peers else Peers.of_folder(options.adapter, options.model, prompter, max(options.samples))
    int8 = Int8(options.model, options.adapter)
    results = []
    with _vllm(options, prompter) as vllm:
        methods = Methods(ours, peers, vllm, int8)
        for kind in options.prompts:
            sequences = inputs_of(prompter, kind, options.inputs)
            for num_samples in options.samples:
                result = methods.measure(sequences, num_samples, options.rounds) | {"prompts": kind}
                _print(result, line)
                results.append(result)
    return results


def _vllm(options: argparse.Namespace, prompter: Prompter) -> AbstractContextManager[VllmPeer | None]:
    if options.vllm_python is None:
        return nullcontext()
    longest = max(LENGTHS[kind][1] for kind in options.prompts)
    most = max(options.samples)
    return vllm_peer(options.vllm_python, options.adapter, options.model, prompter, num_samples=most, longest=longest)


@dataclass(frozen=True)
class Methods:
    """What is compared; `peers` and `vllm` are None where they are left out."""

    ours: SwitchableModel
    peers: Peers | None
    vllm: VllmPeer | None
    int8: Int8

    def measure(self, sequences: list[list[int]], num_samples: int, rounds: int) -> dict[str, Any]:
        """See that the methods agree, and time them in turns."""
        draws = self.ours.model.draws(num_samples)
        passes: dict[str, Callable[[], Tensor]] = {}
        if (peers := self.peers) is not None:
            passes["loop, as published"] = lambda: peers.loop(sequences, num_samples)
            passes["loop, last position"] = lambda: peers.loop(sequences, num_samples, last_only=True)
            passes["PEFT, mixed batch"] = lambda: peers.mixed_batch(sequences, num_samples)
        for name, features in FEATURES.items():
            passes[name] = lambda features=features: self.ours.run(sequences, draws, features)
        difference = largest_difference(passes)
        best = passes[BEST]()
        change = self.int8.change(best, sequences, draws)
        result: dict[str, Any] = {
            "num_samples": num_samples,
            "lengths": [len(ids) for ids in sequences],
            "largest_difference": difference,
            "int8_change": change.model_dump(),
        }
        if (vllm := self.vllm) is not None:
            passes[VLLM] = lambda: vllm.run(sequences, num_samples)
            result["vllm_difference"] = float((passes[VLLM]().softmax(-1) - best.softmax(-1)).abs().max())
        products, flops = _products(self.ours.model, num_samples * sum(map(len, sequences)))
        products()
        runs = {**passes, INT8: lambda: self.int8.run(sequences, draws), PRODUCTS: products}
        seconds = in_turns(runs, rounds, wait_for_others=True)
        products_seconds = seconds.pop(PRODUCTS)
        result |= {
            "matrix_gflops": flops / statistics.median(products_seconds) / 1e9,
            "share_of_matrix_rate": ratio(products_seconds, seconds["+ no padding"]),
            "best_share_of_matrix_rate": ratio(products_seconds, seconds[BEST]),
            "int8_over_float32": ratio(seconds[BEST], seconds[INT8]),
            "methods": {name: _row(name, seconds, len(sequences)) for name in seconds},
        }
        return result


def _row(name: str, seconds: dict[str, list[float]], inputs: int) -> dict[str, Any]:
    """Of the table: a method's time, and its speed over that of the others that were measured."""
    row: dict[str, Any] = {"seconds_per_input": statistics.median(seconds[name]) / inputs, "seconds": seconds[name]}
    others = {"over_loop": "loop, as published", "over_peft": "PEFT, mixed batch", "over_rows": "one padded batch"}
    return row | {key: ratio(seconds[other], seconds[name]) for key, other in others.items() if other in seconds}


def _products(model: ScalaBLModel, tokens: int) -> tuple[Callable[[], None], float]:
    """The matrix products of all blocks over so many tokens and nothing else, and how many operations these are."""
    linears = [m for block in model.trunk.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    inputs = {m.in_features: torch.randn(tokens, m.in_features).to(m.weight) for m in linears}

    @torch.inference_mode()
    def run() -> None:
        for linear in linears:
            torch.mm(inputs[linear.in_features], linear.weight.T)

    return run, float(sum(2 * tokens * m.in_features * m.out_features for m in linears))


def _print(result: dict[str, Any], line: Line) -> None:
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
        cells = [ratio_text(row[key]) if key in row else "" for key in ("over_loop", "over_peft", "over_rows")]
        line(f"{name:<26}{row['seconds_per_input']:>11.3f}" + "".join(f"{cell:>22}" for cell in cells))
    change = QuantizationChange(**result["int8_change"])
    line(f"int8 is {ratio_text(result['int8_over_float32'])} times as fast as the row before it; {change}")
