"""The JSON of the routes that load and unload adapters."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LoadAdapter(BaseModel):
    """An adapter to load. The names of the fields are vLLM's."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(description="Its name in the API.")
    lora_path: str = Field(min_length=1, max_length=4096, description="Its folder, below the server's adapter root.")
    replace: bool = Field(default=False, description="Take the place of a loaded adapter of that name.")


class UnloadAdapter(BaseModel):
    """An adapter to take away."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str


class AdapterNames(BaseModel):
    """The adapters that are loaded now."""

    adapters: list[str]
