"""The token budget of a pass: which point is chosen, when measuring ends, and the budget of a server on this CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from scalabl_server.engines.budget import Point, find_budget, knee, ladder, measure_memory, measure_rates, room

OUT_OF_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


def points(*pairs: tuple[int, float]) -> list[Point]:
    return [Point(tokens, amount) for tokens, amount in pairs]


@given(
    st.lists(st.tuples(st.integers(1, 10**5), st.floats(1e-4, 100)), min_size=1, max_size=8).map(sorted),
    st.floats(0, 0.5),
)
def test_the_knee_is_the_smallest_size_within_a_share_of_the_best_rate(
    pairs: list[tuple[int, float]], within: float
) -> None:
    found = knee(points(*pairs), within)
    best = max(tokens / seconds for tokens, seconds in pairs)
    assert max(tokens / seconds for tokens, seconds in pairs if tokens == found) >= (1 - within) * best
    assert all(tokens / seconds < (1 - within) * best for tokens, seconds in pairs if tokens < found)


def test_with_a_fixed_cost_the_knee_is_where_that_is_a_twentieth() -> None:
    sizes = ladder(10, 10_000)
    found = knee(points(*((size, 0.1 + 0.001 * size) for size in sizes)))
    assert found == 2560, "1,900 tokens would cost 19 times the fixed part"


def test_memory_is_extrapolated_along_a_line() -> None:
    assert room(points((100, 1000.0), (200, 1500.0)), 4000) == 700
    assert room(points((100, 1000.0), (200, 1500.0)), 1250) == 150
    assert room(points((100, 1000.0), (200, 1500.0)), 100) == 0
    assert room(points((100, 1000.0)), 4000) == 400
    assert room(points((100, 1000.0), (200, 1000.0)), 4000) == 200, "no growth says nothing of more"


def test_sizes_double_up_to_the_most() -> None:
    assert ladder(256, 2048) == [256, 512, 1024, 2048]
    assert ladder(256, 2047) == [256, 512, 1024]
    assert ladder(256, 100) == [256]


class Device:
    """Simulated passes with a known cost, and the clock that they advance."""

    def __init__(self, cost: Callable[[int], float]) -> None:
        self.cost, self.now, self.sizes = cost, 0.0, list[int]()

    def run(self, tokens: int) -> None:
        self.sizes.append(tokens)
        self.now += self.cost(tokens)

    def measured(self, first: int, most: int, seconds: float) -> list[int]:
        return [point.tokens for point in measure_rates(self.run, first, most, seconds, lambda: self.now)]


def test_measuring_ends_where_the_rate_stays() -> None:
    device = Device(lambda tokens: 0.11 * max(1.0, tokens / 200))
    assert device.measured(100, 10_000, 8) == [100, 200, 400, 800]
    assert device.sizes == [100, 100, 200, 400, 800]


def test_one_slow_pass_does_not_end_it() -> None:
    device = Device(lambda tokens: 0.11 + (1.0 if tokens == 200 else 0.0))
    assert device.measured(100, 1600, 8) == [100, 200, 400, 800, 1600]


def test_short_passes_are_timed_more_than_once() -> None:
    device = Device(lambda tokens: 0.001 + 0.0001 * tokens)
    device.measured(100, 200, 8)
    assert device.sizes == [100] + [100] * 5 + [200] * 5


@given(st.floats(0, 10), st.floats(0.0001, 0.1), st.floats(0.5, 20))
def test_measuring_ends_in_time(fixed: float, by_token: float, seconds: float) -> None:
    device = Device(lambda tokens: fixed + by_token * tokens)
    device.measured(100, 10**6, seconds)
    smallest = 2 * (fixed + by_token * 100)
    assert device.now <= max(seconds + 2 * 0.1 + smallest, 2 * smallest)


def test_a_pass_that_does_not_fit_ends_it_and_the_first_one_must_fit() -> None:
    def run(tokens: int) -> None:
        if tokens > 300:
            raise OUT_OF_MEMORY

    assert [point.tokens for point in measure_rates(run, 100, 10_000)][-1] <= 200
    with pytest.raises(RuntimeError, match="can't allocate"):
        measure_rates(run, 400, 10_000)

    taken = [0]

    def run_with_memory(tokens: int) -> None:
        run(tokens)
        taken[0] = 1000 + 10 * tokens

    assert [point.tokens for point in measure_memory(run_with_memory, lambda: taken[0], 75, 10_000, 10**9)] == [75, 150, 300]
    assert [point.tokens for point in measure_memory(run_with_memory, lambda: taken[0], 25, 10_000, 2100)] == [25, 50, 100]
    with pytest.raises(RuntimeError, match="can't allocate"):
        measure_memory(run_with_memory, lambda: taken[0], 400, 10_000, 10**9)


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def run(tokens: int) -> None:
        if tokens > 100:
            raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="assert"):
        measure_rates(run, 100, 10_000)
    with pytest.raises(RuntimeError, match="assert"):
        measure_memory(run, lambda: 0, 100, 10_000, 10**9)


def test_a_server_measures_its_budget_and_says_so(
    serve: Callable[..., TestClient], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="scalabl"):
        began = time.perf_counter()
        limits = serve(warmup="auto", max_batch_tokens=4096).get("/info").json()["limits"]
    assert limits["target_batch_tokens"] in ladder(256, 4096)
    assert f"passes of {limits['target_batch_tokens']} tokens reach at least 95% of the best rate" in caplog.text
    assert time.perf_counter() - began < 20


def test_a_machine_too_slow_for_a_second_pass_has_no_knee(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalabl_server.engines.budget.measure_rates", lambda run, first, most: [Point(first, 5.0)])
    assert find_budget(lambda tokens: None, torch.device("cpu"), 256, 16384) == 2048
    assert find_budget(lambda tokens: None, torch.device("cpu"), 96, 100) == 96


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({"target_batch_tokens": 300, "warmup": "auto"}, 300),
        ({"target_batch_tokens": 300, "max_batch_tokens": 200}, 200),
        ({"warmup": "quick"}, 2048),
        ({"warmup": "quick", "max_batch_tokens": 1000}, 1000),
        ({"warmup": "auto", "max_batch_tokens": 100}, 96),
    ],
)
def test_a_flag_sets_it_and_quick_starts_measure_nothing(
    serve: Callable[..., TestClient], settings: dict[str, object], budget: int
) -> None:
    assert serve(**settings).get("/info").json()["limits"]["target_batch_tokens"] == budget
