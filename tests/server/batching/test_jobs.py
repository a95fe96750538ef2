"""Jobs: what each method needs from the engine, and its answer compared with the functions of `scalabl`."""

from __future__ import annotations

import pytest
import torch
from scalabl_server.batching.jobs import AdaptiveJob, ControlVariateJob, Job, LinearizedJob, Result, SampledJob
from scalabl_server.batching.row_demand import RowDemand

from scalabl.model.posterior import draw
from scalabl.model.token_batch import TokenBatch
from scalabl.uncertainty.adaptive import Rule
from scalabl.uncertainty.linearized import Linearization, controlled, linearize
from scalabl.uncertainty.predictive import predictive
from tests import tiny

TEMPERATURE = 1.3
DRAWS = draw(3, 8, 5)


def linearization() -> Linearization:
    return linearize(tiny.adapted(), TokenBatch.of([[5, 6, 7, 8]]))


def logits(samples: int = 8, choices: int = 3) -> torch.Tensor:
    return torch.randn(samples, choices, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("job", "demand"),
    [
        (SampledJob(DRAWS, 2), RowDemand(8, 8, 8)),
        (LinearizedJob(3, 2), RowDemand(3, 3, 3)),
        (ControlVariateJob(DRAWS, 3, 2), RowDemand(11, 11, 11)),
        (AdaptiveJob(draw(0, 64, 5), 2, Rule()), RowDemand(32, 8, 64, "decision")),
    ],
)
def test_a_job_says_how_many_rows_it_takes(job: Job, demand: RowDemand) -> None:
    assert job.demand == demand


def test_samples_are_answered_over_the_inputs_own_choices() -> None:
    outcome, shares = SampledJob(DRAWS, 2).outcome(Result(logits()), TEMPERATURE)
    expected = predictive(logits()[:, :2], TEMPERATURE, DRAWS.scheme)
    assert torch.equal(outcome.probabilities, expected.probabilities)
    assert shares == {}


def test_a_linearisation_is_answered_with_each_layers_share() -> None:
    outcome, shares = LinearizedJob(3, 2).outcome(Result(linearization=linearization()), TEMPERATURE)
    expected = linearization().of_choices(2)
    assert torch.allclose(outcome.probabilities, expected.predictive(TEMPERATURE).probabilities[0])
    assert list(shares) == list(tiny.adapted().adapted)
    assert sum(shares.values()) == pytest.approx(1)


def test_a_control_variate_corrects_the_samples_by_the_linearisation() -> None:
    draws = tiny.adapted().draws(8, 3)
    outcome, shares = ControlVariateJob(draws, 3, 2).outcome(Result(logits(), linearization()), TEMPERATURE)
    expected = controlled(logits()[:, :2].unsqueeze(0), linearization().of_choices(2), draws, TEMPERATURE)
    assert torch.allclose(outcome.probabilities, expected.probabilities[0])
    assert sum(shares.values()) == pytest.approx(1)


def test_rounds_double_until_the_samples_agree_and_end_with_the_most_that_there_are() -> None:
    job = AdaptiveJob(draw(0, 64, 5), 2, Rule())
    assert job.first_draws().num_samples == 8
    undecided = torch.tensor([[1.0, -1.0, 9.0], [-1.0, 1.0, 9.0]])
    after = [job.next_draws(undecided.repeat(count // 2, 1), 1.0) for count in (8, 16, 32, 64)]
    assert [None if draws is None else (draws.start, draws.num_samples) for draws in after] == [
        (8, 8), (16, 16), (32, 32), None,
    ]  # fmt: skip
    assert job.next_draws(torch.tensor([[3.0, -3.0, 0.0]]).repeat(8, 1), 1.0) is None, "all of them agree"
    assert job.next_draws(torch.full((8, 3), torch.nan), 1.0) is None, "more samples would help nothing"
    assert job.rows_taken(Result(logits(16))) == 16


def test_a_result_has_only_what_was_computed_and_says_whether_it_is_finite() -> None:
    with pytest.raises(LookupError, match="no samples"):
        _ = Result(linearization=linearization()).logits
    with pytest.raises(LookupError, match="not linearised"):
        _ = Result(logits()).linearization
    assert Result(logits(), linearization()).is_finite
    broken = logits()
    broken[0, 0] = torch.inf
    assert not Result(broken).is_finite
    assert not Result(broken, linearization()).is_finite
