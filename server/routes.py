"""The HTTP routes. Each one is a thin layer over `Service`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.auth import KeyRing
from server.problems import TITLES, ProblemError
from server.schemas import (
    FeedbackRequest,
    FeedbackResponse,
    Health,
    Info,
    PredictRequest,
    PredictResponse,
    Problem,
    StoredPrediction,
)
from server.service import UNAVAILABLE, Service


def _problems(*slugs: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for the errors that a route can answer with."""
    documented: dict[int | str, dict[str, Any]] = {}
    for slug in slugs:
        status, title = TITLES[slug]
        documented.setdefault(
            status,
            {"description": title, "content": {"application/problem+json": {"schema": Problem.model_json_schema()}}},
        )
    return documented


def build_router(service: Service, keys: KeyRing) -> APIRouter:
    """All routes of one service."""
    router = APIRouter()
    guarded = [Depends(keys.check)]

    @router.post(
        "/predict",
        dependencies=guarded,
        response_model_exclude_unset=True,
        responses=_problems(
            "unauthorized", "unknown-adapter", "body-too-large", "invalid-field", "queue-full", "internal-error",
            "starting", "outcomes-unavailable", "deadline-exceeded",
        ),
        summary="Choose, and say how sure",
    )  # fmt: skip
    async def predict(request: PredictRequest) -> PredictResponse:
        """Probabilities over the choices with their uncertainty, averaged over K posterior samples."""
        return await service.predict(request)

    @router.post(
        "/feedback",
        dependencies=guarded,
        responses=_problems("unauthorized", "unknown-prediction", "body-too-large", "invalid-field", "outcomes-unavailable"),
        summary="Say what was true",
    )
    async def feedback(request: FeedbackRequest) -> FeedbackResponse:
        """The true answers to predictions, stored when this returns, all or none. Sending one again changes nothing; another
        label for the same prediction corrects it."""
        return await service.outcomes.feedback(request if isinstance(request, list) else [request])

    @router.get(
        "/predictions/{id}",
        dependencies=guarded,
        responses=_problems("unauthorized", "unknown-prediction", "outcomes-unavailable"),
    )
    async def prediction(id: str) -> StoredPrediction:
        """A stored prediction with its labels."""
        return await service.outcomes.look_up(id)

    @router.get("/info", dependencies=guarded, responses=_problems("unauthorized", "starting"))
    async def info() -> Info:
        """What is loaded, the defaults and the limits."""
        return service.info()

    @router.get("/health/live", responses=_problems("failed"))
    async def live() -> Health:
        """200 unless the model could not be loaded."""
        if service.state == "failed":
            raise ProblemError("failed", UNAVAILABLE["failed"])
        return Health(status="ok")

    @router.get("/health/ready", responses=_problems("starting"))
    async def ready() -> Health:
        """200 once the model is loaded and warm, until the server drains."""
        if service.state != "ready":
            raise ProblemError(service.state, UNAVAILABLE[service.state])
        return Health(status="ok")

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
