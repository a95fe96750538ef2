"""The routes of the server's own API. Each one is a thin layer over `predict`, `outcomes` or `lifetime`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from scalabl_server.lifetime import ServerLifetime
from scalabl_server.schemas.feedback import FeedbackRequest, FeedbackResponse, StoredPrediction
from scalabl_server.schemas.prediction import PredictRequest, PredictResponse
from scalabl_server.schemas.server import Health, Info
from scalabl_server.web.auth import KeyRing
from scalabl_server.web.description import describe
from scalabl_server.web.disconnect import RequestTimeout, while_connected
from scalabl_server.web.guard import documented, route_class


def build_router(server: ServerLifetime, keys: KeyRing) -> APIRouter:
    """The routes /predict, /feedback, /predictions and /info."""
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
        summary="Predict with uncertainty",
    )  # fmt: skip
    async def predict(request: PredictRequest, http: Request, x_request_timeout: RequestTimeout = None) -> Response:
        """Probabilities of the choices and their uncertainty, from K samples of the posterior or by linearisation."""
        return await while_connected(http, server.serving().predictor.predict(request, x_request_timeout, _json))

    @router.post(
        "/feedback",
        dependencies=guarded,
        responses=documented("unknown-prediction", "invalid-field", "outcomes-unavailable"),
        summary="Report the true answers",
    )
    async def feedback(request: FeedbackRequest) -> FeedbackResponse:
        """Store the true answers to earlier predictions: all of the request or none, on disk when this returns. Sending the
        same label again changes nothing; sending another label for the same prediction replaces the first. The label null
        says that none of the choices is the true answer."""
        return await server.outcomes.feedback(request if isinstance(request, list) else [request])

    @router.get(
        "/predictions/{id}",
        dependencies=guarded,
        responses=documented("unknown-prediction", "outcomes-unavailable"),
    )
    async def prediction(id: str) -> StoredPrediction:
        """A stored prediction with the labels that were reported for it."""
        return await server.outcomes.look_up(id)

    @router.get("/info", dependencies=guarded, responses=documented("starting"))
    async def info() -> Info:
        """The loaded model and adapters, the defaults and the limits."""
        return describe(server.serving().engine)

    return router


def health_routes(server: ServerLifetime) -> APIRouter:
    """The routes for liveness and readiness probes. They need no API key."""
    router = APIRouter(route_class=route_class(KeyRing()))

    @router.get("/health/live", responses=documented("failed"))
    async def live() -> Health:
        """200 unless the server needs a restart: the model could not be loaded, or its worker hangs or has crashed."""
        server.check_alive()
        return Health(status="ok")

    @router.get("/health/ready", responses=documented("starting"))
    async def ready() -> Health:
        """200 while the server can answer: from when the model is loaded and warmed up until shutdown begins."""
        server.check_ready()
        return Health(status="ok")

    return router


def metrics_route(server: ServerLifetime) -> APIRouter:
    """The route for Prometheus. It needs no API key."""
    router = APIRouter(route_class=route_class(KeyRing()))

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"description": "The metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """All metrics in the Prometheus text format."""
        return Response(server.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router


def _json(response: PredictResponse) -> Response:
    return Response(response.model_dump_json(exclude_unset=True), media_type="application/json")
