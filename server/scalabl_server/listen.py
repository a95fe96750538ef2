"""Running uvicorn: on the main port, on the admin port if there is one, with TLS, until a signal ends the process."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from scalabl.errors import ScalaBLError
from scalabl_server.app import create_admin_app, create_app
from scalabl_server.settings import ServeSettings
from scalabl_server.web.draining import DrainingServer
from scalabl_server.web.protocol import protocol_class


class ListenError(ScalaBLError):
    """The settings for listening cannot be used, such as a TLS certificate."""


class AdminServer(uvicorn.Server):
    """The server of the admin port. It ignores signals: the main server handles them, and stops this one last."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(settings: ServeSettings) -> Exception | None:
    """Serve until a signal. Returns the error if the model could not be loaded, else None.

    Raises:
        ListenError: a TLS certificate or key cannot be used.
        ScalaBLError: the settings cannot be used.
    """
    failures: list[Exception] = []

    def on_failure(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    application = create_app(settings, on_failure)

    server = DrainingServer(
        _config(settings, application, settings.host, settings.port, **_tls(settings)),
        application.state.lifetime,
        settings.shutdown_timeout,
        settings.drain_delay,
    )
    admin = None
    if settings.admin_port is not None:
        admin = AdminServer(
            _config(settings, create_admin_app(application), settings.admin_host, settings.admin_port, lifespan="off")
        )
    # uvicorn raises the signal again after a clean shutdown. Ignore it, so that a drained server exits with status 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        server.config.load()
    except (OSError, ssl.SSLError) as error:
        raise ListenError(f"the TLS certificate, key or CA certificates cannot be used: {error}") from None
    asyncio.run(_both(server, admin))
    if failures:
        return failures[0]
    server.end()
    return None


async def _both(server: uvicorn.Server, admin: uvicorn.Server | None) -> None:
    """Run both. The admin port opens before the main one and closes after it, so that probes and scrapes see the drain."""
    if admin is None:
        await server.serve()
        return
    admin_task = asyncio.create_task(admin.serve(), name="admin")
    try:
        await server.serve()
    finally:
        admin.should_exit = True
        await admin_task


def _config(settings: ServeSettings, app: FastAPI, host: str, port: int, **options: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol_class(settings.header_timeout),
        ws="none",
        log_config=None,
        log_level=settings.log_level,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        **options,
    )


def _tls(settings: ServeSettings) -> dict[str, Any]:
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None or settings.ssl_ca_certs is not None:
            raise ListenError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile; set it too")
        return {}
    return {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_ca_certs": settings.ssl_ca_certs,
        "ssl_cert_reqs": ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    }
