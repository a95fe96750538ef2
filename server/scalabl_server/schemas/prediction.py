"""The JSON schemas of `/predict`: the request and the response."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from scalabl.config import SetMethod
from scalabl.uncertainty.adaptive import Target
from scalabl_server.methods import Method

# Validation of a list stops at its first invalid element, so that a large list cannot cause a large error message.
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Choices = Annotated[list[str], Field(min_length=2, fail_fast=True)]


class PredictRequest(BaseModel):
    """One text or a list of texts to predict, and how."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"inputs": "how do i move money to my savings account"}]},
    )

    inputs: str | Texts = Field(description="One text, or a list of texts.")
    choices: Choices | Annotated[list[Choices], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None,
        description=(
            "One list for all inputs, or one list per input. For multiple choice: the choices. For classification: some of "
            "the adapter's own choices, to which the answer is restricted; their probabilities sum to 1."
        ),
    )
    num_samples: Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] | None = Field(
        default=None,
        description=(
            "K, the number of posterior samples (default: the server's setting). With auto, the server draws samples for "
            "each input until `target` is known well enough, at most 64."
        ),
    )
    target: Target | None = Field(
        default=None,
        description=(
            "Only with num_samples auto: the quantity that must be known well enough. decision (the default): which choice "
            "is the most probable; probabilities; or mutual_information."
        ),
    )
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description=(
            "Only with num_samples auto. For the target decision: the probability of stopping with another choice than many "
            "samples would give (default: 0.005). For the other targets: the standard error of the probabilities, or of the "
            "mutual information in nats (default: 0.01)."
        ),
    )
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] | None = Field(
        default=None, description="Seed of the posterior samples (default: the server's setting)."
    )
    coverage: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Coverage of the prediction set; must be a calibrated level (default: 0.9, or the first level).",
    )
    method: Method = Field(
        default="monte_carlo",
        description=(
            "monte_carlo: average over num_samples posterior samples. linearized: no samples, a linear approximation around "
            "the posterior mean. control_variate: posterior samples with the linear approximation as control variate, which "
            "lowers the variance."
        ),
    )
    priority: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] = Field(
        default=0,
        description=(
            "Requests with a lower value run earlier; one step is worth one second of waiting. The server limits the "
            "absolute value; with a limit of 0 it accepts only priority 0."
        ),
    )
    explain: bool = Field(default=False, description="Also return each layer's share of the variance; not with monte_carlo.")
    top_k: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=None,
        description="Return only the probabilities of this many most probable choices, and the sum of the rest as `other`.",
    )
    return_samples: bool = Field(default=False, description="Also return the probabilities of each posterior sample.")
    truncate: bool = Field(default=False, description="Cut off the end of texts that are too long instead of refusing them.")
    adapter: str | None = Field(default=None, description="Name of the adapter (default: the server's default adapter).")


class StandardError(BaseModel):
    """Monte Carlo standard errors; null if there are too few samples to estimate them."""

    probabilities: dict[str, float | None]
    entropy: float | None
    expected_entropy: float | None
    mutual_information: float | None


class PredictionSet(BaseModel):
    """A set of choices that contains the true one with probability `coverage`, the most probable choice first.

    The coverage holds on average over inputs like those of the calibration data. The most probable choice is always in the
    set.
    """

    labels: list[str]
    coverage: float
    method: SetMethod


class Prediction(BaseModel):
    """The prediction for one input, with its uncertainty. Entropies and mutual information are in nats."""

    id: str | None = Field(description="Id of this prediction, for /feedback; null if it could not be stored.")
    recorded: bool = Field(description="Whether the prediction is stored, so that its id can be used.")
    prediction: str = Field(description="The most probable choice.")
    index: int = Field(description="Index of the most probable choice among the choices.")
    confidence: float = Field(description="Probability of the most probable choice.")
    probabilities: dict[str, float] = Field(
        description="Probability of each choice: the mean over the posterior samples. With top_k only of the most probable, "
        "in falling order."
    )
    other: float | None = Field(
        default=None, description="Sum of the probabilities that top_k left out; only if top_k was set."
    )
    entropy: float = Field(description="Total uncertainty: the entropy of the probabilities.")
    expected_entropy: float = Field(description="Aleatoric uncertainty: the mean of the samples' entropies.")
    mutual_information: float = Field(description="Epistemic uncertainty: how much the samples disagree.")
    standard_error: StandardError
    num_samples: int = Field(description="K, the number of samples drawn for this input; 0 for the method linearized.")
    method: str
    prediction_set: PredictionSet | None = Field(
        description="Null if the adapter is not calibrated, or not for the settings of this request."
    )
    abstain: bool | None = Field(
        description="Whether the prediction is too uncertain for the calibrated risk. Null without a calibrated threshold."
    )
    layer_shares: dict[str, float] | None = Field(
        default=None, description="Each adapted layer's share of the variance of the probabilities; only if explain was set."
    )
    samples: list[dict[str, float]] | None = Field(
        default=None, description="Probabilities of each posterior sample; only if return_samples was set."
    )


class Usage(BaseModel):
    """The cost of the request."""

    tokens: int = Field(description="Tokens of all prompts.")
    rows: int = Field(description="Batch rows computed for the request: one per posterior sample and per linearised choice.")


class PredictResponse(BaseModel):
    """The answers, in the order of the inputs."""

    id: str
    model: str
    adapter: str
    predictions: list[Prediction]
    warnings: list[str] | None = Field(default=None, description="Warnings about these answers; absent if there are none.")
    usage: Usage
