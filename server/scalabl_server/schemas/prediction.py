"""The JSON of `/predict`: what is asked and what is answered."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from scalabl.config import SetMethod
from scalabl.uncertainty.adaptive import Target
from scalabl_server.methods import Method

# A list ends at its first wrong element, so that a large one cannot make a large answer.
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Choices = Annotated[list[str], Field(min_length=2, fail_fast=True)]


class PredictRequest(BaseModel):
    """One text or a list of them; `choices` only for a multiple-choice adapter: one list for all inputs, or one each."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"inputs": "how do i move money to my savings account"}]},
    )

    inputs: str | Texts = Field(description="One text, or a list of texts.")
    choices: Choices | Annotated[list[Choices], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None, description="Multiple choice only: the choices for all inputs, or one list for each."
    )
    num_samples: Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] | None = Field(
        default=None,
        description=(
            "K, the number of posterior samples (default: the server's). auto: for each input as many as what `target` "
            "names needs, at most 64."
        ),
    )
    target: Target | None = Field(
        default=None,
        description=(
            "With num_samples auto, what is to be known well enough: decision (the default), which choice is the most "
            "probable; probabilities; or mutual_information."
        ),
    )
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description=(
            "With num_samples auto: the probability of stopping at another choice than many samples would choose (default: "
            "0.005), or the standard error of the probabilities, or of the mutual information in nats (default: 0.01)."
        ),
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] | None = Field(
        default=None, description="Seed of the draws (default: the server's)."
    )
    coverage: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Coverage of the prediction set, among those calibrated (default: 0.9 or the first)."
    )
    method: Method = Field(
        default="monte_carlo",
        description=(
            "monte_carlo: from num_samples posterior samples. linearized: from the derivatives at their mean. "
            "control_variate: the samples, corrected by what the linearisation says of the same samples."
        ),
    )
    priority: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] = Field(
        default=0,
        description=(
            "Lower means earlier; a step counts as much as a second of waiting. The server bounds it; where its bound is 0, "
            "any priority but 0 is refused."
        ),
    )
    explain: bool = Field(default=False, description="Except by monte_carlo: also each layer's share of the variance.")
    return_samples: bool = Field(default=False, description="Also return each sample's probabilities.")
    truncate: bool = Field(default=False, description="Cut the end of texts that are too long, instead of refusing.")
    adapter: str | None = Field(default=None, description="Name of the adapter (default: the server's default one).")


class StandardError(BaseModel):
    """Monte Carlo standard errors; null where K is too small to tell."""

    probabilities: dict[str, float | None]
    entropy: float | None
    expected_entropy: float | None
    mutual_information: float | None


class PredictionSet(BaseModel):
    """Choices among which the true one is with probability `coverage`, most probable first; the top choice is always in.

    It holds on average over inputs like those that the adapter was calibrated with, for as many samples and such draws.
    """

    labels: list[str]
    coverage: float
    method: SetMethod


class Prediction(BaseModel):
    """What the posterior samples say of one input. Entropies and mutual information are in nats."""

    id: str | None = Field(description="Name of this prediction for /feedback; null when it could not be stored.")
    recorded: bool = Field(description="Whether it is stored, so that its id can be resolved.")
    prediction: str = Field(description="The most probable choice.")
    index: int = Field(description="Its index among the choices.")
    confidence: float = Field(description="Its probability.")
    probabilities: dict[str, float] = Field(description="Mean over samples of each choice's probability.")
    entropy: float = Field(description="Total uncertainty: entropy of the probabilities.")
    expected_entropy: float = Field(description="Aleatoric part: mean over samples of their entropy.")
    mutual_information: float = Field(description="Epistemic part: how much the samples disagree.")
    standard_error: StandardError
    num_samples: int = Field(description="K, where auto was asked for the K it took; 0 for linearized, which draws none.")
    method: str
    prediction_set: PredictionSet | None = Field(description="Null while the adapter is not calibrated.")
    abstain: bool | None = Field(
        description="True: too doubtful to be acted on, for the calibrated risk. Null while the adapter has no threshold."
    )
    layer_shares: dict[str, float] | None = Field(
        default=None, description="Each adapted layer's share of the variance of the probabilities, when explain was set."
    )
    samples: list[dict[str, float]] | None = Field(
        default=None, description="Each posterior sample's probabilities, when return_samples was set."
    )


class Usage(BaseModel):
    """What the request cost: tokens of its prompts, and rows of the passes (its samples, and its linearised choices)."""

    tokens: int
    rows: int


class PredictResponse(BaseModel):
    """The answers, in the order of the inputs."""

    id: str
    model: str
    adapter: str
    predictions: list[Prediction]
    warnings: list[str] | None = Field(default=None, description="What to know of these answers; left out when nothing.")
    usage: Usage
