"""What `num_samples: "auto"` saves and what it costs: its stopping rules against all samples, on a data set.

python -m benchmarks.adaptive --adapter <folder> --model <folder> --data <rows.jsonl> [--json out.json]

All samples are run once for every row. Since draws are nested, what a rule would have answered is in that table, for any
rule. Only the time is measured by running the rule itself, in turns with all samples, on some of the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import describe
from benchmarks.timing import in_turns, ratio
from scalabl.base.pretrained import load_pretrained
from scalabl.evaluation.dataset import read_examples
from scalabl.evaluation.encoded import EncodedSet, encode_examples
from scalabl.evaluation.inference import adaptive_predictive, logits_of
from scalabl.files.adapter_directory import load_adapter, read_config
from scalabl.model.posterior import DEFAULT_SCHEME, SCHEMES, Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.passes.probes import find_shared_work
from scalabl.prompt import Prompter
from scalabl.uncertainty.absent_choices import without_absent
from scalabl.uncertainty.adaptive import Estimate, Rule, sample_adaptively
from scalabl.uncertainty.predictive import Predictive, predictive

RULES = (
    ("decision", 0.05),
    ("decision", 0.005),
    ("probabilities", 0.02),
    ("probabilities", 0.01),
    ("mutual_information", 0.02),
    ("mutual_information", 0.01),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSONL rows; an answer of -1 is none of the choices")
    parser.add_argument("--rows", type=int, help="evenly spaced (default: all)")
    parser.add_argument("--first", type=int, default=8)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheme", choices=SCHEMES, default=DEFAULT_SCHEME)
    parser.add_argument("--other-seed", type=int, help="also how far all samples of this seed are from all of --seed")
    parser.add_argument("--table", type=Path, help="keep the logits of all samples here, and use those that are there")
    parser.add_argument("--timed-rows", type=int, default=64, help="evenly spaced")
    parser.add_argument("--rounds", type=int, default=5, help="of timing (0: none)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()

    examples = _spaced(read_examples(options.data, labelled=False), options.rows)
    config = read_config(options.adapter)
    pretrained = load_pretrained(options.model)
    encoded = encode_examples(Prompter(config.task, pretrained.tokenizer), examples, pretrained.max_tokens)
    model = load_adapter(pretrained.model, options.adapter)
    find_shared_work(model)
    draws = model.draws(options.most, options.seed, options.scheme)
    rules = [Rule(target, tolerance, options.first, options.most) for target, tolerance in RULES]

    logits = _table(model, encoded, draws, options.table)
    full = predictive(logits, config.temperature, draws.scheme, draws.members)
    print(f"{describe()}, {torch.get_num_threads()} threads")
    print(
        f"{options.data}: {len(examples)} rows, {draws.scheme}, seed {draws.seed}, {options.first} to {options.most} samples"
    )
    print(
        f"{'rule':<28}{'mean K':>8}{'settled':>9}{'same choice':>13}{'p: bias':>10}{'p: RMS':>9}"
        f"{'MI: bias':>10}{'MI: RMS':>9}{'accuracy':>10}   K: share of rows"
    )
    rows = []
    for rule in rules:
        estimates = sample_adaptively(
            lambda going, start, stop: logits[list(going), start:stop],
            len(examples),
            rule,
            temperature=config.temperature,
            scheme=draws.scheme,
        )
        rows.append(_against(full, encoded.answers, f"{rule.target} {rule.allowed:g}", estimates))
    all_samples = {"mean_num_samples": float(options.most), "settled": None, "num_samples": {options.most: 1.0}}
    rows.append({"rule": f"all {options.most}", **all_samples, **_differences(full, full, encoded.answers)})
    if options.other_seed is not None:
        others = _table(model, encoded, model.draws(options.most, options.other_seed, options.scheme), None)
        outcome = predictive(others, config.temperature, draws.scheme, draws.members)
        name = f"all {options.most}, seed {options.other_seed}"
        rows.append({"rule": name, **all_samples, **_differences(full, outcome, encoded.answers)})
    for row in rows:
        _print(row)
    report = {"machine": describe(), "threads": torch.get_num_threads(), "data": options.data.name, "rows": len(examples)}
    report |= {"first": options.first, "most": options.most, "scheme": draws.scheme, "seed": draws.seed, "rules": rows}
    if options.rounds:
        report["time"] = _times(model, encoded, draws, rules, options.timed_rows, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _spaced(rows: Sequence[Any], count: int | None) -> list[Any]:
    count = min(count or len(rows), len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _table(model: ScalaBLModel, encoded: EncodedSet, draws: Draws, file: Path | None) -> Tensor:
    """Logits [N, K, C] of all samples."""
    if file is not None and file.is_file():
        logits = load_file(file)["logits"]
        if logits.shape[:2] != (len(encoded.sequences), draws.num_samples):
            raise SystemExit(f"--table {file} has the logits {tuple(logits.shape[:2])} of other rows or samples; remove it")
    else:
        with tqdm(total=len(encoded.sequences), desc=f"{draws.num_samples} samples, seed {draws.seed}", unit="row") as bar:
            logits = logits_of(model, encoded.sequences, draws, on_progress=bar.update)
        if file is not None:
            save_file({"logits": logits}, file)
    return without_absent(logits, encoded.num_choices)


def _against(full: Predictive, answers: Tensor, name: str, estimates: list[Estimate]) -> dict[str, Any]:
    counts = Counter(estimate.num_samples for estimate in estimates)
    p = torch.stack([estimate.outcome.probabilities for estimate in estimates])
    information = torch.stack([estimate.outcome.mutual_information for estimate in estimates])
    return {
        "rule": name,
        "mean_num_samples": statistics.fmean(estimate.num_samples for estimate in estimates),
        "settled": sum(estimate.settled for estimate in estimates) / len(estimates),
        "num_samples": {count: counts[count] / len(estimates) for count in sorted(counts)},
        **_compared(full, answers, p, information),
    }


def _differences(full: Predictive, outcome: Predictive, answers: Tensor) -> dict[str, float]:
    return _compared(full, answers, outcome.probabilities, outcome.mutual_information)


def _compared(full: Predictive, answers: Tensor, p: Tensor, information: Tensor) -> dict[str, float]:
    """Bias is by how much a number comes out too high in the mean: the probability of the full answer's choice, and MI."""
    choice = full.probabilities.argmax(-1)
    confidence = (p - full.probabilities).gather(1, choice.unsqueeze(1))
    gap = information - full.mutual_information
    return {
        "same_choice": float((p.argmax(-1) == choice).double().mean()),
        "probability_bias": float(confidence.mean()),
        "probability_rms": float((p - full.probabilities).square().mean().sqrt()),
        "mutual_information_bias": float(gap.mean()),
        "mutual_information_rms": float(gap.square().mean().sqrt()),
        "mutual_information_mean": float(full.mutual_information.mean()),
        "accuracy": float((p.argmax(-1) == answers).double().mean()),
    }


def _print(row: dict[str, Any]) -> None:
    shares = "  ".join(f"{count}: {share:.1%}" for count, share in row["num_samples"].items())
    settled = "" if row["settled"] is None else f"{row['settled']:.1%}"
    print(
        f"{row['rule']:<28}{row['mean_num_samples']:>8.1f}{settled:>9}{row['same_choice']:>13.2%}"
        f"{row['probability_bias']:>+10.5f}{row['probability_rms']:>9.5f}{row['mutual_information_bias']:>+10.5f}"
        f"{row['mutual_information_rms']:>9.5f}{row['accuracy']:>10.2%}   {shares}",
        flush=True,
    )


def _times(
    model: ScalaBLModel, encoded: EncodedSet, draws: Draws, rules: list[Rule], rows: int, rounds: int
) -> dict[str, Any]:
    """Seconds of some rows by each rule and with all samples, in turns: the ratios within a round, and their median."""
    chosen = _spaced(range(len(encoded.sequences)), rows)
    some = EncodedSet([encoded.sequences[i] for i in chosen], encoded.answers[chosen], encoded.num_choices[chosen])
    runs: dict[str, Callable[[], object]] = {"all": lambda: logits_of(model, some.sequences, draws)}
    for rule in rules:
        runs[f"{rule.target} {rule.allowed:g}"] = lambda rule=rule: adaptive_predictive(model, some, draws, rule)
    runs["all"]()  # warm
    seconds = in_turns(runs, rounds)
    print(f"time of {len(chosen)} rows over that of all {draws.num_samples} samples, median of {rounds} rounds (range)")
    times: dict[str, Any] = {"rows": len(chosen), "rounds": rounds, "seconds": seconds}
    for name in list(runs)[1:]:
        share = ratio(seconds[name], seconds["all"])
        times[name] = {"ratio": share["median"], "range": [share["lowest"], share["highest"]]}
        print(f"{name:<28}{share['median']:>8.3f} ({share['lowest']:.3f} to {share['highest']:.3f})", flush=True)
    return times


if __name__ == "__main__":
    main()
