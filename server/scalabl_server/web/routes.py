"""The HTTP routes. Each one is a thin layer over `Service`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from scalabl_server.predict.service import Service
from scalabl_server.schemas import (
    FeedbackRequest,
    FeedbackResponse,
    Health,
    Info,
    PredictRequest,
    PredictResponse,
    StoredPrediction,
)
from scalabl_server.web.auth import KeyRing
from scalabl_server.web.disconnect import RequestTimeout, while_connected
from scalabl_server.web.guard import documented, route_class


def build_router(service: Service, keys: KeyRing) -> APIRouter:
    """The routes of one service's own interface."""
    router = APIRouter(route_class=route_class(keys))
    guarded = keys.guards

    @router.post(
        "/predict",
        dependencies=guarded,
        response_model=PredictResponse,
        responses=documented(
            "unknown-adapter", "invalid-field", "input-too-large", "queue-full", "starting", "outcomes-unavailable",
            "deadline-exceeded",
        ),
        summary="Choose, and say how sure",
    )  # fmt: skip
    async def predict(request: PredictRequest, http: Request, x_request_timeout: RequestTimeout = None) -> Response:
        """Probabilities over the choices with their uncertainty, averaged over K posterior samples."""
        return await while_connected(http, service.predict(request, x_request_timeout, _json))

    @router.post(
        "/feedback",
        dependencies=guarded,
        responses=documented("unknown-prediction", "invalid-field", "outcomes-unavailable"),
        summary="Say what was true",
    )
    async def feedback(request: FeedbackRequest) -> FeedbackResponse:
        """The true answers to predictions, stored when this returns, all or none. Sending one again changes nothing; another
        label for the same prediction corrects it."""
        return await service.outcomes.feedback(request if isinstance(request, list) else [request])

    @router.get(
        "/predictions/{id}",
        dependencies=guarded,
        responses=documented("unknown-prediction", "outcomes-unavailable"),
    )
    async def prediction(id: str) -> StoredPrediction:
        """A stored prediction with its labels."""
        return await service.outcomes.look_up(id)

    @router.get("/info", dependencies=guarded, responses=documented("starting"))
    async def info() -> Info:
        """What is loaded, the defaults and the limits."""
        return service.info()

    return router


def health_routes(service: Service) -> APIRouter:
    """For probes; they need no key."""
    router = APIRouter(route_class=route_class(KeyRing()))

    @router.get("/health/live", responses=documented("failed"))
    async def live() -> Health:
        """200 unless the model could not be loaded, or its worker is stuck or dead."""
        service.check_alive()
        return Health(status="ok")

    @router.get("/health/ready", responses=documented("starting"))
    async def ready() -> Health:
        """200 once the model is loaded and warm, until the server drains."""
        service.check_ready()
        return Health(status="ok")

    return router


def metrics_route(service: Service) -> APIRouter:
    """For Prometheus; it needs no key."""
    router = APIRouter(route_class=route_class(KeyRing()))

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"description": "The metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router


def _json(response: PredictResponse) -> Response:
    return Response(response.model_dump_json(exclude_unset=True), media_type="application/json")
