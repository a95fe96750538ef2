"""The machine of a run as data: the GPU, its driver and the versions that matter. Nothing is measured here."""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.machine import describe as line

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "fastapi", "pydantic")


def describe() -> dict[str, Any]:
    """Of this machine; `gpu` is missing where there is none."""
    machine: dict[str, Any] = {
        "line": line(),
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": properties.name,
            "memory": properties.total_memory,
            "processors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": _driver(),
        }
    return machine


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The driver's version, from nvidia-smi; empty without it. The command only reads."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
