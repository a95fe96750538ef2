"""What a task may say."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from scalabl.config import AdapterConfig, Task
from tests import tiny

LETTERED = {"kind": "multiple_choice", "template": "{input} {choices}", "choices": ("A", "B")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "Label:"}, r"template has no \{input\} placeholder"),
        ({"template": "{text}"}, r"template has an unknown placeholder \{text\}; use \{input\} and \{choices\}"),
        ({"template": "{input} {"}, "template is not a valid format string"),
        ({"template": "{input} {}"}, r"template has an unknown placeholder \{\}"),
        ({"template": "{input.__class__}"}, r"unknown placeholder \{input.__class__\}"),
        (LETTERED | {"template": "{input}"}, r"template has no \{choices\} placeholder"),
        ({"choices": ("red",)}, "at least 2 items"),
        ({"choices": ("red", "")}, "at least 1 character"),
        ({"choices": ("red", "blue", "red")}, "choices are not distinct: 'red' appears twice"),
        ({"choice_tokens": (1, 2)}, "choice_tokens has 2 entries for 3 choices"),
        ({"choice_tokens": (1, 2, 1)}, "choices 'red' and 'blue' share the token 1"),
        ({"choice_tokens": (1, 2, -1)}, "greater than or equal to 0"),
        ({"labels": ()}, "Extra inputs are not permitted"),
    ],
)
def test_a_task_that_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Task.model_validate(tiny.CLASSIFICATION.model_dump() | fields)


def test_literal_braces_are_allowed() -> None:
    assert Task(kind="classification", template="{{json}} {input}", choices=("a", "b")).template == "{{json}} {input}"


def test_a_config_survives_its_own_json() -> None:
    config = tiny.config_for(layers_to_transform=(0,), temperature=1.5, posterior_scale=0.5)
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config
    assert config.scaling == 2.0
