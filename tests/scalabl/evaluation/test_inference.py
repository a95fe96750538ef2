"""Running a model over a set: every input in its order and over its own choices, as if it were asked alone."""

from __future__ import annotations

import pytest
import torch

from scalabl.evaluation import inference
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import adaptive_predictive, linearized_predictive, logits_of, predictive_of
from scalabl.model.token_batch import TokenBatch
from scalabl.uncertainty.absent_choices import without_absent
from scalabl.uncertainty.adaptive import Rule
from scalabl.uncertainty.linearized import NEGLIGIBLE, controlled, linearize
from scalabl.uncertainty.predictive import predictive
from tests import tiny


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


def test_a_predictive_in_blocks_is_that_of_all_inputs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted(task=tiny.MULTIPLE_CHOICE)
    draws, counts = model.draws(4), torch.tensor([2, 4, 3, 4, 2])
    logits = logits_of(model, tiny.ragged((5, 6, 2, 3, 9)), draws)
    whole = predictive_of(logits, counts, model, draws)
    monkeypatch.setattr(inference, "BLOCK_VALUES", 2 * logits[0].numel())
    blocks = predictive_of(logits, counts, model, draws)
    assert torch.equal(whole.sample_probabilities, blocks.sample_probabilities)
    for name in ("probabilities", "entropy", "expected_entropy", "mutual_information"):
        assert torch.equal(getattr(whole, name), getattr(blocks, name))
        assert torch.equal(getattr(whole.standard_error, name), getattr(blocks.standard_error, name))


def test_a_models_answers_are_those_of_as_many_samples_and_decide_as_all_of_them() -> None:
    model = tiny.adapted(task=tiny.MULTIPLE_CHOICE, temperature=1.3)
    sequences = tiny.ragged([3 + n % 11 for n in range(40)])
    encoded = EncodedSet(sequences, torch.zeros(40, dtype=torch.int64), torch.tensor([2, 4, 3, 4] * 10))
    draws = model.draws(64, 5)
    found = adaptive_predictive(model, encoded, draws, Rule(), max_batch_tokens=300)
    full = predictive(without_absent(logits_of(model, sequences, draws), encoded.num_choices), 1.3)
    counts = {each.num_samples for each in found}
    assert min(counts) < 64, "otherwise nothing is shown"
    assert len(counts) > 1
    for index, each in enumerate(found):
        fixed = logits_of(model, [sequences[index]], model.draws(each.num_samples, 5))
        expected = predictive(without_absent(fixed, encoded.num_choices[[index]]), 1.3)
        assert (each.outcome.probabilities - expected.probabilities[0]).abs().max() <= 1e-5
        assert float((each.outcome.mutual_information - expected.mutual_information[0]).abs()) <= 1e-5
        assert int(each.outcome.probabilities.argmax()) == int(full.probabilities[index].argmax())


def test_a_data_set_is_answered_in_its_order_each_input_over_its_own_choices() -> None:
    model, heard = tiny.adapted(task=tiny.MULTIPLE_CHOICE), []
    counts = torch.tensor([2, 4, 3, 4])
    encoded = EncodedSet(tiny.ragged(), torch.zeros(4, dtype=torch.int64), counts)
    found = linearized_predictive(model, encoded, max_batch_tokens=60, on_progress=heard.append)
    assert sum(heard) == 4
    assert len(heard) > 1
    for index, count in enumerate(counts.tolist()):
        alone = linearize(model, TokenBatch.of([encoded.sequences[index]])).of_choices(count).predictive()
        assert (found.probabilities[index, :count] - alone.probabilities[0]).abs().max() <= 1e-3, "other Sobol dimensions"
        assert not found.probabilities[index, count:].any()
        assert found.mutual_information[index] == pytest.approx(float(alone.mutual_information[0]), abs=1e-3)


def test_the_samples_of_a_data_set_are_corrected_each_input_over_its_own_choices() -> None:
    model, counts = tiny.adapted(task=tiny.MULTIPLE_CHOICE), torch.tensor([2, 4, 3, 4])
    encoded, draws = EncodedSet(tiny.ragged(), torch.zeros(4, dtype=torch.int64), counts), model.draws(8)
    found = linearized_predictive(model, encoded, draws=draws, max_batch_tokens=60)
    for index, count in enumerate(counts.tolist()):
        batch = TokenBatch.of([encoded.sequences[index]])
        alone = controlled(model.logits(batch, draws)[..., :count], linearize(model, batch).of_choices(count), draws)
        assert torch.allclose(found.probabilities[index, :count], alone.probabilities[0], atol=2e-3), (
            "other Sobol dimensions"
        )
        assert found.probabilities[index, count:].sum() < 1e-9


def test_choices_that_an_input_lacks_take_no_row_from_its_own() -> None:
    model = tiny.adapted(task=tiny.MULTIPLE_CHOICE)
    tiny.prefer(model, (2, 3))
    encoded = EncodedSet(tiny.ragged(), torch.zeros(4, dtype=torch.int64), torch.tensor([2, 2, 4, 2]))
    full = linearized_predictive(model, encoded)
    rows: list[int] = []
    model.adapted["lm_head"].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    lean = linearized_predictive(model, encoded, negligible=NEGLIGIBLE)
    assert rows == [4, 8]
    few = [0, 1, 3]
    assert bool((full.mutual_information[few] > 1e-2).all())
    assert torch.allclose(lean.mutual_information[few], full.mutual_information[few], atol=1e-6)
    assert torch.allclose(lean.probabilities[few], full.probabilities[few], atol=1e-6)
    assert torch.allclose(lean.mutual_information, full.mutual_information, atol=1e-3), "other Sobol dimensions"
