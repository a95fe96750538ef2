"""Reads labelled examples from JSONL files and validates every row. Tokenising them is in `encoded`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from scalabl.errors import DatasetError
from scalabl.prompt import check_text


@dataclass(frozen=True)
class Example:
    """One row: the text, its choices, and the index of the true choice (-1: none of them).

    `source` is the row's place, as `file:line`.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    source: str


def read_examples(path: Path, *, labelled: bool = True) -> list[Example]:
    """Rows of `{"text" | "question", ["context"], "choices": [...], "answer": int}`, one JSON object per line.

    A context is put before the question, with an empty line between them.

    Args:
        labelled: require an answer that is one of the choices; otherwise -1 is allowed.

    Raises:
        DatasetError: the file cannot be read, is empty, or has an invalid row; the message gives file and line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            examples.append(_example(line, labelled, source=f"{path}:{number}"))
        except ValueError as error:
            raise DatasetError(f"{path}:{number}: {error}") from None
    if not examples:
        raise DatasetError(f"{path} has no rows; it needs at least one JSON object")
    return examples


def _example(line: bytes, labelled: bool, source: str) -> Example:
    try:
        row = json.loads(line.decode("utf-8"))
    except RecursionError:
        raise ValueError(
            "the row is nested too deeply to be read; write the text and the choices as plain strings"
        ) from None
    if not isinstance(row, dict):
        raise ValueError("the row is not a JSON object")
    name = "text" if "text" in row else "question"
    text, context = row.get(name), row.get("context")
    if not isinstance(text, str):
        raise ValueError("the row needs a string under 'text' or 'question'")
    check_text(name, text)
    if context is not None:
        if not isinstance(context, str):
            raise ValueError("'context' must be a string")
        text = f"{context}\n\n{text}"
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("'choices' must be a list of at least two non-empty strings")
    lowest = 0 if labelled else -1
    if not isinstance(answer, int) or isinstance(answer, bool) or not lowest <= answer < len(choices):
        raise ValueError(f"'answer' is {answer!r}; it must be an index from {lowest} to {len(choices) - 1}")
    return Example(text, tuple(choices), answer, source)
