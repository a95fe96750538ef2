"""What commands share: options made from pydantic models, so that a field's name, default, limits and help stand in one
place, and errors as messages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scalabl.config import CLASSIFICATION_TEMPLATE, MULTIPLE_CHOICE_TEMPLATE, Task, TaskKind
from scalabl.errors import ScalaBLError


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """What the method refuses is a message and exit status 1, not a stack trace."""
    try:
        yield
    except ScalaBLError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


def split(text: str) -> tuple[Any, ...]:
    """The parts of a comma-separated option, for a pydantic field to parse."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


@contextmanager
def usage_errors() -> Iterator[None]:
    """What a pydantic model refuses is a usage error of the option that its field is named after, exit status 2."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        # The field's own name stands last but for indices: task.choices.0 is --choices.
        names = [part for part in first["loc"] if isinstance(part, str)]
        given = f" (got {first['input']!r})" if names else ""
        option = "--" + names[-1].replace("_", "-") if names else None
        raise typer.BadParameter(first["msg"].removeprefix("Value error, ") + given, param_hint=option) from None


def command_for(model: type[BaseModel], run: Callable[..., None], env_prefix: str = "") -> Callable[..., None]:
    """A typer command with one option per field of `model`, beside the parameters of `run` other than its first.

    `run` gets the validated model first. What validation refuses is reported under the option's name, exit status 2.

    Args:
        env_prefix: when given, each of the model's options can come from the variable `<env_prefix><FIELD>` as well.
    """
    fields = model.model_fields
    own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]

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
            # Every default is the model's to fill in; None says that the option was not given.
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
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + generated
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
    """The plain type that typer parses; limits and literals are checked by the model."""
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    plain = str if isinstance(kinds[0], str) or kinds[0] is SecretStr else kinds[0]
    return plain | None


def task_of(
    kind: TaskKind,
    template: str | None,
    chat: bool,
    choice_prefix: str | None,
    choices: tuple[str, ...],
    choice_tokens: tuple[str, ...] | None = None,
) -> Task:
    """The task that options describe, with the defaults of its kind.

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
    }
    return Task.model_validate(fields)
