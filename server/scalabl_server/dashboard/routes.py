"""The dashboard's routes: the page and its files, which need no API key, and the page's data, which needs one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Response

from scalabl_server.dashboard.novelty import NoveltyRule
from scalabl_server.dashboard.schemas import Dashboard
from scalabl_server.dashboard.summaries import stored
from scalabl_server.engines.interface import Served
from scalabl_server.lifetime import ServerLifetime
from scalabl_server.problems import ProblemError
from scalabl_server.web.auth import KeyRing
from scalabl_server.web.guard import documented, route_class

PAGE = Path(__file__).with_name("page")
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page may load only its own files and call only its own server. Nothing is inline, and text never becomes markup.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


def build_router(server: ServerLifetime, keys: KeyRing) -> APIRouter:
    """The routes. The page's files are read once, here, so that a name in a request is never used as a path."""
    router = APIRouter(route_class=route_class(keys), tags=["dashboard"])
    files = {file.name: (file.read_bytes(), KINDS[file.suffix]) for file in PAGE.iterdir()}
    headers = {"content-security-policy": POLICY}

    @router.get("/dashboard", include_in_schema=False)
    async def page() -> Response:
        content, kind = files["index.html"]
        return Response(content, media_type=kind, headers=headers)

    @router.get("/dashboard/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in files:
            raise ProblemError("not-found", f"the dashboard has no such file; its files are {', '.join(sorted(files))}")
        content, kind = files[name]
        return Response(content, media_type=kind, headers=headers)

    @router.get(
        "/v1/dashboard",
        dependencies=keys.guards,
        responses=documented("unknown-adapter", "invalid-field", "starting", "outcomes-unavailable"),
        summary="The dashboard's data",
    )
    async def data(
        adapter: Annotated[
            str | None, Query(description="Name of the adapter (default: the server's default adapter).")
        ] = None,
    ) -> Dashboard:
        """An adapter's reliability, uncertainty, risk and most uncertain predictions. Counts are over all replicas and all
        time; the rest is over the newest 1,000 predictions and the newest 1,000 labels (fewer if answers are long)."""
        served = server.serving().engine.adapter(adapter)
        survey = await server.outcomes.survey(served.name)
        if survey is None:
            return Dashboard(adapter=served.name, stored=None)
        summary = await asyncio.to_thread(stored, survey, served.config.calibration, _rule(served))
        return Dashboard(adapter=served.name, stored=summary)

    return router


def _rule(served: Served) -> NoveltyRule | None:
    """What an adapter knows of novelty; None without p-values."""
    level, drift, novelty = served.config.novelty_level, served.drift, served.novelty
    if level is None or drift is None or novelty is None or novelty.calibration is None:
        return None
    return NoveltyRule(level, len(novelty.calibration), drift.highest_log10)
