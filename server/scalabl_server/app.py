"""`create_app` puts the ASGI application together from the settings. The routes themselves are defined elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from scalabl import __version__
from scalabl_server.dashboard import routes as dashboard
from scalabl_server.engines.interface import Engine
from scalabl_server.engines.load import load_engine
from scalabl_server.lifetime import ServerLifetime
from scalabl_server.observe.spans import make_spans
from scalabl_server.open_inference import routes as open_inference
from scalabl_server.settings import ServeSettings
from scalabl_server.web import errors
from scalabl_server.web.adapter_routes import build_adapter_router
from scalabl_server.web.arrival import ArrivalLimits
from scalabl_server.web.auth import KeyRing
from scalabl_server.web.draining import CloseWhileDraining
from scalabl_server.web.observation import Observe
from scalabl_server.web.request_line import RequestLine
from scalabl_server.web.routes import build_router, health_routes, metrics_route

CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST"],
    "allow_headers": ["authorization", "content-type", "x-api-key", "x-request-id", "x-request-timeout", "traceparent"],
    "expose_headers": ["x-request-id", "traceparent", "retry-after", "x-total-time", "x-queue-time", "x-inference-time"],
    "max_age": 600,
}


def create_app(
    settings: ServeSettings,
    on_failure: Callable[[Exception], None] | None = None,
    load: Callable[[ServeSettings], Engine] = load_engine,
) -> FastAPI:
    """Build the application of one server. Its `state.lifetime` is the `ServerLifetime`; loading begins with the lifespan.

    Args:
        on_failure: called with the error when the model cannot be loaded.
        load: creates the engine; called once, on the model thread.
    """
    keys = KeyRing(settings.api_keys, settings.api_keys_file)
    spans = make_spans(settings.otlp_endpoint)
    server = ServerLifetime(settings, load, on_failure)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await server.start()
        try:
            yield
        finally:
            await server.stop()
            if spans is not None:
                await asyncio.to_thread(spans.close)

    app = FastAPI(
        title="ScalaBL inference server",
        version=__version__,
        summary="Language models that know what they do not know.",
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host header
        strict_content_type=False,  # `strict_json` checks the content type
    )
    app.state.lifetime = server
    errors.install(app)
    app.include_router(build_router(server, keys))
    if settings.enable_adapter_loading:
        app.include_router(build_adapter_router(server, keys))
    app.include_router(open_inference.build_router(server, keys))
    if settings.dashboard:
        app.include_router(dashboard.build_router(server, keys))
    app.include_router(health_routes(server))
    if settings.admin_port is None:
        app.include_router(metrics_route(server))
    app.add_middleware(
        ArrivalLimits,
        max_header_bytes=settings.max_header_bytes,
        max_body_bytes=settings.max_body_bytes,
        body_timeout=settings.body_timeout,
    )
    app.add_middleware(RequestLine)
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, **CORS)
    app.add_middleware(CloseWhileDraining, lifetime=server)
    app.add_middleware(Observe, metrics=server.metrics, spans=spans, https=settings.ssl_certfile is not None)
    return app


def create_admin_app(main: FastAPI) -> FastAPI:
    """Build the application of the admin port: health and metrics of the same server."""
    server: ServerLifetime = main.state.lifetime
    app = FastAPI(title="ScalaBL inference server: admin port", openapi_url=None, redirect_slashes=False)
    errors.install(app)
    app.include_router(health_routes(server))
    app.include_router(metrics_route(server))
    app.add_middleware(RequestLine)
    app.add_middleware(Observe, metrics=server.metrics)
    return app
