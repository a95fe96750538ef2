"""Admission to the queue: what fits, what is refused and why, and that every place is released."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scalabl_server.batching.admission import Admission
from scalabl_server.observe.metrics import Metrics
from scalabl_server.problems import ProblemError


def admission(max_inputs: int = 10, max_tokens: int = 1000) -> Admission:
    return Admission(max_inputs, max_tokens, Metrics())


@pytest.mark.parametrize(
    ("waiting", "asked", "slug", "said"),
    [
        ([1] * 8, [1] * 3, "queue-full", "8 inputs wait and the queue is limited to 10; this request has 3"),
        ([900], [101], "queue-full", "900 tokens .* wait and the queue is limited to 1000; this request adds about 101"),
        ([], [1] * 11, "input-too-large", "11 inputs never fit in the queue of 10 inputs; send fewer"),
        (
            [],
            [600, 401],
            "input-too-large",
            "about 1001 tokens .* never fit in the queue of 1000 tokens; .* lower num_samples",
        ),
    ],
)
def test_what_does_not_fit_is_refused_whole(waiting: list[int], asked: list[int], slug: str, said: str) -> None:
    queue = admission()
    held = queue.enter(waiting, 60) if waiting else []
    with pytest.raises(ProblemError, match=said) as caught:
        queue.enter(asked, 60)
    assert caught.value.kind == slug
    assert (caught.value.retry_after is not None) == (slug == "queue-full")
    assert (queue.inputs, queue.tokens) == (len(waiting), sum(waiting))
    for place in held:
        place.free()
    assert (queue.inputs, queue.tokens) == (0, 0)


def test_what_fills_the_queue_exactly_is_taken() -> None:
    queue = admission()
    queue.enter([100] * 10, 60)
    assert (queue.inputs, queue.tokens) == (10, 1000)


def test_the_tokens_are_corrected_once_they_are_known_and_checked_again() -> None:
    queue = admission()
    places = queue.enter([100, 100], 60)
    queue.settle(places, [10, 300])
    assert queue.tokens == 310
    other = queue.enter([600], 60)
    with pytest.raises(ProblemError, match="this request adds about 91") as caught:
        queue.settle(other, [691])
    assert caught.value.kind == "queue-full"
    queue.settle(other, [690])
    with pytest.raises(ProblemError, match="about 1001 tokens"):
        queue.settle(other, [1001])
    for place in places + other:
        place.free()
    assert (queue.inputs, queue.tokens) == (0, 0)


def test_a_place_comes_back_once() -> None:
    queue = admission()
    kept, given = queue.enter([5, 7], 60)
    given.free()
    given.free()
    given.resize(99)
    assert (queue.inputs, queue.tokens) == (1, 5)
    kept.free()
    assert (queue.inputs, queue.tokens) == (0, 0)


def test_what_could_not_be_answered_in_time_is_refused_with_the_time_to_come_back() -> None:
    queue = admission()
    assert queue.expected_wait(10**6) == 0, "nothing is known before the first pass"
    for _ in range(50):
        queue.observe_pass(tokens=100, seconds=1.0)
    queue.enter([500], 60)
    queue.running_tokens = 100
    assert queue.expected_wait(600) == pytest.approx(6)
    with pytest.raises(
        ProblemError, match=r"need about 6\.0 s more, which is too long for this request's deadline of 11 s"
    ) as caught:
        queue.enter([1], 11)
    assert caught.value.retry_after == pytest.approx(6)
    queue.enter([1], 13)


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 400), min_size=1, max_size=4)), max_size=40))
def test_the_counts_are_those_of_the_places_held_and_never_above_the_bounds(steps: list[tuple[int, list[int]]]) -> None:
    queue = admission()
    held: list[tuple[object, list[int]]] = []
    for action, tokens in steps:
        try:
            if action < 2:
                held.append((queue.enter(tokens, 60), tokens))
            elif held and action == 2:
                places, old = held[0]
                new = (tokens * 4)[: len(old)]
                queue.settle(places, new)  # type: ignore[arg-type]
                held[0] = (places, new)
            elif held:
                for place in held.pop(0)[0]:  # type: ignore[attr-defined]
                    place.free()
        except ProblemError:
            pass
        assert queue.inputs == sum(len(tokens) for _, tokens in held) <= 10
        assert queue.tokens == sum(sum(tokens) for _, tokens in held) <= 1000


def test_a_request_waits_for_what_goes_before_it_and_not_for_later_priorities() -> None:
    queue = admission()
    for _ in range(50):
        queue.observe_pass(tokens=100, seconds=1.0)
    places = queue.enter([500], 60, priority=3)
    queue.running_tokens = 100
    queue.enter([1], 11, priority=2)
    with pytest.raises(ProblemError, match=r"need about 6\.0 s more"):
        queue.enter([1], 11, priority=3)
    with pytest.raises(ProblemError, match=r"501 tokens .* wait and the queue is limited to 1000"):
        queue.enter([500], 60, priority=-10)
    places[0].resize(5)
    queue.enter([1], 11, priority=3)
    places[0].free()
    assert queue.tokens == 2
