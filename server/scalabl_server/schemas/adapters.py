"""The JSON schemas of the routes that load and unload adapters."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LoadAdapter(BaseModel):
    """An adapter to load. The fields have the same names as in vLLM."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(description="Name under which requests will select the adapter.")
    lora_path: str = Field(
        min_length=1, max_length=4096, description="Folder of the adapter, below the server's adapter root."
    )
    replace: bool = Field(default=False, description="Replace a loaded adapter of the same name.")


class UnloadAdapter(BaseModel):
    """An adapter to unload."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str


class AdapterNames(BaseModel):
    """The names of the adapters that are loaded now."""

    adapters: list[str]
