"""Scores against values worked out by hand, and batches that cover a set exactly once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl.errors import DatasetError
from scalabl.evaluation.dataset import Example
from scalabl.evaluation.encoded import encode_examples
from scalabl.evaluation.inference import logits_of, ood_scores, predictive_of
from scalabl.evaluation.scoring import scores
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.batches import batches
from scalabl.prompt import Prompter
from scalabl.uncertainty.predictive import predictive
from tests import tiny

COLOURS = tiny.CLASSIFICATION.choices


def test_scores_are_the_textbook_ones() -> None:
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]], dtype=torch.float64)
    result = scores(predictive(p.log().unsqueeze(1)), torch.tensor([0, 1, 1, 1]))
    assert result["accuracy"] == 0.75
    assert result["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.9) + math.log(0.7)) / 4)
    assert result["brier"] == pytest.approx((2 * 0.04 + 2 * 0.36 + 2 * 0.01 + 2 * 0.09) / 4)
    # Every confidence falls into a bin of its own: |0.8 - 1|, |0.6 - 0|, |0.9 - 1|, |0.7 - 1|, a quarter each.
    assert result["ece"] == pytest.approx((0.2 + 0.6 + 0.1 + 0.3) / 4, abs=1e-6)
    assert result["auroc_wrong_confidence"] == 1.0, "the wrong answer is the least confident one"
    assert result["mutual_information"] == 0


def test_auroc_is_left_out_when_nothing_is_wrong() -> None:
    outcome = predictive(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]))
    assert "auroc_wrong_entropy" not in scores(outcome, torch.tensor([0, 1]))


def test_auroc_counts_pairs_and_ties_as_half() -> None:
    sure, split, even = [[9.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]
    inside = predictive(torch.tensor([sure, split]))
    outside = predictive(torch.tensor([split, even]))
    # pairs (inside, outside): sure < split, sure < even, split = split (half), split < even
    assert ood_scores(inside, outside)["auroc_ood_entropy"] == pytest.approx(3.5 / 4)


def test_auroc_tells_scores_apart_that_a_sigmoid_would_tie() -> None:
    inside = predictive(torch.tensor([[[40.0, 0.0]], [[41.0, 0.0]]]).double())
    outside = predictive(torch.tensor([[[38.0, 0.0]], [[39.0, 0.0]]]).double())
    assert ood_scores(inside, outside)["auroc_ood_entropy"] == 1.0


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 600))
def test_batches_cover_every_input_once_within_the_budget(lengths: list[int], samples: int, budget: int) -> None:
    made = list(batches(lengths, samples, budget))
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * samples * max(lengths[i] for i in batch) <= budget


def test_logits_of_a_set_are_those_of_each_input_alone_in_its_order() -> None:
    model, sequences = tiny.adapted(), tiny.ragged((7, 2, 11, 2, 5))
    draws, heard = model.draws(4), []
    together = logits_of(model, sequences, draws, max_batch_tokens=60, on_progress=heard.append)
    assert sum(heard) == 5
    assert len(heard) > 1
    for logits, sequence in zip(together, sequences, strict=True):
        assert (logits - model.logits(TokenBatch.of([sequence]), draws)[0]).abs().max() <= 1e-5


def test_choices_that_an_input_does_not_have_get_no_probability() -> None:
    model = tiny.adapted(task=tiny.MULTIPLE_CHOICE)
    draws = model.draws(4)
    logits = logits_of(model, tiny.ragged((5, 6)), draws)
    outcome = predictive_of(logits, torch.tensor([2, 4]), model, draws)
    assert torch.equal(outcome.probabilities[0, 2:], torch.zeros(2, dtype=torch.float64))
    fewer = predictive(logits[:1, :, :2], scheme=draws.scheme)
    assert torch.allclose(outcome.probabilities[0, :2], fewer.probabilities[0])
    assert float(outcome.entropy[0]) == pytest.approx(float(fewer.entropy[0]))


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
        DatasetError, match=r"rows\.jsonl:7: the choices are \['red', 'blue'\]; the task has \['red', 'green'"
    ):
        encode_examples(prompter, [replace(row, choices=("red", "blue"))])
    with pytest.raises(DatasetError, match=r"rows\.jsonl:7: inputs: the prompt has \d+ tokens and the limit is 5"):
        encode_examples(prompter, [row], max_tokens=5)
