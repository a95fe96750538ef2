"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported: no test looks up a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

# The processes of `pytest -n` share the cores. Not by OMP_NUM_THREADS, which the servers that tests start would inherit.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The time of one example says nothing on a shared machine.
hypothesis.settings.register_profile("project", deadline=None, max_examples=60)
hypothesis.settings.load_profile("project")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _data_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What servers keep by default goes to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Public data sets and the authors' checkpoint, kept beside the repository and not part of it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED.name}/ with the public data sets and the authors' checkpoint is not beside the repository")
    return SHARED
