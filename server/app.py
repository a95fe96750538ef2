"""`create_app`: settings in, ASGI application out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from scalabl import __version__
from server import problems
from server.auth import KeyRing
from server.engine import Engine, load_engine
from server.middleware import BodyLimit, RequestMetrics
from server.routes import build_router
from server.service import Service
from server.settings import ServeSettings


def create_app(
    settings: ServeSettings,
    on_failure: Callable[[Exception], None] | None = None,
    load: Callable[[ServeSettings], Engine] = load_engine,
) -> FastAPI:
    """The application of one server. Its `state.service` is the `Service`; loading begins with the lifespan.

    Args:
        on_failure: told the error when the model cannot be loaded.
        load: makes the engine; called once, on the model's thread.
    """
    service = Service(settings, load, on_failure)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="ScalaBL inference server",
        version=__version__,
        summary="Language models that know what they do not know.",
        lifespan=lifespan,
    )
    app.state.service = service
    problems.install(app)
    app.include_router(build_router(service, KeyRing(settings.api_keys)))
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(RequestMetrics, metrics=service.metrics)
    return app
