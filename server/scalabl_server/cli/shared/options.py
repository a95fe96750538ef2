"""Shared by all subcommands: options generated from pydantic models, and their usage errors. No subcommand is here.

A field of a pydantic model is the only place for an option's name, default, limits and help.
"""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scalabl.config import CLASSIFICATION_TEMPLATE, MULTIPLE_CHOICE_TEMPLATE, SpecialTokensInText, Task, TaskKind
from scalabl.errors import DatasetError

SpecialTokens = Annotated[
    SpecialTokensInText,
    typer.Option(
        help="Special tokens, such as <|im_start|>, that stand in an input: encode them as text, or as control tokens."
    ),
]

LARGEST_SEED = 2**63 - 1  # of posterior samples, as `posterior.draw` demands
MOST_SAMPLES = 2**20  # posterior samples of one command


def split(text: str) -> tuple[Any, ...]:
    """The parts of a comma-separated option of names or numbers, for a pydantic field to parse. Free text has commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def given_labels(file: Path | None, names: list[str] | None) -> tuple[str, ...]:
    """The labels that --labels or --label give, as they are: a label may have commas, and spaces at its ends.

    Raises:
        BadParameter: there are none, both options are given, or the file cannot be read.
    """
    if (file is None) == (not names):
        raise typer.BadParameter("give each label by --label, or all of them in a file by --labels", param_hint="--label")
    if file is not None:
        from scalabl.evaluation.dataset.examples import read_labels

        try:
            return read_labels(file)
        except DatasetError as error:
            raise typer.BadParameter(str(error), param_hint="--labels") from None
    assert names is not None
    if len(names) == 1 and "," in names[0]:
        raise typer.BadParameter(
            f"{names[0]!r} is one label, because labels may have commas; repeat --label for each", param_hint="--label"
        )
    return tuple(names)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Report a pydantic validation error as a usage error of the option named after the field, exit status 2."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        # The last name in the location is the field's own: task.choices.0 is --choices.
        names = [part for part in first["loc"] if isinstance(part, str)]
        value = f" (got {first['input']!r})" if names else ""
        option = "--" + names[-1].replace("_", "-") if names else None
        raise typer.BadParameter(first["msg"].removeprefix("Value error, ") + value, param_hint=option) from None


def command_for(model: type[BaseModel], run: Callable[..., None], env_prefix: str = "") -> Callable[..., None]:
    """A typer command with one option per field of `model` and one per parameter of `run` after its first.

    The command calls `run` with the validated model first. A validation error is reported under the option's name, exit
    status 2.

    Args:
        env_prefix: if set, each option of the model can also be set by the environment variable `<env_prefix><FIELD>`.
    """
    fields = model.model_fields
    run_parameters = list(inspect.signature(run, eval_str=True).parameters.values())[1:]

    def command(**values: Any) -> None:
        chosen = {name: value for name, value in values.items() if name in fields and value is not None}
        others = {name: value for name, value in values.items() if name not in fields}
        with usage_errors():
            settings = model(**chosen)
        run(settings, **others)

    generated = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            # None means that the option was not set; the model then fills in its default.
            default=typer.Option(
                ... if field.is_required() else None,
                help=_help(field),
                envvar=f"{env_prefix}{name.upper()}" if env_prefix else None,
                show_envvar=bool(env_prefix),
            ),
            annotation=_cli_type(field),
        )
        for name, field in fields.items()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in run_parameters] + generated
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = run.__doc__
    return command


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    options = _literal_values(field)
    if options and options[0] not in text:
        text += f" One of: {', '.join(options)}."
    if field.default is not PydanticUndefined and field.default is not None:
        text += f" \\[default: {field.default}]"
    return text


def _literal_values(field: FieldInfo) -> tuple[str, ...]:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _cli_type(field: FieldInfo) -> Any:
    """The plain type that typer parses. The model checks limits and literal values."""
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    plain = str if isinstance(kinds[0], str) or kinds[0] is SecretStr else kinds[0]
    return plain | None


def task_of(
    kind: TaskKind,
    template: str | None,
    chat: bool,
    choice_prefix: str | None,
    choices: tuple[str, ...],
    special_tokens_in_text: SpecialTokensInText,
    choice_tokens: tuple[str, ...] | None = None,
    chat_date: datetime.date | None = None,
) -> Task:
    """The task described by the options, with the defaults for its kind.

    Args:
        chat_date: the date in prompts whose chat template writes one; None for today.

    Raises:
        ValidationError: see `Task`.
    """
    fields = {
        "kind": kind,
        "template": template or (MULTIPLE_CHOICE_TEMPLATE if kind == "multiple_choice" else CLASSIFICATION_TEMPLATE),
        "choices": choices,
        "choice_tokens": choice_tokens,
        "chat": chat,
        "choice_prefix": choice_prefix if choice_prefix is not None else ("" if chat else " "),
        "special_tokens_in_text": special_tokens_in_text,
        "chat_date": chat_date,
    }
    return Task.model_validate(fields)


def own_head_task(
    template: str | None,
    chat: bool,
    choices: tuple[str, ...],
    special_tokens_in_text: SpecialTokensInText,
    kind: TaskKind = "classification",
    chat_date: datetime.date | None = None,
) -> Task:
    """The task of an adapter that has a head of its own: a classification whose choices have no tokens.

    Raises:
        ValidationError: see `Task`.
    """
    task = task_of(kind, template, chat, "", choices, special_tokens_in_text, chat_date=chat_date)
    return Task.model_validate({**task.model_dump(), "head": "own"})
