"""From a request's texts and choices to token ids, with everything that can be wrong with them."""

from __future__ import annotations

from collections.abc import Sequence

from scalabl.config import Task
from scalabl.errors import InputTooLongError, PromptError
from scalabl.prompt import Prompter
from server.problems import ProblemError
from server.schemas import PredictRequest


def choices_per_input(task: Task, request: PredictRequest, count: int) -> list[Sequence[str]]:
    """The names of each input's choices.

    Raises:
        ProblemError: `invalid-field`, when the request's `choices` fit neither the task nor the inputs.
    """
    if task.kind == "classification":
        if request.choices is not None:
            raise ProblemError(
                "invalid-field",
                "choices: this adapter's task is classification with fixed choices; leave the field out",
            )
        return [task.choices] * count
    if request.choices is None:
        raise ProblemError("invalid-field", "choices: this adapter's task is multiple_choice; send the choices to rank")
    per_input: list[Sequence[str]] = [each for each in request.choices if not isinstance(each, str)]
    if not per_input:
        return [[each for each in request.choices if isinstance(each, str)]] * count
    if len(per_input) != count:
        raise ProblemError("invalid-field", f"choices: {len(per_input)} lists were given for {count} inputs")
    return per_input


def encode(
    prompter: Prompter, texts: Sequence[str], choices: Sequence[Sequence[str]], max_tokens: int, truncate: bool
) -> list[list[int]]:
    """Token ids of each text's prompt. Runs on the prompts' thread.

    Raises:
        ProblemError: `input-too-large` or `invalid-field`, naming the input.
    """
    multiple_choice = prompter.task.kind == "multiple_choice"
    sequences = []
    for position, (text, names) in enumerate(zip(texts, choices, strict=True)):
        where = f".{position}" if len(texts) > 1 else ""
        try:
            sequences.append(
                prompter.encode(text, names if multiple_choice else None, max_tokens=max_tokens, truncate=truncate)
            )
        except InputTooLongError as error:
            raise ProblemError("input-too-large", f"inputs{where}: {error.message}") from None
        except PromptError as error:
            raise ProblemError("invalid-field", f"{error.field or 'inputs'}{where}: {error.message}") from None
    return sequences
