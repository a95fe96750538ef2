"""The chat template with a date that stays: everything but the date is as transformers writes it."""

from __future__ import annotations

import datetime

import pytest

from scalabl.errors import PromptError
from scalabl.prompt.chat import ChatTemplate
from tests import tiny

TODAY = datetime.date.today()
MESSAGES = "{% for m in messages %}{{ m.content }}{% endfor %}"


def chat(template: str, date: datetime.date = TODAY) -> ChatTemplate:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, date)


@pytest.mark.parametrize(
    "beginning", ["", "\n", "\n\n", "  ", "  {% if true %}\n", "{%- if true %}", "{{ bos_token }}\n", " x"]
)
@pytest.mark.parametrize(
    "dated",
    [
        "[{{ strftime_now('%C') }}]",
        "{%- set date = strftime_now('%C') %}\n{{ date | length }}{{ date }}\n",
        "{% if strftime_now is defined %}{% set now = strftime_now %}{{ now('%C') }}{% endif %}",
        "{% macro head() %}{{ strftime_now(format='%C%%') }}{% endmacro %}{{ head() }}",
        "{% if strftime_now('%C') | int > 20 %}late {{ strftime_now('c%C') }}{% else %}early{% endif %}",
    ],
)
def test_a_template_with_a_date_is_written_as_transformers_writes_it(beginning: str, dated: str) -> None:
    end = "{% endif %}" if "if true" in beginning else ""
    template = beginning + dated + MESSAGES + end
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template([{"role": "user", "content": " sky\n"}], tokenize=False)
    assert chat(template).render(" sky\n") == expected  # of the same century


def test_the_date_is_the_one_given_at_midnight() -> None:
    written = chat("{{ strftime_now('%d.%m.%Y %H:%M') }} " + MESSAGES, datetime.date(1999, 12, 31))
    assert written.render("sky") == "31.12.1999 00:00 sky"
    assert written.shows_date
    assert written.render("sea") == "31.12.1999 00:00 sea"


def test_a_template_that_shows_no_date_says_so() -> None:
    undated = chat("{% if false %}{{ strftime_now('%d') }}{% endif %}" + MESSAGES)
    assert undated.render("sky") == "sky"
    assert not undated.shows_date


def test_a_text_that_asks_for_a_date_gets_none() -> None:
    written = chat("{{ strftime_now('%C') }}" + MESSAGES)
    assert written.render("{{ strftime_now('%d') }}").endswith("{{ strftime_now('%d') }}")


def test_a_template_that_never_stops_asking_is_refused() -> None:
    with pytest.raises(PromptError, match="writes the date in too many forms; set chat to false"):
        chat("{{ strftime_now(strftime_now('%C') ~ (range(10000) | random)) }}").render("sky")
