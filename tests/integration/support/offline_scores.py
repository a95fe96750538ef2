"""What the counters must come to, computed from answers and labels. Asking Prometheus for them is in `prometheus`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 15


def offline_scores(answers: list[dict[str, Any]], labels: Sequence[str | None]) -> dict[str, float]:
    """Counts, means and losses, by numpy, from the answers that a client got and the labels that it sent last.

    The label None (none of the choices) is one more class, with probability 0. It is left out of the log loss.
    """
    choices = list(answers[0]["probabilities"])
    probabilities = np.array([[*(answer["probabilities"][choice] for choice in choices), 0.0] for answer in answers])
    truth = np.array([len(choices) if label is None else choices.index(label) for label in labels])
    inside = truth < len(choices)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == truth
    edges = np.linspace(0, 1, BINS + 1)
    bins = [(low <= confidence) & ((confidence < high) | (high == 1)) for low, high in itertools.pairwise(edges)]
    gaps = [abs(correct[rows].mean() - confidence[rows].mean()) * rows.mean() for rows in bins if rows.any()]
    return {
        "labelled": len(answers),
        "accuracy": float(correct.mean()),
        "ece": float(sum(gaps)),
        "brier": float(((probabilities - np.eye(len(choices) + 1)[truth]) ** 2).sum(1).mean()),
        "log_loss": float(-np.log(probabilities[inside, truth[inside]]).mean()),
        "predictions": len(answers),
        "mean_confidence": float(confidence.mean()),
    }
