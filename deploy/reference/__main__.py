"""Writes docs/reference.md: `python -m deploy.reference`. With `--check` it only compares."""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.reference.page import render

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(prog="python -m deploy.reference", description="Write docs/reference.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the committed page differs")
    text = render()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{PAGE} is not what the code says; run `python -m deploy.reference`")


if __name__ == "__main__":
    main()
