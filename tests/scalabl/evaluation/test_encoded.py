"""Labelled examples become prompts, and a row that cannot is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scalabl.errors import DatasetError
from scalabl.evaluation.dataset import Example
from scalabl.evaluation.encoded import encode_examples
from scalabl.prompt import Prompter
from tests import tiny

COLOURS = tiny.CLASSIFICATION.choices


def test_examples_become_prompts_with_their_answers() -> None:
    prompter = Prompter(tiny.MULTIPLE_CHOICE, tiny.tokenizer())
    rows = [Example("why", ("a", "b", "c"), 2, "rows:1"), Example("how", ("d", "e"), 0, "rows:2")]
    encoded = encode_examples(prompter, rows)
    assert encoded.sequences == [prompter.encode("why", ["a", "b", "c"]), prompter.encode("how", ["d", "e"])]
    assert (encoded.answers.tolist(), encoded.num_choices.tolist()) == ([2, 0], [3, 2])


def test_a_row_that_does_not_fit_the_task_is_named() -> None:
    row = Example("why", COLOURS, 0, "rows.jsonl:7")
    prompter = Prompter(tiny.CLASSIFICATION, tiny.tokenizer())
    with pytest.raises(
        DatasetError, match=r"rows\.jsonl:7: the choices are \['red', 'blue'\]; they must be the task's, \['red', 'green'"
    ):
        encode_examples(prompter, [replace(row, choices=("red", "blue"))])
    with pytest.raises(DatasetError, match=r"rows\.jsonl:7: inputs: the prompt has \d+ tokens and the limit is 5"):
        encode_examples(prompter, [row], max_tokens=5)
