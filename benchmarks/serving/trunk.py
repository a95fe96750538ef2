"""An adapter on the last third of the blocks: with the shared trunk over without it. Adapters on all blocks: `brute`."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

from benchmarks.report import Line
from benchmarks.serving.features import SwitchableModel, largest_difference
from benchmarks.serving.workload import inputs_of
from benchmarks.timing import in_turns, ratio, ratio_text
from scalabl.base.pretrained import load_pretrained
from scalabl.files.adapter_directory import load_weights, read_config, read_weights
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.prompt import Prompter

# As in `FEATURES`: padded both, for the trunk alone.
FORMS = {"without": (False, True, True, False), "with": (True, True, True, False)}


def trunk(options: argparse.Namespace, line: Line) -> list[dict[str, Any]]:
    """Every length and number of samples, in turns with and without the shared trunk."""
    pretrained = load_pretrained(options.model)
    config, weights = read_config(options.adapter), read_weights(options.adapter)
    depth = pretrained.model.config.get_text_config().num_hidden_layers
    config = config.model_copy(update={"layers_to_transform": tuple(range(depth - depth // 3, depth))})
    model = ScalaBLModel(pretrained.model, config)
    load_weights(model, {name: t for name, t in weights.items() if name.rpartition(".")[0] in model.adapted})
    ours = SwitchableModel(model.requires_grad_(False).eval())
    prompter = Prompter(config.task, pretrained.tokenizer)
    line(f"\nAdapter on blocks {depth - depth // 3} to {depth - 1} of {depth}: shared trunk over the same without it")
    line(f"{'prompts':<10}{'K':>4}{'without, s / input':>20}{'with':>9}{'ratio':>22}{'probabilities within':>23}")
    rows = []
    for kind in options.prompts:
        sequences = inputs_of(prompter, kind, options.inputs)
        for count in options.samples:
            passes = {name: partial(ours.run, sequences, model.draws(count), form) for name, form in FORMS.items()}
            difference = largest_difference(passes)
            seconds = in_turns(passes, options.rounds, wait_for_others=True)
            row = {"prompts": kind, "num_samples": count, "largest_difference": difference, "seconds": seconds}
            row["ratio"] = ratio(seconds["without"], seconds["with"])
            rows.append(row)
            times = [statistics.median(seconds[name]) / len(sequences) for name in FORMS]
            cells = f"{kind:<10}{count:>4}{times[0]:>20.3f}{times[1]:>9.3f}{ratio_text(row['ratio']):>22}"
            line(f"{cells}{difference:>23.0e}")
    return rows
