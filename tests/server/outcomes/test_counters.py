"""The calibration counters equal an offline count of the final labels, after any sequence of feedback."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes import scoring
from scalabl_server.outcomes.database import Database
from scalabl_server.outcomes.operations import NewPrediction, Refusal
from scalabl_server.outcomes.totals import TotalsCollector
from scalabl_server.outcomes.writer import Feedback, Limits, LookUp, Record, Writer
from torchmetrics.functional.classification import multiclass_calibration_error

from scalabl.evaluation.scoring import bins_of

CHOICES = ["red", "green", "blue"]
LABELS = [*CHOICES, None]  # None: none of the choices


def index_of(label: str | None) -> int:
    return scoring.NONE if label is None else CHOICES.index(label)


def answer_of(probabilities: Sequence[float], **more: Any) -> dict[str, Any]:
    index = int(np.argmax(probabilities))
    named = dict(zip(CHOICES, probabilities, strict=True))
    return {"index": index, "confidence": probabilities[index], "probabilities": named} | more


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    weights = draw(st.lists(st.floats(0.001, 1), min_size=3, max_size=3))
    members = draw(st.none() | st.lists(st.sampled_from(CHOICES), unique=True))
    sets = None if members is None else {"labels": members, "coverage": draw(st.sampled_from([0.8, 0.95]))}
    probabilities = [weight / sum(weights) for weight in weights]
    return answer_of(probabilities, abstain=draw(st.sampled_from([None, True, False])), prediction_set=sets)


class Replica:
    """A writer with the counters that it exports."""

    def __init__(self, url: str, name: str) -> None:
        self.metrics, self.collector = Metrics(), TotalsCollector()
        self.writer = Writer(Database(url, 5), self.collector, self.metrics, name, Limits(None, 10**6))
        self.writer.start()

    def record(self, adapter: str, answers: Sequence[dict[str, Any]]) -> list[str]:
        ids = [f"pred-{uuid.uuid4().hex}" for _ in answers]
        operation = Record([NewPrediction(i, adapter, "m", a, "", None) for i, a in zip(ids, answers, strict=True)])
        self.writer.submit(operation)
        operation.done.result(10)
        return ids

    def feedback(self, *labels: tuple[str, str | None]) -> list[str]:
        operation = Feedback(labels)
        self.writer.submit(operation)
        return list(operation.done.result(10))

    def counters(self, adapter: str) -> dict[tuple[str, str], float]:
        """(metric, bin or level) -> value, of the series that PromQL would see."""
        return {
            (sample.name, sample.labels.get("bin") or sample.labels["level"]): sample.value
            for family in self.collector.collect()
            for sample in family.samples
            if sample.labels["adapter"] == adapter
        }


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    url = f"sqlite:///{tmp_path_factory.mktemp('db') / 'outcomes.db'}"
    made = [Replica(url, name) for name in "ab"]
    yield made
    for each in made:
        each.writer.stop()


def _summed(replicas: list[Replica], adapter: str) -> dict[tuple[str, str], float]:
    """As PromQL does: the sum over replicas minus the retracted amounts."""
    total: dict[tuple[str, str], float] = {}
    for replica in replicas:
        for (name, key), value in replica.counters(adapter).items():
            sign = -1 if name.endswith("_retracted_total") else 1
            at = (name.replace("_retracted_total", "_total"), key)
            total[at] = total.get(at, 0) + sign * value
    return total


@settings(max_examples=25)
@given(
    given=st.lists(answers(), min_size=1, max_size=6),
    requests=st.lists(
        st.tuples(
            st.integers(0, 1), st.lists(st.tuples(st.integers(0, 5), st.sampled_from(LABELS)), min_size=1, max_size=8)
        ),
        max_size=5,
    ),
)
def test_totals_are_those_of_the_final_labels(
    replicas: list[Replica], given: list[dict[str, Any]], requests: list[tuple[int, list[tuple[int, str | None]]]]
) -> None:
    adapter = uuid.uuid4().hex
    ids = replicas[0].record(adapter, given)
    final: dict[int, str | None] = {}
    for which, labels in requests:
        replica = replicas[which]
        before = replica.counters(adapter)
        statuses = replica.feedback(*((ids[at % len(ids)], label) for at, label in labels))
        for (number, label), status in zip(labels, statuses, strict=True):
            at = number % len(ids)
            assert status == ("recorded" if at not in final else "unchanged" if final[at] == label else "corrected")
            final[at] = label
        after = replica.counters(adapter)
        assert all(after[key] >= value for key, value in before.items())
    expected: dict[tuple[str, str], float] = {}
    for at, answer in enumerate(given):
        amounts = scoring.of_prediction(answer)
        if at in final:
            amounts |= scoring.of_label(answer, index_of(final[at]))
        for (name, key), amount in amounts.items():
            metric = (scoring.FAMILIES[name].metric + "_total", key)
            expected[metric] = expected.get(metric, 0) + amount
    found = _summed(replicas, adapter)
    assert set(expected) <= set(found)
    for key, value in found.items():
        assert value == pytest.approx(expected.get(key, 0), abs=1e-9), key


def test_ece_brier_and_log_loss_are_the_evaluations() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([0.5] * 3, size=500)
    labels = generator.integers(0, 3, 500)
    bins: dict[tuple[str, str], float] = {}
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        for key, amount in scoring.of_label(answer_of(row), label).items():
            bins[key] = bins.get(key, 0) + amount
    total = {name: sum(value for (each, _), value in bins.items() if each == name) for name in scoring.FAMILIES}
    gaps = [abs(bins.get(("correct", edge), 0) - bins.get(("labelled_confidence", edge), 0)) for edge in scoring.UPPER_EDGES]
    reference = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), num_classes=3, n_bins=scoring.BINS, norm="l1"
    )
    assert sum(gaps) / 500 == pytest.approx(float(reference), abs=1e-6)
    truth = np.eye(3)[labels]
    assert total["brier"] / 500 == pytest.approx(((probabilities - truth) ** 2).sum(1).mean(), abs=1e-12)
    assert total["log_loss"] / 500 == pytest.approx(-np.log(probabilities[np.arange(500), labels]).mean(), abs=1e-12)
    assert total["correct"] / 500 == (probabilities.argmax(1) == labels).mean()


def test_a_label_outside_is_one_more_class_with_probability_0() -> None:
    """The same numbers as of a problem with a fourth class, to which every answer gives the probability 0."""
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet([0.5] * 3, size=400)
    labels = generator.integers(-1, 3, 400)
    sums: dict[tuple[str, str], float] = {}
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        for key, amount in scoring.of_label(answer_of(row), label).items():
            sums[key] = sums.get(key, 0) + amount
    total = {name: sum(value for (each, _), value in sums.items() if each == name) for name in scoring.FAMILIES}
    outside = labels == scoring.NONE
    extended = np.concatenate([probabilities, np.zeros((400, 1))], axis=1)
    truth = np.where(outside, 3, labels)
    assert total["outcomes"] == 400
    assert total["outside"] == outside.sum() not in (0, 400)
    assert total["correct"] == (extended.argmax(1) == truth).sum()
    assert total["brier"] == pytest.approx(((extended - np.eye(4)[truth]) ** 2).sum())
    inside = ~outside
    assert total["log_loss"] == pytest.approx(-np.log(probabilities[inside, labels[inside]]).sum())
    gaps = [abs(sums.get(("correct", edge), 0) - sums.get(("labelled_confidence", edge), 0)) for edge in scoring.UPPER_EDGES]
    reference = multiclass_calibration_error(
        torch.tensor(extended), torch.tensor(truth), num_classes=4, n_bins=scoring.BINS, norm="l1"
    )
    assert sum(gaps) / 400 == pytest.approx(float(reference), abs=1e-6)


@pytest.mark.parametrize("probabilities", [[1.0, 0.0, 0.0], [0.5, 0.3, 0.2], [1 / 3] * 3])
def test_the_brier_score_of_a_label_outside_is_no_better_than_that_of_any_choice(probabilities: list[float]) -> None:
    def brier(label: int) -> float:
        return sum(
            value for (name, _), value in scoring.of_label(answer_of(probabilities), label).items() if name == "brier"
        )

    assert brier(scoring.NONE) == pytest.approx(1 + sum(p * p for p in probabilities))
    assert brier(scoring.NONE) >= max(brier(label) for label in range(3)) - 1e-12


@pytest.mark.parametrize("abstain", [True, False, None])
def test_a_label_outside_is_in_no_set_and_right_for_an_abstention(abstain: bool | None) -> None:
    sets = {"labels": CHOICES, "coverage": 0.9}
    amounts = scoring.of_label(answer_of([0.5, 0.3, 0.2], abstain=abstain, prediction_set=sets), scoring.NONE)
    counted = {name for name, _ in amounts}
    always = {"outcomes", "labelled_confidence", "brier", "outside", "labelled_sets", "sets_outside"}
    assert counted == always | ({"abstained", "abstained_outside"} if abstain else set())


@pytest.mark.parametrize(
    ("confidence", "edge"),
    [(0.0, "0.067"), (0.34, "0.400"), (1 / 15, "0.067"), (0.0667, "0.133"), (0.999, "1.000"), (1.0, "1.000")],
)
def test_a_confidence_has_one_bin(confidence: float, edge: str) -> None:
    assert scoring.bin_of(confidence) == edge


@pytest.mark.parametrize("confidence", [0.0, 1e-9, 0.2, 1 / 3, 0.4, 0.5, 7 / 15, 14 / 15, 1.0, *np.linspace(0, 1, 61)])
def test_the_bins_are_those_of_evaluate(confidence: float) -> None:
    index = int(bins_of(torch.tensor([confidence], dtype=torch.float64)))
    assert scoring.bin_of(float(confidence)) == scoring.UPPER_EDGES[index]


def test_a_sure_and_wrong_answer_has_a_finite_loss() -> None:
    amounts = scoring.of_label(answer_of([1.0, 0.0, 0.0]), 2)
    assert amounts["log_loss", "1.000"] == pytest.approx(-math.log(1e-300))
    assert amounts["brier", "1.000"] == 2


def test_coverage_and_abstentions_are_counted_per_level_and_bin(replicas: list[Replica]) -> None:
    adapter = uuid.uuid4().hex
    one = answer_of([0.5, 0.3, 0.2], abstain=True, prediction_set={"labels": ["red", "green"], "coverage": 0.9})
    ids = replicas[0].record(adapter, [one, one, answer_of([0.5, 0.3, 0.2])])
    replicas[0].feedback((ids[0], "green"), (ids[1], "blue"), (ids[2], "blue"))
    found = replicas[0].counters(adapter)
    assert found["scalabl_recorded_sets_total", "0.9"] == 2
    assert found["scalabl_recorded_set_choices_total", "0.9"] == 4
    assert found["scalabl_outcomes_sets_total", "0.9"] == 2
    assert found["scalabl_outcomes_covered_total", "0.9"] == 1
    assert found["scalabl_recorded_abstentions_total", "0.533"] == 2
    assert found["scalabl_outcomes_abstained_total", "0.533"] == 2
    assert found["scalabl_outcomes_abstained_correct_total", "0.533"] == 0


def test_every_series_is_there_from_the_start() -> None:
    """Both sides of each subtraction exist: PromQL drops series that are missing on one side."""
    collector = TotalsCollector()
    registry = CollectorRegistry()
    registry.register(collector)
    collector.show("a")
    assert list(collector.collect()) == []  # the totals are not known yet
    collector.replace({})
    families = {family.name: family for family in collector.collect()}
    assert set(families) == {
        family.metric + suffix
        for family in scoring.FAMILIES.values()
        for suffix in (["", "_retracted"] if family.of_labels else [""])
    }
    assert [sample.value for sample in families["scalabl_outcomes_retracted"].samples] == [0] * 15


def test_one_request_of_a_group_that_is_refused_leaves_the_others(replicas: list[Replica]) -> None:
    (name,) = replicas[0].record("group", [answer_of([0.5, 0.3, 0.2])])
    good, bad, read = Feedback([(name, "red")]), Feedback([(name, "red"), (name, "mauve")]), LookUp(name)
    for operation in (bad, good, read):
        replicas[0].writer.submit(operation)
    assert good.done.result(10) == ["recorded"]
    with pytest.raises(Refusal, match="mauve"):
        bad.done.result(10)
    stored = read.done.result(10)
    assert stored is not None
    assert [label for label, _ in stored.labels] == ["red"]
