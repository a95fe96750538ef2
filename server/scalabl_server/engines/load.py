"""Loading the engine that the settings select. The only module that knows all engines."""

from __future__ import annotations

from scalabl_server.engines import transformers_engine
from scalabl_server.engines.interface import Engine
from scalabl_server.engines.vllm import engine as vllm_engine
from scalabl_server.settings import ServeSettings


def load_engine(settings: ServeSettings) -> Engine:
    """Load, check and warm up the engine with its base model and adapters.

    Raises:
        AdapterError, BaseModelError, PromptError, EngineError: what is wrong, and in which file, module, field or server.
        CapacityError: a pass that requests may ask for does not fit in memory.
    """
    load = vllm_engine.load if settings.engine == "vllm" else transformers_engine.load
    return load(settings)
