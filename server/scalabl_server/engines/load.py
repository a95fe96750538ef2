"""The engine that the settings name, loaded: the one module that knows every engine."""

from __future__ import annotations

from scalabl_server.engines import transformers_engine
from scalabl_server.engines.interface import Engine
from scalabl_server.engines.vllm import engine as vllm_engine
from scalabl_server.settings import ServeSettings


def load_engine(settings: ServeSettings) -> Engine:
    """Load, check and warm up what the settings name.

    Raises:
        AdapterError, BaseModelError, PromptError, EngineError: what is wrong, and with which file, module, field or server.
    """
    load = vllm_engine.load if settings.engine == "vllm" else transformers_engine.load
    return load(settings)
