"""Only the model's thread computes on several cores."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.server.conftest import serving, settings_for


def test_threads_beside_the_models_keep_to_one_core(folders: Path) -> None:
    with serving(settings_for(folders, threads=3)) as client:
        assert client.post("/predict", json={"inputs": "the sky"}).status_code == 200
        service = client.app.state.service  # type: ignore[attr-defined]  # starlette's type of an application
        executors = (service._model_thread, service._prompt_thread, service._answer_threads)
        assert [executor.submit(torch.get_num_threads).result() for executor in executors] == [3, 1, 1]
