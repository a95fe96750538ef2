"""The JSON that goes in and comes out. Field names are the field's terms (design.md, section 1)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from scalabl.config import Calibration, SetMethod
from scalabl.evaluation.precision_change import QuantizationChange
from scalabl.uncertainty.adaptive import Target

# A list ends at its first wrong element, so that a large one cannot make a large answer.
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Choices = Annotated[list[str], Field(min_length=2, fail_fast=True)]


Method = Literal["monte_carlo", "linearized", "control_variate"]


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
    """What the request cost: prompt tokens, rows (inputs x samples) and whether any text was cut."""

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


class Outcome(BaseModel):
    """The true answer to one prediction."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="The prediction's id, as /predict gave it.")
    label: str = Field(description="The true choice, one of those that the prediction had.")


# One outcome or a list of them; told apart by kind, so that an error names the field of the one that was sent.
FeedbackRequest = Annotated[
    Annotated[Outcome, Tag("object[Outcome]")] | Annotated[list[Outcome], Field(min_length=1), Tag("list[Outcome]")],
    Discriminator(lambda body: "list[Outcome]" if isinstance(body, list) else "object[Outcome]"),
]


class OutcomeStatus(BaseModel):
    """What became of one label: stored first, already so, or stored in place of another."""

    id: str
    label: str
    status: Literal["recorded", "unchanged", "corrected"]


class FeedbackResponse(BaseModel):
    """Every label of the request is on disk."""

    results: list[OutcomeStatus]


class LabelAt(BaseModel):
    """A label and when it came."""

    label: str
    labelled_at: datetime


class StoredPrediction(BaseModel):
    """A prediction as it was answered, with its labels; all but the last were corrected."""

    id: str
    model: str
    adapter: str
    created_at: datetime
    prediction: dict[str, Any] = Field(description="The prediction as /predict answered it, without samples.")
    input_hash: str = Field(description="SHA-256 of the input's UTF-8, keyed when the server has a key for it.")
    input: str | None = Field(description="The input itself, where the server stores it.")
    label: str | None = Field(description="The latest label.")
    labels: list[LabelAt]


class Problem(BaseModel):
    """An error as RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str


class Health(BaseModel):
    """`status` is ok, starting, draining or failed."""

    status: str


class ModelInfo(BaseModel):
    """The base model."""

    name: str
    architecture: str
    dtype: str
    device: str
    quantization: str | None = Field(description="Of its linear layers; null when they are in the dtype.")


class AdapterInfo(BaseModel):
    """The adapter and its task."""

    name: str
    r: int
    lora_alpha: float
    adapted_layers: int
    stochastic_parameters: int
    additional_parameters: int
    posterior_scale: float
    relative_spread: float = Field(description="Median of scale * sigma / |mu|; above 0.5 linearized answers are biased.")
    temperature: float
    task: str
    choices: list[str]
    calibration: Calibration | None = Field(description="What `scalabl calibrate` found, and with which draws.")
    quantization_change: QuantizationChange | None = Field(
        description="What the base model's quantization changed at the start; null without, or when loaded later."
    )


class Info(BaseModel):
    """What is loaded, what a request gets when it names nothing, and what it may ask for."""

    version: str
    model: ModelInfo
    adapter: AdapterInfo | None = Field(description="The default adapter; null when it was unloaded.")
    adapters: list[AdapterInfo] = Field(description="Every adapter that is loaded, by name.")
    defaults: dict[str, int | str]
    limits: dict[str, int | float]


class LoadAdapter(BaseModel):
    """An adapter to load. The names of the fields are vLLM's."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(description="Its name in the API.")
    lora_path: str = Field(min_length=1, max_length=4096, description="Its folder, below the server's adapter root.")
    replace: bool = Field(default=False, description="Take the place of a loaded adapter of that name.")


class UnloadAdapter(BaseModel):
    """An adapter to take away."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str


class AdapterNames(BaseModel):
    """The adapters that are loaded now."""

    adapters: list[str]
