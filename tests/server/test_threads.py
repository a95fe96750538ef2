"""Only the model's thread computes on several cores."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from scalabl.linearized import Linearization
from server.answers import is_small
from server.methods import Controlled
from server.threads import FOUND
from tests.server.conftest import serving, settings_for


@pytest.mark.parametrize(("threads", "cores"), [(3, 3), (None, FOUND)])
def test_threads_beside_the_models_keep_to_one_core(folders: Path, threads: int | None, cores: int) -> None:
    with serving(settings_for(folders, threads=threads)) as client:
        assert client.post("/predict", json={"inputs": "the sky"}).status_code == 200
        service = client.app.state.service  # type: ignore[attr-defined]  # starlette's type of an application
        executors = (service._model_thread, service._prompt_thread, service._answer_threads)
        assert [executor.submit(torch.get_num_threads).result() for executor in executors] == [cores, 1, 1]


def test_so_does_the_event_loop_which_computes_small_answers(folders: Path) -> None:
    with serving(settings_for(folders, threads=3)) as client:
        assert client.post("/predict", json={"inputs": "the sky"}).status_code == 200
        assert client.portal is not None
        assert client.portal.call(torch.get_num_threads) == 1


def test_only_an_answer_of_few_samples_and_one_input_is_small() -> None:
    one = torch.zeros(8, 10)
    assert is_small([one])
    assert not is_small([one, one])
    assert not is_small([torch.zeros(64, 100)])
    assert not is_small([Controlled(one, cast(Linearization, None))])
