"""Choosing the inputs of the next pass: budgets, order, padding, and that no input waits forever."""

from __future__ import annotations

import itertools
from bisect import insort
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from scalabl_server.batching.selection import FIXED_SHARE, MOST_OVERTAKEN, PRIORITY_SECONDS, Choice, QueuedInput, select

numbers = itertools.count()


def queued(
    length: int = 10, rows: int = 2, target: str = "x", came: float = 0.0, priority: int = 0, peak: int | None = None
) -> QueuedInput[str]:
    """A queued input without a real job and result: the choice does not use them."""
    order = (came + PRIORITY_SECONDS * priority, next(numbers))
    at_once = rows if peak is None else peak
    nothing = cast(Any, None)
    return QueuedInput(target, [1] * length, nothing, rows, at_once, place=nothing, result=nothing, order=order)


def choose(waiting: list[QueuedInput[str]], target: int, most: int, pads: bool = True) -> Choice[str]:
    return select(waiting, target, most, lambda _: pads)


inputs = st.builds(
    queued,
    length=st.integers(1, 60),
    rows=st.integers(1, 20),
    target=st.sampled_from("xyz"),
    came=st.floats(0, 10),
    priority=st.integers(-3, 3),
)
queues = st.lists(inputs, min_size=1, max_size=40).map(lambda made: sorted(made, key=lambda each: each.order))
budgets = st.integers(1, 1500)


def padded(choice: Choice[str]) -> int:
    return sum(each.rows for each in choice.inputs) * max(each.length for each in choice.inputs)


@given(queues, budgets, st.integers(1200, 3000))
def test_the_first_is_in_it_and_the_budgets_hold_but_for_a_single_input(
    waiting: list[QueuedInput[str]], target: int, most: int
) -> None:
    choice = choose(waiting, target, most)
    assert choice.inputs[0] is waiting[0]
    assert len({id(each) for each in choice.inputs}) == len(choice.inputs)
    assert all(each in waiting and each.target == waiting[0].target for each in choice.inputs)
    assert padded(choice) <= target or len(choice.inputs) == 1
    held = sum(each.rows_at_once for each in choice.inputs) * max(each.length for each in choice.inputs)
    assert held <= most or len(choice.inputs) == 1


@given(queues, budgets, st.integers(1200, 3000))
def test_without_padding_the_budgets_count_real_tokens_and_inputs_go_as_they_came(
    waiting: list[QueuedInput[str]], target: int, most: int
) -> None:
    choice = choose(waiting, target, most, pads=False)
    assert choice.inputs[0] is waiting[0]
    assert sum(each.tokens for each in choice.inputs) <= target or len(choice.inputs) == 1
    alike = [each for each in waiting if each.target == waiting[0].target]
    room = target - waiting[0].tokens
    expected = [waiting[0]]
    for each in alike[1:]:
        if each.tokens <= room and sum(one.tokens for one in [*expected, each]) <= most:
            expected.append(each)
            room -= each.tokens
    assert choice.inputs == expected


@given(queues, budgets)
def test_the_order_is_kept_within_a_pass_and_among_equals(waiting: list[QueuedInput[str]], target: int) -> None:
    choice = choose(waiting, target, 10**6)
    assert [each.order for each in choice.inputs] == sorted(each.order for each in choice.inputs)
    for stays in choice.overtaken:
        assert stays not in choice.inputs
        assert stays.order < choice.inputs[-1].order
        for goes in choice.inputs[1:]:
            equal = (goes.target, goes.length, goes.rows) == (stays.target, stays.length, stays.rows)
            assert not equal or goes.order < stays.order, "an equal that came later went first"


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=2, max_size=40), st.integers(100, 5000))
def test_what_joins_adds_less_padding_than_another_pass_would_cost(shapes: list[tuple[int, int]], target: int) -> None:
    choice = choose([queued(length, rows) for length, rows in shapes], target, 10**6)
    real = sum(each.tokens for each in choice.inputs)
    assert padded(choice) - real <= FIXED_SHARE * target * (len(choice.inputs) - 1)


def test_those_of_like_length_are_preferred_to_those_that_came_before_them() -> None:
    first, long, like, short, other = (queued(each, rows=1) for each in (20, 40, 21, 10, 20))
    choice = choose([first, long, like, short, other], 64, 10**6)
    assert choice.inputs == [first, like, other]
    assert choice.overtaken == [long, short]
    assert choice.full


def test_when_little_waits_a_small_difference_does_not_keep_inputs_apart() -> None:
    waiting = [queued(each, rows=1) for each in (20, 23, 17)]
    choice = choose(waiting, 200, 10**6)
    assert choice.inputs == waiting
    assert not choice.full


def test_the_most_that_a_pass_may_hold_bounds_it_beside_what_is_expected() -> None:
    waiting = [queued(10, rows=8, peak=32) for _ in range(6)]
    assert len(choose(waiting, 10**6, 1000).inputs) == 3
    assert len(choose(waiting, 170, 1000).inputs) == 2


@st.composite
def streams(draw: st.DrawFn) -> list[list[QueuedInput[str]]]:
    """Arrivals before each pass, drawn at random, to find an order in which an input would wait forever."""
    return [
        [
            queued(draw(st.integers(1, 40)), draw(st.integers(1, 8)), draw(st.sampled_from("xy")), float(step))
            for _ in range(draw(st.integers(0, 5)))
        ]
        for step in range(draw(st.integers(1, 25)))
    ]


def run(stream: list[list[QueuedInput[str]]], target: int) -> list[Choice[str]]:
    """Run passes as the batcher would, until the queue is empty."""
    waiting: list[QueuedInput[str]] = []
    passes = []
    arrivals = iter(stream)
    while True:
        arrived = next(arrivals, None)
        for each in arrived or []:
            insort(waiting, each, key=lambda one: one.order)
        if not waiting:
            if arrived is None:
                return passes
            continue
        choice = choose(waiting, target, 10**6)
        passes.append(choice)
        for each in choice.overtaken:
            each.overtaken += 1
        waiting = [each for each in waiting if each not in choice.inputs]


@given(streams(), st.integers(20, 400))
def test_every_input_runs_once_and_is_overtaken_in_a_bounded_number_of_passes(
    stream: list[list[QueuedInput[str]]], target: int
) -> None:
    everything = [each for arrived in stream for each in arrived]
    passes = run(stream, target)
    ran = [each for choice in passes for each in choice.inputs]
    assert sorted(map(id, ran)) == sorted(map(id, everything))
    place = {id(each): number for number, choice in enumerate(passes) for each in choice.inputs}
    for each in everything:
        before = {
            place[id(other)] for other in everything if other.order > each.order and place[id(other)] < place[id(each)]
        }
        assert len(before) <= MOST_OVERTAKEN


def test_an_odd_one_out_goes_in_time_although_its_likes_never_come() -> None:
    odd = queued(60, rows=4, came=0.5)
    stream = [[queued(3, rows=4, came=float(step)) for _ in range(40)] for step in range(30)]
    stream[0].append(odd)
    passes = run(stream, 240)
    number = next(number for number, choice in enumerate(passes) if odd in choice.inputs)
    assert number <= 2 * MOST_OVERTAKEN


def test_a_step_of_priority_is_worth_a_second_of_waiting() -> None:
    early, urgent, late = queued(came=0.0), queued(came=0.5, priority=-1), queued(came=1.5, priority=-1)
    assert sorted([late, early, urgent], key=lambda each: each.order) == [urgent, early, late]
