"""What a prediction and its label add to the calibration counters. Pure functions of the stored answer; no database.

A label may say that none of the choices was the true answer. Such a prediction is wrong, whatever it predicted. The choices
together have probability 1, so the answer gave this truth probability 0: its Brier score is the sum of the squared
probabilities plus 1, no prediction set contains it, and its log loss would be infinite, so it has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

BINS = 15  # confidence bins of equal width that include their upper edge, as in `scalabl.evaluation.scoring.bins_of`
UPPER_EDGES = tuple(f"{n / BINS:.3f}" for n in range(1, BINS + 1))

Answer = Mapping[str, Any]
Amounts = dict[tuple[str, str], float]  # (name in FAMILIES, bin or level) -> the amount added


@dataclass(frozen=True)
class Family:
    """A counter with one label beside `adapter`.

    Attributes:
        metric: its name in Prometheus, without `_total`.
        text: its help text.
        label: whether it is counted per bin of confidence or per nominal coverage of a prediction set.
        of_labels: whether labels are counted, so that a correction must retract the old label.
    """

    metric: str
    text: str
    label: Literal["bin", "level"] = "bin"
    of_labels: bool = False


FAMILIES: dict[str, Family] = {
    "predictions": Family("scalabl_recorded_predictions", "Stored predictions."),
    "confidence": Family("scalabl_recorded_confidence", "Sum of the confidence of stored predictions."),
    "abstentions": Family("scalabl_recorded_abstentions", "Stored predictions with abstention."),
    "sets": Family("scalabl_recorded_sets", "Stored predictions that have a prediction set of this level.", "level"),
    "set_choices": Family(
        "scalabl_recorded_set_choices", "Sum of the sizes (numbers of choices) of these prediction sets.", "level"
    ),
    "outcomes": Family("scalabl_outcomes", "Labels received.", of_labels=True),
    "correct": Family("scalabl_outcomes_correct", "Labels that equal the prediction.", of_labels=True),
    "labelled_confidence": Family(
        "scalabl_outcomes_confidence", "Sum of the confidence of labelled predictions.", of_labels=True
    ),
    "brier": Family(
        "scalabl_outcomes_brier", "Sum of the Brier scores (over all choices) of labelled predictions.", of_labels=True
    ),
    "log_loss": Family(
        "scalabl_outcomes_log_loss_nats",
        "Sum of the log losses, in nats, of predictions whose label is one of their choices.",
        of_labels=True,
    ),
    "outside": Family(
        "scalabl_outcomes_outside", "Labels null: none of the prediction's choices is the true answer.", of_labels=True
    ),
    "abstained": Family("scalabl_outcomes_abstained", "Labels of predictions with abstention.", of_labels=True),
    "abstained_correct": Family(
        "scalabl_outcomes_abstained_correct",
        "Labels that equal the prediction, of predictions with abstention.",
        of_labels=True,
    ),
    "abstained_outside": Family(
        "scalabl_outcomes_abstained_outside", "Labels null, of predictions with abstention.", of_labels=True
    ),
    "labelled_sets": Family(
        "scalabl_outcomes_sets", "Labels of predictions that have a prediction set of this level.", "level", True
    ),
    "covered": Family("scalabl_outcomes_covered", "Labels that are in the prediction set of this level.", "level", True),
    "sets_outside": Family(
        "scalabl_outcomes_sets_outside",
        "Labels null, of predictions that have a prediction set of this level. They are in no set.",
        "level",
        True,
    ),
}
RETRACTED = "_retracted"
NONE = -1  # the index that stands for a label outside the choices


def bin_of(confidence: float) -> str:
    """The upper edge of the bin of a confidence. Bin n holds confidences above (n-1)/15, at most n/15; the first also 0."""
    return UPPER_EDGES[min(max(math.ceil(confidence * BINS) - 1, 0), BINS - 1)]


def choices_of(answer: Answer) -> list[str]:
    """The choices of an answer, which are the possible labels, beside none of them."""
    return list(answer["probabilities"])


def label_of(answer: Answer, index: int) -> str | None:
    """The label that an index stands for: a choice, or None for none of the choices."""
    return None if index == NONE else choices_of(answer)[index]


def sets_of(answer: Answer) -> dict[str, list[str]]:
    """Nominal coverage -> the choices in the prediction set of that level."""
    prediction_set = answer.get("prediction_set")
    return {} if prediction_set is None else {f"{prediction_set['coverage']:g}": list(prediction_set["labels"])}


def of_prediction(answer: Answer) -> Amounts:
    """What a stored prediction adds to the counters."""
    edge = bin_of(answer["confidence"])
    amounts: Amounts = {("predictions", edge): 1.0, ("confidence", edge): answer["confidence"]}
    if answer.get("abstain"):
        amounts["abstentions", edge] = 1.0
    for level, members in sets_of(answer).items():
        amounts["sets", level] = 1.0
        amounts["set_choices", level] = float(len(members))
    return amounts


def of_label(answer: Answer, label: int) -> Amounts:
    """What a label adds to the counters, and its correction retracts. `label` is the index of a choice, or `NONE`.

    The Brier score (Brier 1950) is the sum, over all possible truths, of (probability - whether it is the truth) squared.
    "None of the choices" is one of these truths, with probability 0.
    """
    edge = bin_of(answer["confidence"])
    probabilities = list(answer["probabilities"].values())
    squares = [(p - (index == label)) ** 2 for index, p in enumerate(probabilities)]
    amounts: Amounts = {("outcomes", edge): 1.0, ("labelled_confidence", edge): answer["confidence"]}
    amounts["brier", edge] = math.fsum([*squares, float(label == NONE)])
    if label == NONE:
        amounts["outside", edge] = 1.0
    else:  # rounding may leave p above 1
        amounts["log_loss", edge] = max(0.0, -math.log(max(probabilities[label], 1e-300)))
    correct = label == answer["index"]
    if correct:
        amounts["correct", edge] = 1.0
    if answer.get("abstain"):
        amounts["abstained", edge] = 1.0
        if correct:
            amounts["abstained_correct", edge] = 1.0
        if label == NONE:
            amounts["abstained_outside", edge] = 1.0
    for level, members in sets_of(answer).items():
        amounts["labelled_sets", level] = 1.0
        if label == NONE:
            amounts["sets_outside", level] = 1.0
        elif choices_of(answer)[label] in members:
            amounts["covered", level] = 1.0
    return amounts


def retraction(amounts: Amounts) -> Amounts:
    """The same amounts, for the counters of retracted labels, which PromQL subtracts."""
    return {(name + RETRACTED, key): amount for (name, key), amount in amounts.items()}
