"""Shortening text, and the message of a problem, which quotes what a client sent."""

from __future__ import annotations

from scalabl_server.problems import LONGEST_MESSAGE, ProblemError
from scalabl_server.text import quoted, shortened


def test_only_what_is_longer_than_the_limit_is_shortened() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("abcd", 3) == "abc…"


def test_quoted_text_shows_its_control_characters() -> None:
    assert quoted("a\nbcd", 3) == r"'a\nb…'"


def test_a_problem_names_its_field_first_and_has_a_bounded_message() -> None:
    assert ProblemError("invalid-field", "send a number", field="seed").message == "seed: send a number"
    problem = ProblemError("invalid-field", "x" * 3000, field="seed")
    assert str(problem) == problem.message == "seed: " + "x" * (LONGEST_MESSAGE - 6) + "…"
    assert problem.detail == "x" * 3000
