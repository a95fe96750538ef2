"""Loading and unloading adapters while the server runs. An adapter must lie below one folder and pass all checks first."""

from __future__ import annotations

import asyncio
import logging
import re
import stat
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from scalabl.errors import ScalaBLError
from scalabl.files.adapter_directory import files_of
from scalabl_server.batching.faults import classify
from scalabl_server.engines.interface import Engine, Served
from scalabl_server.observe.metrics import Metrics
from scalabl_server.problems import ProblemError
from scalabl_server.settings import ADAPTER_NAME, ServeSettings

logger = logging.getLogger("scalabl")


class AdapterLoader:
    """Changes the adapters of an engine, one change at a time. Running requests keep the adapter that they started with.

    Args:
        prompt_thread, model_thread: the only threads that may use the tokenizer and the model.
        on_load: called with each loaded adapter.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServeSettings,
        metrics: Metrics,
        prompt_thread: Executor,
        model_thread: Executor,
        on_load: Callable[[Served], None],
    ) -> None:
        self._engine, self._settings, self._metrics, self._on_load = engine, settings, metrics, on_load
        self._prompt_thread, self._model_thread = prompt_thread, model_thread
        self._lock = asyncio.Lock()

    async def load(self, name: str, path: str, replace: bool) -> Served:
        """Read, check and add an adapter. If anything is wrong with it, nothing changes.

        Raises:
            ProblemError: `invalid-field`, `path-not-allowed`, `adapter-conflict`, `invalid-adapter` or `out-of-memory`.
        """
        if not re.fullmatch(ADAPTER_NAME, name):
            raise ProblemError(
                "invalid-field",
                "use up to 64 letters, digits, '.', '_' or '-', and begin with a letter or a digit",
                field="lora_name",
            )
        async with self._lock:
            self._check_name(name, replace)
            try:
                folder = await asyncio.to_thread(self._folder, path)
                served = await self._read(name, folder)
            except ScalaBLError as error:
                detail = str(error).replace(str(folder), path)
                raise ProblemError("invalid-adapter", detail, field="lora_path") from None
            except Exception as error:
                if isinstance(error, ProblemError):
                    raise
                logger.exception("adapter %s could not be loaded", name)
                if classify(error).kind == "out-of-memory":
                    raise ProblemError(
                        "out-of-memory",
                        "the adapter does not fit in memory next to the loaded ones; unload one first",
                        field="lora_path",
                    ) from None
                raise ProblemError(
                    "invalid-adapter",
                    f"the adapter cannot be read ({type(error).__name__}); see the server's log for details",
                    field="lora_path",
                ) from None
            old = self._engine.adapters.get(name)
            self._engine.adapters[name] = served
            self._metrics.novelty.forget(name)  # of an adapter that it replaces
            self._on_load(served)
            await self._changed(f"adapter {name} loaded", old)
            return served

    async def unload(self, name: str) -> None:
        """Unload an adapter.

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
                "adapter-conflict", f"{name!r} is already loaded; unload it first or set replace to true", field="lora_name"
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
        if old is not None and old.name not in self._engine.adapters:
            self._metrics.novelty.forget(old.name)
        logger.info("%s; loaded adapters: %s", what, ", ".join(sorted(self._engine.adapters)) or "none")
        if old is not None:  # remove it from the base model, after the pass that may still use it
            await asyncio.get_running_loop().run_in_executor(self._model_thread, self._engine.release, old)

    def _folder(self, path: str) -> Path:
        """The folder that a request names, with symbolic links resolved.

        Raises:
            ProblemError: `path-not-allowed` if it or its files lie outside the adapter root; `invalid-field`;
                `invalid-adapter` if a file is missing, is not a regular file, or is too large.
        """
        assert self._settings.adapter_root is not None  # checked by `ServeSettings`
        root = self._settings.adapter_root.resolve()
        try:
            folder = (root / path).resolve()
        except (ValueError, OSError, RuntimeError):  # a NUL byte, a name that is too long, links in a circle
            raise ProblemError("invalid-field", "this is not a valid path", field="lora_path") from None
        files = [folder / name for name in files_of(folder)]
        if not folder.is_relative_to(root) or not all(file.resolve().is_relative_to(root) for file in files):
            raise ProblemError(
                "path-not-allowed",
                "the folder and its files must lie below the adapter root, also after symbolic links are resolved",
                field="lora_path",
            )
        size = 0
        for file in files:
            try:
                status = file.stat()
            except OSError:
                raise ProblemError(
                    "invalid-adapter",
                    f"there is no {file.name} in this folder below the adapter root; check the path",
                    field="lora_path",
                ) from None
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
                raise ProblemError("invalid-adapter", f"{file.name} is not a regular file", field="lora_path")
            size += status.st_size
        if size > self._settings.max_adapter_bytes:
            raise ProblemError(
                "invalid-adapter",
                f"the adapter's files have {size} bytes and the limit is {self._settings.max_adapter_bytes}",
                field="lora_path",
            )
        return folder
