"""The Open Inference Protocol's JSON, and how its tensors become a request of `/predict` and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalabl_server.problems import ProblemError
from scalabl_server.schemas.prediction import Prediction, PredictRequest
from scalabl_server.web.errors import invalid_fields

BINARY = (
    "this server speaks JSON tensors only and not the binary-data extension; with Triton's client pass binary_data=False to "
    "set_data_from_numpy and to InferRequestedOutput, and name the outputs"
)

DataType = Literal["BYTES", "INT64", "FP64"]
OutputName = Literal[
    "prediction",
    "index",
    "probabilities",
    "confidence",
    "entropy",
    "expected_entropy",
    "mutual_information",
    "prediction_id",
]
Strings = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Rows = Annotated[list[Strings], Field(min_length=1, fail_fast=True)]

# name -> (datatype, its value for one prediction)
OUTPUTS: dict[OutputName, tuple[DataType, Callable[[Prediction], Any]]] = {
    "prediction": ("BYTES", lambda p: p.prediction),
    "index": ("INT64", lambda p: p.index),
    "probabilities": ("FP64", lambda p: list(p.probabilities.values())),
    "confidence": ("FP64", lambda p: p.confidence),
    "entropy": ("FP64", lambda p: p.entropy),
    "expected_entropy": ("FP64", lambda p: p.expected_entropy),
    "mutual_information": ("FP64", lambda p: p.mutual_information),
    "prediction_id": ("BYTES", lambda p: p.id or ""),  # empty when the prediction was not recorded
}


class InferError(BaseModel):
    """The protocol's form of an error."""

    error: str


class TensorParameters(BaseModel):
    """What the binary-data extension sets; only its absence is understood."""

    model_config = ConfigDict(extra="forbid", strict=True)

    binary_data: bool = False
    binary_data_size: int | None = None


class InputTensor(BaseModel):
    """A tensor of strings, nested by its shape or flat in row-major order."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["text", "choices"]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**31)]], Field(min_length=1, max_length=2)]
    datatype: Literal["BYTES"]
    parameters: TensorParameters | None = None
    data: Strings | Rows | None = None  # absent where the binary-data extension carries it


class RequestedOutput(BaseModel):
    """An output to return."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: OutputName
    parameters: TensorParameters | None = None


class InferParameters(BaseModel):
    """Fields of /predict. `choices` may also be the JSON of a list, since the protocol's parameters are scalars."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_samples: int | None = None
    seed: int | None = None
    method: str | None = None
    priority: int | None = None
    truncate: bool | None = None
    choices: str | Strings | Rows | None = None
    binary_data_output: bool = False


class InferRequest(BaseModel):
    """`text`: BYTES [N]; for multiple choice also `choices`: BYTES [C] or [N, C], a row's end filled with empty strings."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["how do i move money"]}]}]
        },
    )

    id: Annotated[str, Field(max_length=256)] | None = None
    parameters: InferParameters | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=2)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=len(OUTPUTS))] | None = Field(
        default=None, description="Default: all of them."
    )


class OutputTensor(BaseModel):
    """A tensor, flat in row-major order."""

    name: str
    shape: list[int]
    datatype: DataType
    data: list[str] | list[int] | list[float]


class InferResponse(BaseModel):
    """The answers, in the order of the inputs."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    """A tensor that a model takes or gives; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model; `parameters.choices` are what the columns of `probabilities` stand for, where they are fixed."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any]


class ServerMetadata(BaseModel):
    """This server."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """Whether the server lives."""

    live: bool


class Ready(BaseModel):
    """Whether the server takes requests."""

    ready: bool


class ModelReady(BaseModel):
    """Whether a model takes requests."""

    name: str
    ready: bool


def wanted(request: InferRequest) -> list[OutputName]:
    """The names of the outputs, after a look for what asks for binary data.

    Raises:
        ProblemError: `invalid-field`.
    """
    tensors: Sequence[InputTensor | RequestedOutput] = [*request.inputs, *(request.outputs or [])]
    parameters = [tensor.parameters for tensor in tensors if tensor.parameters is not None]
    if (request.parameters is not None and request.parameters.binary_data_output) or any(
        given.binary_data or given.binary_data_size is not None for given in parameters
    ):
        raise ProblemError("invalid-field", BINARY)
    if not request.outputs:
        return list(OUTPUTS)
    names = [output.name for output in request.outputs]
    for position, name in enumerate(names):
        if name in names[:position]:
            raise ProblemError("invalid-field", f"{name!r} is asked for twice", field=f"outputs.{position}")
    return names


def as_predict(adapter: str, request: InferRequest) -> PredictRequest:
    """The same request as `/predict` takes it.

    Raises:
        ProblemError: `invalid-field`.
    """
    fields: dict[str, Any] = {"adapter": adapter}
    if request.parameters is not None:
        fields |= request.parameters.model_dump(exclude_none=True, exclude={"binary_data_output"})
        if isinstance(fields.get("choices"), str):
            fields["choices"] = _listed(fields["choices"])
    for tensor in request.inputs:
        field = "inputs" if tensor.name == "text" else "choices"
        if field in fields:
            raise ProblemError("invalid-field", f"{tensor.name!r} is given twice", field="inputs")
        values = _strings(tensor)
        if tensor.name == "text":
            if len(tensor.shape) == 2 and tensor.shape[1] != 1:
                raise ProblemError("invalid-field", f"shape {tensor.shape} is neither [N] nor [N, 1]", field="text")
            fields["inputs"] = values
        elif len(tensor.shape) == 1:
            fields["choices"] = values
        else:
            width = tensor.shape[1]
            fields["choices"] = [_unfilled(values[start : start + width]) for start in range(0, len(values), width)]
    if "inputs" not in fields:
        raise ProblemError("invalid-field", "there is no tensor 'text'", field="inputs")
    try:
        return PredictRequest(**fields)
    except ValidationError as error:
        raise invalid_fields(error.errors()) from None


def _listed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ProblemError("invalid-field", "choices is not the JSON of a list of strings", field="parameters") from None


def _unfilled(row: list[str]) -> list[str]:
    while row and not row[-1]:
        row = row[:-1]
    return row


def _strings(tensor: InputTensor) -> list[str]:
    """The elements in row-major order, after checking their number against the shape."""
    values: list[str] = []
    for element in tensor.data or []:
        if isinstance(element, str):
            values.append(element)
        else:
            values.extend(element)
    size = 1
    for extent in tensor.shape:
        size *= extent
    if size != len(values):
        raise ProblemError(
            "invalid-field", f"shape {tensor.shape} holds {size} and data has {len(values)}", field=tensor.name
        )
    return values


def output_tensor(name: OutputName, predictions: Sequence[Prediction]) -> OutputTensor:
    """One output of all inputs."""
    datatype, value = OUTPUTS[name]
    values = [value(prediction) for prediction in predictions]
    shape = [len(values)]
    if name == "probabilities":  # rows of fewer choices are filled with zeros
        width = max(map(len, values))
        shape.append(width)
        values = [p for row in values for p in row + [0.0] * (width - len(row))]
    return OutputTensor(name=name, shape=shape, datatype=datatype, data=values)
