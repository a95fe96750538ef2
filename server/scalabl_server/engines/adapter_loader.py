"""Loading and unloading adapters while the server runs: from below one folder, checked before they count, all or nothing."""

from __future__ import annotations

import asyncio
import logging
import re
import stat
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from scalabl.errors import ScalaBLError
from scalabl.files.adapter_directory import CONFIG_FILE, WEIGHTS_FILE
from scalabl_server.batching.faults import classify
from scalabl_server.engines.interface import Engine, Served
from scalabl_server.observe.metrics import Metrics
from scalabl_server.problems import ProblemError
from scalabl_server.settings import ADAPTER_NAME, ServeSettings

logger = logging.getLogger("scalabl")


class AdapterLoader:
    """Changes an engine's adapters, one change at a time. Requests go on with the adapter that they began with.

    Args:
        prompt_thread, model_thread: where the tokenizer and the model may be used.
        on_load: told the name of an adapter that was loaded.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServeSettings,
        metrics: Metrics,
        prompt_thread: Executor,
        model_thread: Executor,
        on_load: Callable[[str], None],
    ) -> None:
        self._engine, self._settings, self._metrics, self._on_load = engine, settings, metrics, on_load
        self._prompt_thread, self._model_thread = prompt_thread, model_thread
        self._lock = asyncio.Lock()

    async def load(self, name: str, path: str, replace: bool) -> Served:
        """Read, check and add an adapter; nothing changes when anything is wrong with it.

        Raises:
            ProblemError: `invalid-field`, `path-not-allowed`, `adapter-conflict`, `invalid-adapter` or `out-of-memory`.
        """
        if not re.fullmatch(ADAPTER_NAME, name):
            raise ProblemError(
                "invalid-field",
                "use up to 64 letters, digits, '.', '_' or '-', the first a letter or a digit",
                field="lora_name",
            )
        async with self._lock:
            self._check_name(name, replace)
            try:
                folder = await asyncio.to_thread(self._folder, path)
                served = await self._read(name, folder)
            except ScalaBLError as error:
                said = str(error).replace(str(folder), path)
                raise ProblemError("invalid-adapter", said, field="lora_path") from None
            except Exception as error:
                if isinstance(error, ProblemError):
                    raise
                logger.exception("adapter %s could not be loaded", name)
                if classify(error).kind == "out-of-memory":
                    raise ProblemError(
                        "out-of-memory", "the adapter does not fit in memory beside those that are loaded", field="lora_path"
                    ) from None
                raise ProblemError(
                    "invalid-adapter",
                    f"the adapter cannot be read ({type(error).__name__}); see the server's log",
                    field="lora_path",
                ) from None
            old = self._engine.adapters.get(name)
            self._engine.adapters[name] = served
            self._on_load(name)
            await self._changed(f"adapter {name} loaded", old)
            return served

    async def unload(self, name: str) -> None:
        """Take an adapter away.

        Raises:
            ProblemError: `unknown-adapter`.
        """
        async with self._lock:
            old = self._engine.adapter(name)
            del self._engine.adapters[name]
            await self._changed(f"adapter {name} unloaded", old)

    def _check_name(self, name: str, replace: bool) -> None:
        loaded = self._engine.adapters
        if name in loaded and not replace:
            raise ProblemError(
                "adapter-conflict", f"{name!r} is loaded already; unload it first or send replace: true", field="lora_name"
            )
        if name not in loaded and len(loaded) >= self._settings.max_adapters:
            raise ProblemError(
                "adapter-conflict",
                f"{len(loaded)} adapters are loaded and the limit is {self._settings.max_adapters}; unload one first",
            )

    async def _read(self, name: str, folder: Path) -> Served:
        loop, engine = asyncio.get_running_loop(), self._engine
        serve = await asyncio.to_thread(engine.read, name, folder)
        served = await loop.run_in_executor(self._prompt_thread, serve)
        await loop.run_in_executor(self._model_thread, engine.check, served)
        return served

    async def _changed(self, what: str, old: Served | None) -> None:
        self._metrics.adapters.set(len(self._engine.adapters))
        logger.info("%s; now there are: %s", what, ", ".join(sorted(self._engine.adapters)) or "none")
        if old is not None:  # nothing of it stays in the base model once its last pass is over
            await asyncio.get_running_loop().run_in_executor(self._model_thread, self._engine.release, old)

    def _folder(self, path: str) -> Path:
        """The folder that a request names, with links resolved, when it and its files lie below the root."""
        assert self._settings.adapter_root is not None  # the settings see to it
        root = self._settings.adapter_root.resolve()
        try:
            folder = (root / path).resolve()
        except (ValueError, OSError, RuntimeError):  # a NUL byte, a name that is too long, links in a circle
            raise ProblemError("invalid-field", "this is no path", field="lora_path") from None
        files = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
        if not folder.is_relative_to(root) or not all(file.resolve().is_relative_to(root) for file in files):
            raise ProblemError("path-not-allowed", "it must lie, links resolved, below the adapter root", field="lora_path")
        size = 0
        for file in files:
            try:
                status = file.stat()
            except OSError:
                raise ProblemError(
                    "invalid-adapter", f"there is no {file.name} in such a folder below the adapter root", field="lora_path"
                ) from None
            if not stat.S_ISREG(status.st_mode):  # a pipe would never end
                raise ProblemError("invalid-adapter", f"{file.name} is not a regular file", field="lora_path")
            size += status.st_size
        if size > self._settings.max_adapter_bytes:
            raise ProblemError(
                "invalid-adapter",
                f"the adapter's files have {size} bytes and the limit is {self._settings.max_adapter_bytes}",
                field="lora_path",
            )
        return folder
