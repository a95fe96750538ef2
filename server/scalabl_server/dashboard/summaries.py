"""Computes the dashboard's numbers from an adapter's stored predictions. Pure functions; the page draws the numbers."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import get_args

from scalabl.config import Calibration, DoubtName
from scalabl_server.dashboard.schemas import (
    Doubtful,
    Mark,
    MutualInformation,
    Outside,
    Reliability,
    ReliabilityBin,
    RiskCoverage,
    RiskPoint,
    Rule,
    SetCoverage,
    Share,
    Stored,
    Totals,
)
from scalabl_server.outcomes import scoring
from scalabl_server.outcomes.scoring import BINS, UPPER_EDGES, Amounts
from scalabl_server.outcomes.survey import Seen, Survey
from scalabl_server.text import shortened

Z = 1.959963984540054  # the normal distribution's 97.5% quantile
EDGES = tuple(10 ** (n / 4) for n in range(-20, 5))  # nats: 1e-5 to 10
QUANTILES = (0.05, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99)
MARKS = ("0.5", "0.9", "0.95", "0.99")
MOST_POINTS = 60  # of a risk-coverage curve
MOST_SHOWN, LONGEST_SHOWN = 5, 200  # labels of a set; characters of a text


def share(count: float, total: float) -> Share:
    """A share with its 95% Wilson interval (Wilson 1927), which stays within [0, 1] and is reliable for few trials too."""
    count, total = round(count), round(total)
    if total <= 0:
        return Share(count=0, total=0, share=None, low=None, high=None)
    p, z2 = count / total, Z * Z / total
    middle, half = p + z2 / 2, Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    low, high = (middle - half) / (1 + z2), (middle + half) / (1 + z2)
    # For a share of 0 or 1 the interval reaches exactly 0 or 1; rounding could make it miss.
    return Share(count=count, total=total, share=p, low=low if count else 0.0, high=high if count < total else 1.0)


def reliability(amounts: Amounts) -> Reliability:
    """Reliability from the summed amounts of labels (`scoring.of_label`)."""
    bins, gap = [], 0.0
    for index, edge in enumerate(UPPER_EDGES):
        labels, correct, confidence = (
            amounts.get((name, edge), 0.0) for name in ("outcomes", "correct", "labelled_confidence")
        )
        gap += abs(correct - confidence)
        bins.append(
            ReliabilityBin(
                low=index / BINS,
                high=(index + 1) / BINS,
                confidence=confidence / labels if labels > 0 else None,
                accuracy=share(correct, labels),
            )
        )
    labels, outside = _sum(amounts, "outcomes"), _sum(amounts, "outside")
    abstained, abstained_outside = _sum(amounts, "abstained"), _sum(amounts, "abstained_outside")
    scored = round(labels - outside)  # labels that have a log loss
    levels = sorted(key for name, key in amounts if name == "labelled_sets")
    sets = [(level, share(amounts.get(("covered", level), 0.0), amounts["labelled_sets", level])) for level in levels]
    return Reliability(
        accuracy=share(_sum(amounts, "correct"), labels),
        outside=Outside(
            abstained=share(abstained_outside, abstained),
            answered=share(outside - abstained_outside, labels - abstained),
        ),
        ece=gap / labels if labels > 0 else None,
        brier=_sum(amounts, "brier") / labels if labels > 0 else None,
        log_loss=_sum(amounts, "log_loss") / scored if scored > 0 else None,
        bins=bins,
        sets=[SetCoverage(coverage=float(level), covered=covered) for level, covered in sets if covered.total],
    )


def totals(amounts: Amounts) -> Totals:
    """Totals from the summed amounts of all replicas."""
    predictions = _sum(amounts, "predictions")
    sets = {key: count for (name, key), count in amounts.items() if name == "sets" and count}
    return Totals(
        predictions=round(predictions),
        abstained=share(_sum(amounts, "abstentions"), predictions),
        set_sizes={key: amounts.get(("set_choices", key), 0.0) / sets[key] for key in sorted(sets)},
        reliability=reliability(amounts),
    )


def mutual_information(recent: Sequence[Seen], calibration: Calibration | None) -> MutualInformation:
    """Mutual information of the predictions that can be compared with the calibration set. `recent` is newest first."""
    compared = (
        recent
        if calibration is None
        else [prediction for prediction in recent if prediction.answer.get("prediction_set") is not None]
    )
    values = sorted(prediction.answer["mutual_information"] for prediction in compared)
    counts = [0] * (len(EDGES) + 1)
    for value in values:
        counts[bisect.bisect_right(EDGES, value)] += 1
    reference = None if calibration is None else calibration.quantiles.get("mutual_information")
    return MutualInformation(
        count=len(values),
        left_out=len(recent) - len(compared),
        oldest=_time(compared[-1]) if compared else None,
        newest=_time(compared[0]) if compared else None,
        edges=list(EDGES),
        counts=counts,
        quantiles={f"{q:g}": _quantile(values, q) for q in QUANTILES} if values else {},
        calibration=reference,
        calibration_rows=calibration.data.threshold_rows if calibration is not None else None,
        marks=[
            Mark(
                probability=float(name),
                value=reference[name],
                expected=1 - float(name),
                above=share(len(values) - bisect.bisect_right(values, reference[name]), len(values)),
            )
            for name in MARKS
            if reference is not None and name in reference
        ],
    )


def risk_coverage(labelled: Sequence[Seen], calibration: Calibration | None) -> RiskCoverage:
    """Risk-coverage curves, one per doubt score. Predictions with the same doubt are answered together."""
    rule = calibration.abstain if calibration is not None else None
    could_abstain = [prediction for prediction in labelled if prediction.answer.get("abstain") is not None]
    answered = [prediction for prediction in could_abstain if not prediction.answer["abstain"]]
    return RiskCoverage(
        count=len(labelled),
        score=rule.score if rule is not None else "entropy",
        curves={
            name: _curve([(_doubt(prediction, name), _wrong(prediction)) for prediction in labelled])
            for name in get_args(DoubtName)
        },
        rule=Rule(answered=share(len(answered), len(could_abstain)), wrong=share(sum(map(_wrong, answered)), len(answered)))
        if could_abstain
        else None,
    )


def stored(survey: Survey, calibration: Calibration | None) -> Stored:
    """Everything that the page shows about an adapter."""
    return Stored(
        totals=totals(survey.amounts),
        recent=reliability(_amounts_of(survey.labelled)),
        mutual_information=mutual_information(survey.recent, calibration),
        risk_coverage=risk_coverage(survey.labelled, calibration),
        abstains=survey.abstains,
        doubtful=[_doubtful(prediction) for prediction in survey.doubtful],
    )


def _amounts_of(labelled: Sequence[Seen]) -> Amounts:
    amounts: Amounts = {}
    for prediction in labelled:
        assert prediction.label is not None  # all of `labelled` have a label
        for key, amount in scoring.of_label(prediction.answer, prediction.label).items():
            amounts[key] = amounts.get(key, 0.0) + amount
    return amounts


def _curve(pairs: list[tuple[float, bool]]) -> list[RiskPoint]:
    points, answered, wrong = [], 0, 0
    for doubt, group in itertools.groupby(sorted(pairs), key=lambda pair: pair[0]):
        misses = [miss for _, miss in group]
        answered, wrong = answered + len(misses), wrong + sum(misses)
        points.append(RiskPoint(doubt=doubt, coverage=answered / len(pairs), wrong=share(wrong, answered)))
    step = max(1, math.ceil(len(points) / MOST_POINTS))
    return points[::-1][::step][::-1]  # counted from the end, to keep the last point, which answers everything


def _doubt(seen: Seen, name: DoubtName) -> float:
    value: float = seen.answer[name]
    return 1 - value if name == "confidence" else value


def _wrong(seen: Seen) -> bool:
    predicted: int = seen.answer["index"]
    return seen.label != predicted


def _doubtful(seen: Seen) -> Doubtful:
    answer = seen.answer
    prediction_set = answer.get("prediction_set")
    label = None if seen.label is None else scoring.label_of(answer, seen.label)
    return Doubtful(
        id=seen.id,
        created_at=_time(seen),
        prediction=shortened(answer["prediction"], LONGEST_SHOWN),
        confidence=answer["confidence"],
        entropy=answer["entropy"],
        mutual_information=answer["mutual_information"],
        abstain=answer.get("abstain"),
        set_labels=None
        if prediction_set is None
        else [shortened(label, LONGEST_SHOWN) for label in prediction_set["labels"][:MOST_SHOWN]],
        set_size=None if prediction_set is None else len(prediction_set["labels"]),
        labelled=seen.label is not None,
        label=None if label is None else shortened(label, LONGEST_SHOWN),
        input=None if seen.input is None else shortened(seen.input, LONGEST_SHOWN),
    )


def _quantile(ordered: Sequence[float], q: float) -> float:
    """A quantile with linear interpolation, the default of numpy and torch."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _time(seen: Seen) -> datetime:
    return datetime.fromtimestamp(seen.created_at, UTC)


def _sum(amounts: Amounts, name: str) -> float:
    return math.fsum(value for (family, _), value in amounts.items() if family == name)
