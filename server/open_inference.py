"""The Open Inference Protocol, version 2, beside `/predict`: JSON tensors for clients of KServe and Triton.

An adapter is a model here. `infer` becomes a request as `/predict` takes it and goes the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers

from scalabl import __version__
from server.auth import KeyRing
from server.guard import documented, route_class
from server.problems import ProblemError, field_errors
from server.schemas import Prediction, PredictRequest
from server.service import UNAVAILABLE, Service

VERSION = "1"
BINARY = (
    "this server speaks JSON tensors only and not the binary-data extension; with Triton's client pass binary_data=False to "
    "set_data_from_numpy and to InferRequestedOutput, and name the outputs"
)
# Names of /predict's fields that a request gives as parameters.
PARAMETERS = ("num_samples", "seed", "method", "truncate")

DataType = Literal["BYTES", "INT64", "FP64"]
Parameter = str | bool | int | float | list[str]
Name = Annotated[str, Field(max_length=256)]

# name -> (datatype, its value for one prediction)
OUTPUTS: dict[str, tuple[DataType, Callable[[Prediction], Any]]] = {
    "prediction": ("BYTES", lambda p: p.prediction),
    "index": ("INT64", lambda p: p.index),
    "probabilities": ("FP64", lambda p: list(p.probabilities.values())),
    "confidence": ("FP64", lambda p: p.confidence),
    "entropy": ("FP64", lambda p: p.entropy),
    "expected_entropy": ("FP64", lambda p: p.expected_entropy),
    "mutual_information": ("FP64", lambda p: p.mutual_information),
    "prediction_id": ("BYTES", lambda p: p.id),
}


class InferError(BaseModel):
    """The protocol's form of an error."""

    error: str


class InputTensor(BaseModel):
    """A tensor of strings, nested by its shape or flat in row-major order."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=2)]
    datatype: Name
    parameters: dict[str, Parameter] | None = None
    data: list[Any]


class RequestedOutput(BaseModel):
    """An output to return."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    parameters: dict[str, Parameter] | None = None


class InferRequest(BaseModel):
    """`text`: BYTES [N]; for multiple choice also `choices`: BYTES [C] or [N, C], a row's end filled with empty strings."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["how do i move money"]}]}]
        },
    )

    id: Name | None = None
    parameters: dict[str, Parameter] | None = Field(
        default=None, description=f"{', '.join(PARAMETERS)} as in /predict; choices as a list or as the JSON of one."
    )
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=2)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=64)] | None = Field(
        default=None, description=f"Default: all of {', '.join(OUTPUTS)}."
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


def build_router(service: Service, keys: KeyRing) -> APIRouter:
    """The protocol's routes over one service."""
    form: dict[str, Any] = {"model": InferError, "media_type": "application/json"}
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], route_class=route_class(keys, _no_binary, **form))
    guarded = keys.guards

    def errors(*slugs: str) -> dict[int | str, dict[str, Any]]:
        return documented(*slugs, **form)

    @router.get("", dependencies=guarded)
    async def server_metadata() -> ServerMetadata:
        """Name, version and extensions, of which there are none."""
        return ServerMetadata(name="scalabl", version=__version__, extensions=[])

    @router.get("/health/live", responses=errors("failed"))
    async def server_live() -> Live:
        """As /health/live."""
        if service.state == "failed":
            raise ProblemError("failed", UNAVAILABLE["failed"])
        return Live(live=True)

    @router.get("/health/ready", responses=errors("starting"))
    async def server_ready() -> Ready:
        """As /health/ready."""
        if service.state != "ready":
            raise ProblemError(service.state, UNAVAILABLE[service.state])
        return Ready(ready=True)

    @router.get("/models/{name}", dependencies=guarded, responses=errors("unknown-adapter", "starting"))
    @router.get("/models/{name}/versions/{version}", dependencies=guarded, responses=errors("unknown-adapter", "starting"))
    async def model_metadata(name: str, version: str = VERSION) -> ModelMetadata:
        """The tensors that an adapter takes and gives."""
        task, choices = _task(service, name, version)
        inputs = [TensorMetadata(name="text", datatype="BYTES", shape=[-1])]
        if task == "multiple_choice":
            inputs.append(TensorMetadata(name="choices", datatype="BYTES", shape=[-1, -1]))
        width = -1 if task == "multiple_choice" else len(choices)
        return ModelMetadata(
            name=name,
            versions=[VERSION],
            platform="scalabl",
            inputs=inputs,
            outputs=[
                TensorMetadata(name=output, datatype=datatype, shape=[-1, width] if output == "probabilities" else [-1])
                for output, (datatype, _) in OUTPUTS.items()
            ],
            parameters={"task": task} | ({"choices": choices} if task == "classification" else {}),
        )

    @router.get("/models/{name}/ready", dependencies=guarded, responses=errors("unknown-adapter", "starting"))
    @router.get(
        "/models/{name}/versions/{version}/ready", dependencies=guarded, responses=errors("unknown-adapter", "starting")
    )
    async def model_ready(name: str, version: str = VERSION) -> ModelReady:
        """200 while an adapter takes requests."""
        _task(service, name, version)
        return ModelReady(name=name, ready=True)

    answers = errors("unknown-adapter", "invalid-field", "input-too-large", "queue-full", "starting", "deadline-exceeded")

    @router.post("/models/{name}/infer", dependencies=guarded, responses=answers, response_model_exclude_none=True)
    @router.post(
        "/models/{name}/versions/{version}/infer",
        dependencies=guarded,
        responses=answers,
        response_model_exclude_none=True,
    )
    async def infer(name: str, request: InferRequest, version: str = VERSION) -> InferResponse:
        """What /predict answers, as tensors."""
        _task(service, name, version)
        wanted = _wanted(request)
        response = await service.predict(_as_predict(name, request))
        return InferResponse(
            model_name=name,
            model_version=VERSION,
            id=request.id,
            outputs=[_output(output, response.predictions) for output in wanted],
        )

    return router


def _no_binary(headers: Headers) -> None:
    if "inference-header-content-length" in headers:
        raise ProblemError("unsupported-media-type", BINARY)


def _task(service: Service, name: str, version: str) -> tuple[str, list[str]]:
    """Kind and choices of a loaded adapter.

    Raises:
        ProblemError: there is no such adapter or version, or none yet.
    """
    adapter = service.info().adapter
    if name != adapter.name:
        raise ProblemError("unknown-adapter", f"model {name!r} is not loaded; this server has {adapter.name!r}")
    if version != VERSION:
        raise ProblemError("unknown-adapter", f"model {name!r} has no version {version!r}; its only version is {VERSION!r}")
    return adapter.task, adapter.choices


def _wanted(request: InferRequest) -> list[str]:
    """The names of the outputs, after a look for what asks for binary data."""
    parameters = request.parameters or {}
    tensors: Sequence[InputTensor | RequestedOutput] = [*request.inputs, *(request.outputs or [])]
    asked = [parameters.get("binary_data_output")]
    for tensor in tensors:
        given = tensor.parameters or {}
        asked += [given.get("binary_data"), given.get("binary_data_size")]
        unknown = sorted(given.keys() - {"binary_data", "binary_data_size"})
        if unknown:
            raise ProblemError("invalid-field", f"{tensor.name}: parameters: {unknown[0]!r} is not one this server knows")
    if any(each is not None and each is not False for each in asked):
        raise ProblemError("invalid-field", BINARY)
    if not request.outputs:
        return list(OUTPUTS)
    names = [output.name for output in request.outputs]
    for position, name in enumerate(names):
        if name not in OUTPUTS:
            raise ProblemError("invalid-field", f"outputs.{position}: {name!r} is not one of {', '.join(OUTPUTS)}")
        if name in names[:position]:
            raise ProblemError("invalid-field", f"outputs.{position}: {name!r} is asked for twice")
    return names


def _as_predict(name: str, request: InferRequest) -> PredictRequest:
    """The same request as `/predict` takes it."""
    fields: dict[str, Any] = {"adapter": name}
    for parameter, value in (request.parameters or {}).items():
        if parameter in PARAMETERS:
            fields[parameter] = value
        elif parameter == "choices":
            fields["choices"] = _listed(value)
        elif parameter != "binary_data_output":
            known = ", ".join((*PARAMETERS, "choices"))
            raise ProblemError("invalid-field", f"parameters: {parameter!r} is not one of {known}")
    for tensor in request.inputs:
        values = _strings(tensor)
        if tensor.name == "text" and "inputs" not in fields:
            if len(tensor.shape) == 2 and tensor.shape[1] != 1:
                raise ProblemError("invalid-field", f"text: shape {tensor.shape} is neither [N] nor [N, 1]")
            fields["inputs"] = values
        elif tensor.name == "choices" and "choices" not in fields:
            width = tensor.shape[-1]
            rows = [_unfilled(values[start : start + width]) for start in range(0, len(values), width)]
            fields["choices"] = rows if len(tensor.shape) == 2 else values
        else:
            raise ProblemError("invalid-field", f"inputs: {tensor.name!r} is neither 'text' nor 'choices', or given twice")
    try:
        return PredictRequest(**fields)
    except ValidationError as error:
        raise ProblemError("invalid-field", field_errors(error.errors())) from None


def _listed(value: Parameter) -> Any:
    """`choices` as a parameter: a list, or a string that is the JSON of one, since the protocol's parameters are scalars."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ProblemError("invalid-field", "parameters: choices is not the JSON of a list of strings") from None
    return value


def _unfilled(row: list[str]) -> list[str]:
    while row and not row[-1]:
        row = row[:-1]
    return row


def _strings(tensor: InputTensor) -> list[str]:
    """The elements in row-major order, after checking them against datatype and shape."""
    if tensor.datatype != "BYTES":
        raise ProblemError("invalid-field", f"{tensor.name}: datatype {tensor.datatype!r} is not BYTES")
    values: list[str] = []
    for element in _elements(tensor.data, len(tensor.shape)):
        if not isinstance(element, str):
            raise ProblemError("invalid-field", f"{tensor.name}: data.{len(values)} is not a string")
        values.append(element)
    if not values:
        raise ProblemError("invalid-field", f"{tensor.name}: the tensor is empty; send at least one string")
    size = 1
    for each in tensor.shape:
        size *= each
    if size != len(values):
        raise ProblemError("invalid-field", f"{tensor.name}: shape {tensor.shape} holds {size} and data has {len(values)}")
    return values


def _elements(data: list[Any], depth: int) -> Iterator[Any]:
    for each in data:
        if isinstance(each, list) and depth > 1:
            yield from _elements(each, depth - 1)
        else:
            yield each


def _output(name: str, predictions: Sequence[Prediction]) -> OutputTensor:
    datatype, value = OUTPUTS[name]
    values = [value(prediction) for prediction in predictions]
    shape = [len(values)]
    if name == "probabilities":  # rows of fewer choices are filled with zeros
        width = max(map(len, values))
        shape.append(width)
        values = [p for row in values for p in row + [0.0] * (width - len(row))]
    return OutputTensor(name=name, shape=shape, datatype=datatype, data=values)
