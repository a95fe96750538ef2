"""Memory of a pass, each in a process of its own, which runs this module. Times are not measured here."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.report import Line
from benchmarks.serving.features import BEST, FEATURES, SwitchableModel
from benchmarks.serving.peers import Peers
from benchmarks.serving.workload import inputs_of
from scalabl.base.pretrained import load_pretrained
from scalabl.files.adapter_directory import load_adapter, read_config
from scalabl.prompt import Prompter

OURS, PEFT = "ours", "PEFT, mixed batch"


def memory(options: argparse.Namespace, line: Line) -> list[dict[str, Any]]:
    """MiB that a process holds before a pass and that the pass takes on top, for each method and number of samples."""
    line("\nMemory in MiB, each pass in a process of its own: held before it, and the highest during it beyond that")
    line(f"{'method':<26}{'prompts':<10}{'K':>4}{'held':>10}{'pass':>10}")
    rows = []
    for kind in options.prompts:
        for method in (OURS,) if options.no_peers else (OURS, PEFT):
            for count in options.samples:
                command = [sys.executable, "-m", "benchmarks.serving.memory", "--method", method]
                command += ["--model", options.model, "--adapter", str(options.adapter)]
                command += ["--prompts", kind, "--samples", str(count), "--inputs", str(options.inputs)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                row = {"method": method, "prompts": kind, "num_samples": count, **json.loads(output)}
                rows.append(row)
                line(f"{method:<26}{kind:<10}{count:>4}{row['held_mib']:>10.0f}{row['pass_mib']:>10.0f}")
    return rows


def main() -> None:
    """Run one pass, and print what this process held before it and what the pass took, in MiB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=(OURS, PEFT), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--inputs", type=int, required=True)
    options = parser.parse_args()
    run = _pass(options)
    run(1)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    held = _status("VmRSS")
    run(options.samples)
    print(json.dumps({"held_mib": held, "pass_mib": _status("VmHWM") - held}))


def _pass(options: argparse.Namespace) -> Callable[[int], Tensor]:
    """From a number of samples to logits."""
    pretrained = load_pretrained(options.model)
    prompter = Prompter(read_config(options.adapter).task, pretrained.tokenizer)
    sequences = inputs_of(prompter, options.prompts, options.inputs)
    if options.method == OURS:
        ours = SwitchableModel(load_adapter(pretrained.model, options.adapter))
        draws = {count: ours.model.draws(count) for count in (1, options.samples)}
        return lambda count: ours.run(sequences, draws[count], FEATURES[BEST])
    del pretrained
    peers = Peers.of_folder(options.adapter, options.model, prompter, options.samples)
    return lambda count: peers.mixed_batch(sequences, count)


def _status(field: str) -> float:
    """MiB of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    main()
