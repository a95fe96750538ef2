"""The JSON that the dashboard's page draws."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from scalabl.config import DoubtName


class Share(BaseModel):
    """`count` of `total`, as a share with its 95% Wilson interval; null of nothing."""

    count: int
    total: int
    share: float | None
    low: float | None
    high: float | None


class ReliabilityBin(BaseModel):
    """The labelled predictions whose confidence is above `low` and at most `high`; the first bin has 0 too."""

    low: float
    high: float
    confidence: float | None = Field(description="Their mean confidence.")
    accuracy: Share


class SetCoverage(BaseModel):
    """How often the true answer was in the prediction set of one nominal coverage."""

    coverage: float
    covered: Share


class Reliability(BaseModel):
    """Confidence against accuracy, over labelled predictions. Null where there is none."""

    accuracy: Share
    ece: float | None = Field(description="Expected calibration error over the bins.")
    brier: float | None = Field(description="Mean Brier score, over all choices.")
    log_loss: float | None = Field(description="In nats.")
    bins: list[ReliabilityBin]
    sets: list[SetCoverage]


class Totals(BaseModel):
    """Everything that all replicas have stored of the adapter."""

    predictions: int
    abstained: Share
    set_sizes: dict[str, float] = Field(description="Mean number of choices in the prediction sets, by nominal coverage.")
    reliability: Reliability


class Mark(BaseModel):
    """A quantile of the calibration set, and how much of the traffic lies above it."""

    probability: float
    value: float
    expected: float = Field(description="The share above it if the traffic is like the calibration set.")
    above: Share


class MutualInformation(BaseModel):
    """Mutual information, in nats, of the newest predictions, against the calibration set where the adapter has one.

    Then only predictions made as the adapter was calibrated are compared; `left_out` is the number of the others.
    """

    count: int
    left_out: int
    oldest: datetime | None
    newest: datetime | None
    edges: list[float]
    counts: list[int] = Field(description="Below the first edge, between each two, above the last: one more than edges.")
    quantiles: dict[str, float] = Field(description="Of these predictions; empty when there are none.")
    calibration: dict[str, float] | None = Field(description="Of the calibration set; null without a calibration.")
    calibration_rows: int | None
    marks: list[Mark]


class RiskPoint(BaseModel):
    """What happens when only predictions with a doubt of at most `doubt` are answered."""

    doubt: float
    coverage: float = Field(description="The share that is answered.")
    wrong: Share = Field(description="The wrong ones among those.")


class Rule(BaseModel):
    """What the adapter's own abstentions came to."""

    answered: Share
    wrong: Share


class RiskCoverage(BaseModel):
    """The newest labelled predictions, answered from the surest on."""

    count: int
    score: DoubtName = Field(description="The doubt score of the adapter's abstention rule, or entropy.")
    curves: dict[DoubtName, list[RiskPoint]] = Field(description="`confidence` stands for one minus it.")
    rule: Rule | None = Field(description="Over those that could abstain; null when none could.")


class Doubtful(BaseModel):
    """A prediction to look at. `/predictions/{id}` has all of it."""

    id: str
    created_at: datetime
    prediction: str
    confidence: float
    entropy: float
    mutual_information: float
    abstain: bool | None
    set_labels: list[str] | None = Field(description="The first of the choices in its prediction set.")
    set_size: int | None
    label: str | None = Field(description="The latest label.")
    input: str | None = Field(description="The beginning of the text, where the server stores it.")


class Stored(BaseModel):
    """What the database has on one adapter."""

    totals: Totals
    recent: Reliability = Field(description="Over the newest labelled predictions.")
    mutual_information: MutualInformation
    risk_coverage: RiskCoverage
    abstains: bool = Field(description="Whether any of the newest predictions could abstain.")
    doubtful: list[Doubtful] = Field(
        description="The newest abstentions; where none could abstain, the newest predictions of the largest entropy."
    )


class Dashboard(BaseModel):
    """One adapter's uncertainty and what became of it."""

    adapter: str
    stored: Stored | None = Field(description="Null when this server stores no predictions.")
