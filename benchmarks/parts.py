"""The argument `--only` of the benchmarks that have parts. What a part measures is the benchmark's own."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def add_only(parser: argparse.ArgumentParser, parts: Iterable[str]) -> None:
    """`--only`, by default all parts."""
    parser.add_argument("--only", default=",".join(parts), help="comma-separated parts (default: all)")


def chosen_parts(parser: argparse.ArgumentParser, only: str, parts: Iterable[str]) -> list[str]:
    """The parts that `--only` names; ends the program with a message if it names another."""
    chosen = only.split(",")
    if unknown := [part for part in chosen if part not in parts]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(parts)}")
    return chosen
