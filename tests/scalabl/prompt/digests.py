"""Hashes of the tokens of label sets, and as a process: `python -m tests.scalabl.prompt.digests SETS TOKENIZER…`.

It imports neither torch nor a model, so that such a process starts quickly.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scalabl.config import Task
from scalabl.prompt import Prompter


def task_of(labels: list[str]) -> Task:
    """A classification with these labels."""
    return Task(kind="classification", template="{input}\nLabel:", choices=tuple(labels))


def digest(tokenizer: PreTrainedTokenizerBase, sets: dict[str, list[str]]) -> str:
    """A hash of the tokens and the shared beginning of all label sets that fit the tokenizer."""
    prompters = [Prompter(task_of(labels), tokenizer) for labels in sets.values() if len(labels) <= len(tokenizer)]
    resolved = [(prompter.choice_tokens, prompter.encode("x")) for prompter in prompters]
    return hashlib.sha256(json.dumps(resolved).encode()).hexdigest()


if __name__ == "__main__":
    label_sets = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for folder in sys.argv[2:]:
        print(digest(PreTrainedTokenizerFast.from_pretrained(folder), label_sets))
