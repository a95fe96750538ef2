"""The routes of the Open Inference Protocol, version 2, for clients of KServe and Triton.

In this protocol an adapter is called a model. An `infer` request is converted to a `/predict` request and answered alike.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import Headers

from scalabl import __version__
from scalabl_server.engines.interface import Served
from scalabl_server.lifetime import ServerLifetime
from scalabl_server.open_inference.tensors import (
    BINARY,
    OUTPUTS,
    InferError,
    InferRequest,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    OutputName,
    Ready,
    ServerMetadata,
    TensorMetadata,
    as_predict,
    output_tensor,
    outputs_of,
    wanted,
)
from scalabl_server.problems import Kind, ProblemError
from scalabl_server.schemas.prediction import PredictResponse
from scalabl_server.web.auth import KeyRing
from scalabl_server.web.disconnect import RequestTimeout, while_connected
from scalabl_server.web.guard import documented, route_class

VERSION = "1"


def build_router(server: ServerLifetime, keys: KeyRing) -> APIRouter:
    """The routes of the protocol."""
    form: dict[str, Any] = {"model": InferError, "media_type": "application/json"}
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], route_class=route_class(keys, _no_binary, **form))
    guarded = keys.guards

    def errors(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
        return documented(*kinds, **form)

    @router.get("", dependencies=guarded)
    async def server_metadata() -> ServerMetadata:
        """Name and version of the server. It supports no extensions."""
        return ServerMetadata(name="scalabl", version=__version__, extensions=[])

    @router.get("/health/live", responses=errors("failed"))
    async def server_live() -> Live:
        """The same check as /health/live."""
        server.check_alive()
        return Live(live=True)

    @router.get("/health/ready", responses=errors("starting"))
    async def server_ready() -> Ready:
        """The same check as /health/ready."""
        server.check_ready()
        return Ready(ready=True)

    answers: dict[str, Any] = {"dependencies": guarded, "responses": errors("unknown-adapter", "starting")}

    @router.get("/models/{name}", **answers)
    async def model_metadata(name: str) -> ModelMetadata:
        """The input and output tensors of an adapter."""
        return _metadata(server, name)

    @router.get("/models/{name}/versions/{version}", **answers)
    async def model_version_metadata(name: str, version: str) -> ModelMetadata:
        """The input and output tensors of an adapter. Version 1 is the only one."""
        return _metadata(server, name, version)

    @router.get("/models/{name}/ready", **answers)
    async def model_ready(name: str) -> ModelReady:
        """200 while the adapter is loaded and can answer requests."""
        _adapter(server, name)
        return ModelReady(name=name, ready=True)

    @router.get("/models/{name}/versions/{version}/ready", **answers)
    async def model_version_ready(name: str, version: str) -> ModelReady:
        """200 while the adapter is loaded and can answer requests. Version 1 is the only one."""
        _adapter(server, name, version)
        return ModelReady(name=name, ready=True)

    inferences: dict[str, Any] = {
        "dependencies": guarded,
        "responses": errors(
            "unknown-adapter", "invalid-field", "input-too-large", "queue-full", "starting", "deadline-exceeded"
        ),
        "response_model_exclude_none": True,
    }

    @router.post("/models/{name}/infer", **inferences)
    async def infer(
        name: str, request: InferRequest, http: Request, x_request_timeout: RequestTimeout = None
    ) -> InferResponse:
        """The answer of /predict as tensors."""
        return await while_connected(http, _infer(server, name, request, x_request_timeout))

    @router.post("/models/{name}/versions/{version}/infer", **inferences)
    async def infer_version(
        name: str, version: str, request: InferRequest, http: Request, x_request_timeout: RequestTimeout = None
    ) -> InferResponse:
        """The answer of /predict as tensors. Version 1 is the only one."""
        return await while_connected(http, _infer(server, name, request, x_request_timeout, version))

    return router


def _no_binary(headers: Headers) -> None:
    if "inference-header-content-length" in headers:
        raise ProblemError("unsupported-media-type", BINARY)


def _adapter(server: ServerLifetime, name: str, version: str = VERSION) -> Served:
    """A loaded adapter.

    Raises:
        ProblemError: `unknown-adapter` for an unknown name or version; `starting`, `draining` or `failed`.
    """
    served = server.serving().engine.adapter(name)
    if version != VERSION:
        raise ProblemError("unknown-adapter", f"model {name!r} has no version {version!r}; its only version is {VERSION!r}")
    return served


def _outputs(served: Served) -> list[OutputName]:
    return outputs_of(has_novelty=served.novelty is not None and served.novelty.calibration is not None)


def _metadata(server: ServerLifetime, name: str, version: str = VERSION) -> ModelMetadata:
    served = _adapter(server, name, version)
    task = served.prompter.task
    classification = task.kind == "classification"
    inputs = [TensorMetadata(name="text", datatype="BYTES", shape=[-1])]
    if not classification:
        inputs.append(TensorMetadata(name="choices", datatype="BYTES", shape=[-1, -1]))
    width = len(task.choices) if classification else -1
    return ModelMetadata(
        name=name,
        versions=[VERSION],
        platform="scalabl",
        inputs=inputs,
        outputs=[
            TensorMetadata(name=output, datatype=datatype, shape=[-1, width] if output == "probabilities" else [-1])
            for output in _outputs(served)
            for datatype, _ in (OUTPUTS[output],)
        ],
        parameters={"task": task.kind} | ({"choices": list(task.choices)} if classification else {}),
    )


async def _infer(
    server: ServerLifetime, name: str, request: InferRequest, timeout: float | None, version: str = VERSION
) -> InferResponse:
    names = wanted(request, _outputs(_adapter(server, name, version)))

    def form(response: PredictResponse) -> InferResponse:
        return InferResponse(
            model_name=name,
            model_version=VERSION,
            id=request.id,
            outputs=[output_tensor(output, response.predictions) for output in names],
        )

    return await server.serving().predictor.predict(as_predict(name, request), timeout, form)
