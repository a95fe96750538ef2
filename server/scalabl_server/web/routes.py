"""The server's own HTTP routes. Each is a thin layer: what it does is in `predict`, `outcomes` and `lifetime`."""

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
    """The routes of one server's own interface."""
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
        return await while_connected(http, server.serving().predictor.predict(request, x_request_timeout, _json))

    @router.post(
        "/feedback",
        dependencies=guarded,
        responses=documented("unknown-prediction", "invalid-field", "outcomes-unavailable"),
        summary="Say what was true",
    )
    async def feedback(request: FeedbackRequest) -> FeedbackResponse:
        """The true answers to predictions, stored when this returns, all or none. Sending one again changes nothing; another
        label for the same prediction corrects it."""
        return await server.outcomes.feedback(request if isinstance(request, list) else [request])

    @router.get(
        "/predictions/{id}",
        dependencies=guarded,
        responses=documented("unknown-prediction", "outcomes-unavailable"),
    )
    async def prediction(id: str) -> StoredPrediction:
        """A stored prediction with its labels."""
        return await server.outcomes.look_up(id)

    @router.get("/info", dependencies=guarded, responses=documented("starting"))
    async def info() -> Info:
        """What is loaded, the defaults and the limits."""
        return describe(server.serving().engine)

    return router


def health_routes(server: ServerLifetime) -> APIRouter:
    """For probes; they need no key."""
    router = APIRouter(route_class=route_class(KeyRing()))

    @router.get("/health/live", responses=documented("failed"))
    async def live() -> Health:
        """200 unless the model could not be loaded, or its worker is stuck or dead."""
        server.check_alive()
        return Health(status="ok")

    @router.get("/health/ready", responses=documented("starting"))
    async def ready() -> Health:
        """200 once the model is loaded and warm, until the server drains."""
        server.check_ready()
        return Health(status="ok")

    return router


def metrics_route(server: ServerLifetime) -> APIRouter:
    """For Prometheus; it needs no key."""
    router = APIRouter(route_class=route_class(KeyRing()))

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"description": "The metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(server.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router


def _json(response: PredictResponse) -> Response:
    return Response(response.model_dump_json(exclude_unset=True), media_type="application/json")
