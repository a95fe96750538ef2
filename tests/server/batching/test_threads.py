"""CPU threads: only the model thread computes on several cores."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from scalabl_server.batching.jobs import ControlVariateJob, Job, LinearizedJob, Result, SampledJob
from scalabl_server.batching.threads import PAUSE, TORCH_THREADS, OneAtATime, leave_cores, rest, take_cores
from scalabl_server.predict.answers import is_small
from scalabl_server.predict.preparation import is_short
from scalabl_server.predict.request import read_request
from scalabl_server.schemas.prediction import PredictRequest

from scalabl.files.adapter_directory import read_config
from scalabl.model.posterior import draw
from tests.server.conftest import serving, settings_for

TASKS = Path("/proc/self/task")


@pytest.mark.parametrize(("threads", "cores"), [(3, 3), (None, TORCH_THREADS)])
def test_threads_beside_the_models_keep_to_one_core(folders: Path, threads: int | None, cores: int) -> None:
    with serving(settings_for(folders, threads=threads)) as client:
        assert client.post("/predict", json={"inputs": "the sky"}).status_code == 200
        server = client.app.state.lifetime  # type: ignore[attr-defined]  # starlette's type of an application
        executors = (server._model_thread, server._prompt_thread, server._answer_threads)
        assert [executor.submit(torch.get_num_threads).result() for executor in executors] == [cores, 1, 1]


def test_what_a_thread_keeps_to_outlasts_what_another_says_later() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=leave_cores) as one, ThreadPoolExecutor(1) as other:
        one.submit(lambda: None).result()  # it has computed nothing yet
        other.submit(take_cores, 3).result()
        assert one.submit(torch.get_num_threads).result() == 1
    torch.set_num_threads(before)


def test_so_does_the_event_loop_which_computes_small_answers(folders: Path) -> None:
    with serving(settings_for(folders, threads=3)) as client:
        assert client.post("/predict", json={"inputs": "the sky"}).status_code == 200
        assert client.portal is not None
        assert client.portal.call(torch.get_num_threads) == 1


def test_only_an_answer_of_few_samples_and_one_input_is_small() -> None:
    sampled, few = SampledJob(draw(0, 8, 3), 10), Result(torch.zeros(8, 10))
    assert is_small([sampled], [few])
    assert not is_small([sampled] * 2, [few] * 2)
    assert not is_small([sampled], [Result(torch.zeros(64, 100))])
    linearized: list[Job] = [LinearizedJob(10, 10), ControlVariateJob(sampled.draws, 10, 10)]
    assert not any(is_small([job], [few]) for job in linearized)


@pytest.mark.skipif(
    PAUSE is None or (os.cpu_count() or 1) < 2, reason="needs an OpenMP library that can pause, and two cores"
)
def test_a_thread_that_rests_ends_its_helpers_and_computes_as_before() -> None:
    big = torch.randn(512, 512)

    def helpers() -> tuple[int, int, int, bool]:
        take_cores(2)
        expected = big @ big
        before = len(list(TASKS.iterdir()))
        rest()
        during = len(list(TASKS.iterdir()))
        same = torch.equal(big @ big, expected)
        return before - during, len(list(TASKS.iterdir())) - during, torch.get_num_threads(), same

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(helpers).result() == (1, 1, 2, True)


def test_a_thread_that_computes_alone_has_nobody_to_rest() -> None:
    with ThreadPoolExecutor(1, initializer=leave_cores) as executor:
        executor.submit(rest).result()
        assert executor.submit(torch.get_num_threads).result() == 1


def test_what_must_not_run_twice_at_once_is_called_here_only_while_the_thread_is_idle() -> None:
    began, go_on = threading.Event(), threading.Event()

    def work() -> str:
        began.set()
        assert go_on.wait(10)
        return threading.current_thread().name

    with OneAtATime("prompt") as executor:
        assert executor.call(lambda: threading.current_thread().name) == threading.current_thread().name
        working = executor.submit(work)
        assert began.wait(10)
        assert executor.call(str, 7) is None
        go_on.set()
        assert working.result(10).startswith("prompt")
        with pytest.raises(ZeroDivisionError):
            executor.call(lambda: 1 / 0)
        assert executor.submit(str, 7).result(10) == "7"


@pytest.mark.parametrize(
    ("changes", "short"),
    [
        ({}, True),
        ({"inputs": "x" * 3000}, False),
        ({"inputs": ["the sky", "the sea"]}, False),
        ({"seed": 12}, False),
        ({"num_samples": 3}, False),
        ({"num_samples": "auto"}, True),
        ({"method": "linearized"}, True),
    ],
)
def test_one_short_text_with_the_usual_draws_is_tokenised_at_once(
    folders: Path, changes: dict[str, Any], short: bool
) -> None:
    settings, config = settings_for(folders), read_config(folders / "colours")
    request = PredictRequest.model_validate({"inputs": "the sky"} | changes)
    assert is_short(read_request(request, config, settings, 5000), settings) == short
