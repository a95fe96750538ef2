"""docs/gpu.md, from the JSON of the runs in `benchmarks/gpu/runs`: python -m benchmarks.gpu.page

Nothing is measured here, and a dry run is not shown. Tables of a run are in `tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.policy import CLAIMS, FORMS
from benchmarks.gpu.record import read_json
from benchmarks.gpu.tables import PARTS, Content, section

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 5  # failures of a part
RUNS, PAGE = Path(__file__).parent / "runs", ROOT / "docs" / "gpu.md"


@dataclass(frozen=True)
class Run:
    """One run: the name of its folder, its run.json and the JSON of its parts."""

    name: str
    summary: Content
    parts: dict[str, Content]


def read_runs(folder: Path = RUNS) -> list[Run]:
    """The runs in a folder, the newest first; dry runs are left out."""
    runs = []
    for path in sorted(folder.glob("*/run.json"), reverse=True):
        parts = {name: content for name in PARTS if (content := read_json(path.parent / f"{name}.json"))}
        runs.append(Run(path.parent.name, read_json(path), parts))
    return [run for run in runs if not run.summary.get("dry_run", True)]


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    parts = [_intro(runs), _how(), FORMS, _unproven(runs), *map(run_section, runs)]
    return "\n".join(parts).rstrip() + "\n"


def readme_sentence(runs: Sequence[Run]) -> str:
    """What README.md says of GPUs."""
    if not runs:
        return "[No GPU](docs/gpu.md) has been measured."
    return f"[Measured on {runs[0].summary['machine'].get('gpu', 'a GPU')}](docs/gpu.md)."


def _intro(runs: Sequence[Run]) -> str:
    if runs:
        newest = runs[0].summary["machine"]
        state = f"Runs: {len(runs)}, the newest on {newest.get('day')} on {newest.get('gpu', 'an unknown GPU')}."
    else:
        state = "**No run has been made on a GPU. No number on this page or elsewhere in this project was measured on one.**"
    return f"""# On a GPU

{state}

This page is written by `python -m benchmarks.gpu.page` from the JSON in `benchmarks/gpu/runs`.
"""


def _how() -> str:
    return """## How to measure

One command measures correctness, the kernel, the engine, the server and a profile, in at most 7 minutes. Each part has a
time limit, the most important comes first, and results are written one by one: a run that is cut off leaves valid JSON. The
machine needs Linux on x86-64, Python 3.12, torch, Triton, transformers, peft and accelerate. It needs no network.

1. `python -m benchmarks.gpu.collect`, where there is a network: puts wheels of the other packages (11 MiB) and the authors'
   checkpoint into `build/gpu`.
2. `bash benchmarks/gpu/run.sh --output OUT`, on the machine with the GPU, in a copy of the repository with `build/gpu`.
3. Copy OUT's JSON files into a folder of `benchmarks/gpu/runs`, run `python -m benchmarks.gpu.page`, and commit both.

`bash benchmarks/gpu/run.sh --dry-run` does all of it on a CPU with tiny shapes; a test runs it. `make gpu-rehearsal` does it
in a clean virtual environment with Python 3.12, torch 2.11 (CUDA 13), Triton 3.6, transformers 5.17 and the carried wheels.
"""


def _unproven(runs: Sequence[Run]) -> str:
    """What only a run can show, and which of it none has shown."""
    done = {name for run in runs for name, part in run.parts.items() if part.get("status") == "done"}
    lines = ["## What only a run on a GPU can show\n", "| claim | shown by | state |", "|---|---|---|"]
    for claim, part in CLAIMS:
        state = "see the runs below" if part in done else "**unproven**"
        lines.append(f"| {claim} | `{part}` | {state} |")
    return "\n".join(lines) + "\n"


def run_section(run: Run) -> str:
    """Everything that one run measured."""
    machine, parts = run.summary["machine"], run.parts
    lines = [f"## Run {run.name}\n"]
    if machine:
        gpu = f"{machine.get('gpu', 'no GPU')}, driver {machine.get('driver', '-')}, CUDA {machine.get('cuda', '-')}"
        lines.append(f"{gpu}; {machine['line']}.\n")
    lines += ["| part | ended | seconds | failures |", "|---|---|---|---|"]
    for name in PARTS:
        part = parts.get(name) or {"status": "did not run", "failures": []}
        said = "; ".join(f"{failure['step']}: {failure['error'][:200]}" for failure in part["failures"][:SHOWN])
        left = "; ".join(map(str, part.get("results", {}).get("left_out", ())))
        said = "; ".join(text for text in (said, f"left out: {left}" if left else "") if text)
        said = said.replace("\n", " ").replace("|", "/")
        lines.append(f"| {name} | {part['status']} | {part.get('seconds', 0):.0f} | {said} |")
    lines.append("")
    lines += [section(name, parts[name]) for name in PARTS if name in parts]
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(read_runs()), encoding="utf-8")


if __name__ == "__main__":
    main()
