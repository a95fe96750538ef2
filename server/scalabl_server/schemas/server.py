"""The JSON of `/info` and `/health`: what the server says of itself."""

from __future__ import annotations

from pydantic import BaseModel, Field

from scalabl.config import Calibration
from scalabl.evaluation.precision_change import QuantizationChange


class Health(BaseModel):
    """`status` is ok; a server that is not says why in an error."""

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
