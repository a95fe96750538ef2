"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import os
from pathlib import Path

# Before transformers is imported: no test looks up a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest

# The time of one example says nothing on a shared machine.
hypothesis.settings.register_profile("project", deadline=None, max_examples=60)
hypothesis.settings.load_profile("project")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Public data sets and the authors' checkpoint, kept beside the repository and not part of it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED.name}/ with the public data sets and the authors' checkpoint is not beside the repository")
    return SHARED
