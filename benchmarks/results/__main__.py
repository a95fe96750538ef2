"""Run the study: python -m benchmarks.results --model FOLDER --data FOLDER --folder FOLDER [--only …]

Adapters and logits go to --folder; the scores of each run go to benchmarks/results/runs, and a run whose scores are there
is not run again. `page` writes docs/results.md and its figures from the scores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from transformers.utils import logging as transformers_logging

from benchmarks.parts import add_only, chosen_parts
from benchmarks.results.execute import execute, save_ensemble
from benchmarks.results.fitted import measure_all
from benchmarks.results.plan import Run, our_runs, peer_runs, sweep_runs
from benchmarks.results.precision import SCALES, Precision
from benchmarks.results.saved import scores_of
from benchmarks.results.study import Study

PARTS = ("peers", "sweep", "ours", "fitted", "precision", "times", "page")
MAIN = "train-scalabl-0"


def main() -> None:
    """Run the parts that are asked for, in their order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the base model's folder (examples.intent_router.base_model)")
    parser.add_argument("--data", type=Path, required=True, help="the folder with clinc10/ and clinc_oos/")
    parser.add_argument("--folder", type=Path, required=True, help="what has finished is kept here")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="only runs of these, so that processes can share a study (default: all)"
    )
    add_only(parser, PARTS)
    options = parser.parse_args()
    parts = chosen_parts(parser, options.only, PARTS)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    study = Study.of(options.model, options.data, options.folder)
    for part, runs in (("peers", peer_runs()), ("sweep", sweep_runs()), ("ours", our_runs())):
        if part in parts:
            for run in runs:
                if options.seeds is None or run.seed in options.seeds:
                    _run(study, run)
    if "peers" in parts:
        for rows in ("train", "few"):
            save_ensemble(study, rows)
    if "fitted" in parts:
        measure_all(study, options.data, options.seeds)
    main_run = next(run for run in our_runs() if run.name == MAIN)
    for scale in SCALES:
        if "precision" in parts:
            Precision(study, main_run, scale).measure()
        if "times" in parts and scale == 1:
            Precision(study, main_run, scale).time()
    if "page" in parts:
        from benchmarks.results.page import write

        write()


def _run(study: Study, run: Run) -> None:
    if scores_of(run.name, study.made_from(run)) is None:
        began = time.perf_counter()
        execute(study, run)
        print(f"{run.name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
