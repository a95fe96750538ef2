"""The JSON schemas of the Open Inference Protocol, and the conversion of tensors to `/predict` requests and back.

The protocol says that a server ignores the fields and parameters that it does not know, and its clients rely on that:
KServe's SDK always sends `model_name`, MLServer's codecs send `content_type`, and Triton's client asks for binary outputs
unless told otherwise. So unknown fields and parameters are ignored here, whereas `/predict` refuses them. What is known is
checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalabl_server.problems import ProblemError
from scalabl_server.schemas.prediction import Prediction, PredictRequest
from scalabl_server.web.errors import invalid_fields

BINARY = (
    "this server reads JSON tensors only, not the binary-data extension; with KServe's or Triton's client, pass "
    "binary_data=False to set_data_from_numpy"
)
LENIENT = ConfigDict(extra="ignore", strict=True)

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
    """An error in the form of the protocol."""

    error: str


class TensorParameters(BaseModel):
    """Parameters of an input tensor. `binary_data_size` says that its data is binary, which is refused."""

    model_config = LENIENT

    binary_data_size: int | None = None


class InputTensor(BaseModel):
    """A tensor of strings: nested lists as in its shape, or one flat list in row-major order."""

    model_config = LENIENT

    name: Literal["text", "choices"]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**31)]], Field(min_length=1, max_length=2)]
    datatype: Literal["BYTES"]
    parameters: TensorParameters | None = None
    data: Strings | Rows | None = None  # absent if the binary-data extension is used


class RequestedOutput(BaseModel):
    """An output to return. It is returned in JSON, whatever its parameters ask for."""

    model_config = LENIENT

    name: OutputName


class InferParameters(BaseModel):
    """Fields of /predict. `choices` may also be a list encoded as a JSON string, since the protocol allows only scalars."""

    model_config = LENIENT

    num_samples: int | None = None
    seed: int | None = None
    method: str | None = None
    priority: int | None = None
    truncate: bool | None = None
    choices: str | Strings | Rows | None = None


class InferRequest(BaseModel):
    """The input tensors are `text`, BYTES [N], and for multiple choice `choices`, BYTES [C] or [N, C]. Rows with fewer
    choices are padded with empty strings."""

    model_config = LENIENT | ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["how do i move money"]}]}]
        }
    )

    id: Annotated[str, Field(max_length=256)] | None = None
    parameters: InferParameters | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=2)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=len(OUTPUTS))] | None = Field(
        default=None, description="The outputs to return (default: all)."
    )


class OutputTensor(BaseModel):
    """An output tensor, as a flat list in row-major order."""

    name: str
    shape: list[int]
    datatype: DataType
    data: list[str] | list[int] | list[float]


class InferResponse(BaseModel):
    """The output tensors; their rows are in the order of the inputs."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    """An input or output tensor of a model. In the shape, -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model. `parameters.choices` names the columns of the output `probabilities`, if the choices are fixed."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any]


class ServerMetadata(BaseModel):
    """Name, version and extensions of this server."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """The answer of the liveness check."""

    live: bool


class Ready(BaseModel):
    """The answer of the server's readiness check."""

    ready: bool


class ModelReady(BaseModel):
    """The answer of a model's readiness check."""

    name: str
    ready: bool


def wanted(request: InferRequest) -> list[OutputName]:
    """The names of the requested outputs.

    Raises:
        ProblemError: `invalid-field`, for an output that is named twice.
    """
    if not request.outputs:
        return list(OUTPUTS)
    names = [output.name for output in request.outputs]
    for position, name in enumerate(names):
        if name in names[:position]:
            raise ProblemError(
                "invalid-field", f"the output {name!r} is requested twice; name it once", field=f"outputs.{position}"
            )
    return names


def as_predict(adapter: str, request: InferRequest) -> PredictRequest:
    """Convert the request to one of `/predict`.

    Raises:
        ProblemError: `invalid-field`, also for an input in the form of the binary-data extension.
    """
    fields: dict[str, Any] = {"adapter": adapter}
    if request.parameters is not None:
        fields |= request.parameters.model_dump(exclude_none=True)
        if isinstance(fields.get("choices"), str):
            fields["choices"] = _parse_list(fields["choices"])
    for tensor in request.inputs:
        field = "inputs" if tensor.name == "text" else "choices"
        if field in fields:
            raise ProblemError("invalid-field", f"{tensor.name!r} appears twice; send it once", field="inputs")
        if tensor.parameters is not None and tensor.parameters.binary_data_size is not None:
            raise ProblemError("invalid-field", BINARY, field=tensor.name)
        values = _strings(tensor)
        if tensor.name == "text":
            if len(tensor.shape) == 2 and tensor.shape[1] != 1:
                raise ProblemError("invalid-field", f"shape {tensor.shape} is not allowed; use [N] or [N, 1]", field="text")
            fields["inputs"] = values
        elif len(tensor.shape) == 1:
            fields["choices"] = values
        else:
            width = tensor.shape[1]
            fields["choices"] = [_without_padding(values[start : start + width]) for start in range(0, len(values), width)]
    if "inputs" not in fields:
        raise ProblemError("invalid-field", "the tensor 'text' is missing; send it", field="inputs")
    try:
        return PredictRequest(**fields)
    except ValidationError as error:
        raise invalid_fields(error.errors()) from None


def _parse_list(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ProblemError(
            "invalid-field", "choices is not valid JSON; send a JSON list of strings", field="parameters"
        ) from None


def _without_padding(row: list[str]) -> list[str]:
    while row and not row[-1]:
        row = row[:-1]
    return row


def _strings(tensor: InputTensor) -> list[str]:
    """The elements in row-major order. Their number must match the shape."""
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
            "invalid-field",
            f"shape {tensor.shape} means {size} elements, but data has {len(values)}",
            field=tensor.name,
        )
    return values


def output_tensor(name: OutputName, predictions: Sequence[Prediction]) -> OutputTensor:
    """One output tensor for all predictions."""
    datatype, value = OUTPUTS[name]
    values = [value(prediction) for prediction in predictions]
    shape = [len(values)]
    if name == "probabilities":  # rows with fewer choices are padded with zeros
        width = max(map(len, values))
        shape.append(width)
        values = [p for row in values for p in row + [0.0] * (width - len(row))]
    return OutputTensor(name=name, shape=shape, datatype=datatype, data=values)
