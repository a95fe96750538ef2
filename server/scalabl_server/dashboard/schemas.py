"""The JSON of `/v1/dashboard`. The numbers are computed in `summaries`."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from scalabl.config import DoubtName


class Share(BaseModel):
    """`count` of `total` as a share, with its 95% Wilson interval; null if `total` is 0."""

    count: int
    total: int
    share: float | None
    low: float | None
    high: float | None


class ReliabilityBin(BaseModel):
    """Labelled predictions with a confidence above `low` and at most `high`. The first bin includes 0."""

    low: float
    high: float
    confidence: float | None = Field(description="Mean confidence of these predictions.")
    accuracy: Share


class SetCoverage(BaseModel):
    """How often the prediction set of a nominal coverage contained the true answer."""

    coverage: float
    covered: Share


class Outside(BaseModel):
    """How often none of the choices was the true answer (label null), over labelled predictions."""

    abstained: Share = Field(description="Of the predictions with abstention.")
    answered: Share = Field(description="Of the others.")


class Reliability(BaseModel):
    """Accuracy compared with confidence, over labelled predictions. Scores are null if there are none.

    A prediction with the label null (none of the choices) is wrong, and not in `log_loss`.
    """

    accuracy: Share
    outside: Outside
    ece: float | None = Field(description="Expected calibration error over the bins.")
    brier: float | None = Field(description="Mean Brier score, over all choices.")
    log_loss: float | None = Field(description="Mean log loss, in nats, over labels that are one of the choices.")
    bins: list[ReliabilityBin]
    sets: list[SetCoverage]


class Totals(BaseModel):
    """Counts of all predictions of the adapter, over all replicas and all time."""

    predictions: int
    abstained: Share
    set_sizes: dict[str, float] = Field(description="Mean number of choices in the prediction sets, by nominal coverage.")
    reliability: Reliability


class Mark(BaseModel):
    """A quantile of the calibration set, and the share of recent predictions above it."""

    probability: float
    value: float
    expected: float = Field(description="The share above it that is expected if inputs are like the calibration set.")
    above: Share


class MutualInformation(BaseModel):
    """Mutual information, in nats, of the newest predictions, and of the calibration set if the adapter has a calibration.

    With a calibration, only predictions made with the samples and method of the calibration are compared; `left_out` is
    the number of the other predictions.
    """

    count: int
    left_out: int
    oldest: datetime | None
    newest: datetime | None
    edges: list[float]
    counts: list[int] = Field(
        description="Predictions below the first edge, between neighbouring edges, and above the last edge."
    )
    quantiles: dict[str, float] = Field(description="Quantiles of these predictions; empty if there are none.")
    calibration: dict[str, float] | None = Field(description="Quantiles of the calibration set; null without a calibration.")
    calibration_rows: int | None
    marks: list[Mark]


class RiskPoint(BaseModel):
    """The result of answering only predictions whose doubt score is at most `doubt`."""

    doubt: float
    coverage: float = Field(description="The share of predictions that are answered.")
    wrong: Share = Field(description="The wrong answers among the answered.")


class Rule(BaseModel):
    """The result of the adapter's own abstention rule."""

    answered: Share
    wrong: Share


class RiskCoverage(BaseModel):
    """Risk-coverage curves of the newest labelled predictions: the least doubtful are answered first."""

    count: int
    score: DoubtName = Field(description="The doubt score of the adapter's abstention rule, or entropy.")
    curves: dict[DoubtName, list[RiskPoint]] = Field(
        description="A curve per doubt score; `confidence` means one minus the confidence."
    )
    rule: Rule | None = Field(description="Over predictions that could abstain; null if none could.")


class Doubtful(BaseModel):
    """A prediction that deserves a look. `/predictions/{id}` returns it in full."""

    id: str
    created_at: datetime
    prediction: str
    confidence: float
    entropy: float
    mutual_information: float
    abstain: bool | None
    labelled: bool
    set_labels: list[str] | None = Field(description="The first choices of its prediction set.")
    set_size: int | None
    label: str | None = Field(description="The latest label; null for none of the choices, or if `labelled` is false.")
    input: str | None = Field(description="The beginning of the input, if the server stores inputs.")


class Stored(BaseModel):
    """What the database contains about one adapter."""

    totals: Totals
    recent: Reliability = Field(description="Reliability over the newest labelled predictions.")
    mutual_information: MutualInformation
    risk_coverage: RiskCoverage
    abstains: bool = Field(description="Whether any of the newest predictions could abstain.")
    doubtful: list[Doubtful] = Field(
        description="The newest abstentions or, if none could abstain, the recent predictions with the largest entropy."
    )


class Dashboard(BaseModel):
    """The dashboard's data about one adapter."""

    adapter: str
    stored: Stored | None = Field(description="Null if this server stores no predictions.")
