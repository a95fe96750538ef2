"""The JSON schemas of `/info` and `/health`."""

from __future__ import annotations

from pydantic import BaseModel, Field

from scalabl.config import Calibration, Novelty
from scalabl.evaluation.precision_change import QuantizationChange


class Health(BaseModel):
    """`status` is always ok. A server that is not healthy answers with an error that gives the reason."""

    status: str


class ModelInfo(BaseModel):
    """The base model."""

    name: str
    architecture: str
    dtype: str
    device: str
    quantization: str | None = Field(description="Quantization of the linear layers; null if they are not quantized.")


class AdapterInfo(BaseModel):
    """An adapter and its task."""

    name: str
    r: int
    lora_alpha: float
    members: int = Field(description="Members of a mixture posterior; 1 if it is no mixture.")
    adapted_layers: int
    stochastic_parameters: int = Field(description="Of all members together.")
    additional_parameters: int
    posterior_scale: float
    relative_spread: float = Field(description="Median of scale * sigma / |mu|. Above 0.5, linearized answers are biased.")
    temperature: float
    task: str
    choices: list[str]
    calibration: Calibration | None = Field(
        description="Thresholds that `scalabl calibrate` computed, and the draws that it used."
    )
    novelty: Novelty | None = Field(
        description="How the adapter's novelty reference was made, with the level at which inputs are called novel; null "
        "without one, or if the engine is vLLM."
    )
    quantization_change: QuantizationChange | None = Field(
        description=(
            "How much the base model's quantization changed this adapter's answers, measured at start-up; null without "
            "quantization, or if the adapter was loaded later."
        )
    )


class Info(BaseModel):
    """The loaded model and adapters, the defaults for request fields, and the limits on requests."""

    version: str
    model: ModelInfo
    adapter: AdapterInfo | None = Field(description="The default adapter; null if it was unloaded.")
    adapters: list[AdapterInfo] = Field(description="All loaded adapters, sorted by name.")
    defaults: dict[str, int | str]
    limits: dict[str, int | float]
