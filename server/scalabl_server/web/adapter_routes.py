"""The routes that load and unload adapters, with vLLM's names. They exist only with --enable-adapter-loading."""

from __future__ import annotations

from fastapi import APIRouter

from scalabl_server.lifetime import ServerLifetime
from scalabl_server.schemas.adapters import AdapterNames, LoadAdapter, UnloadAdapter
from scalabl_server.schemas.server import AdapterInfo
from scalabl_server.web.auth import KeyRing
from scalabl_server.web.description import describe_adapter
from scalabl_server.web.guard import documented, route_class


def build_adapter_router(server: ServerLifetime, keys: KeyRing) -> APIRouter:
    """The two routes. They need the same API keys as all others."""
    router = APIRouter(prefix="/v1", tags=["adapters"], route_class=route_class(keys))
    guarded = keys.guards

    @router.post(
        "/load_lora_adapter",
        dependencies=guarded,
        responses=documented("path-not-allowed", "adapter-conflict", "invalid-adapter", "starting"),
    )
    async def load(request: LoadAdapter) -> AdapterInfo:
        """Load an adapter from a folder below the adapter root, or replace a loaded one. Requests that are already running
        finish with the adapter that they started with."""
        return describe_adapter(await server.serving().loader.load(request.lora_name, request.lora_path, request.replace))

    @router.post(
        "/unload_lora_adapter",
        dependencies=guarded,
        responses=documented("unknown-adapter", "starting"),
    )
    async def unload(request: UnloadAdapter) -> AdapterNames:
        """Unload an adapter. Requests that are already running finish with it."""
        loaded = server.serving()
        await loaded.loader.unload(request.lora_name)
        return AdapterNames(adapters=sorted(loaded.engine.adapters))

    return router
