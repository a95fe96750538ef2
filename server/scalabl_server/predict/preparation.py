"""Preparing a checked request for the queue: tokenises each input and creates its job."""

from __future__ import annotations

from collections.abc import Iterator

from scalabl.errors import InputTooLongError, PromptError
from scalabl.prompt import Prompter
from scalabl_server.batching.jobs import AdaptiveJob, ControlVariateJob, Job, LinearizedJob, SampledJob
from scalabl_server.engines.interface import Served
from scalabl_server.predict.request import CheckedRequest, place_of
from scalabl_server.problems import ProblemError
from scalabl_server.settings import ServeSettings

SHORT_CHARACTERS = 2000  # tokenising that many takes half a millisecond
SLICE_CHARACTERS = 20_000  # tokenised in one go; limited, so that a large request does not hold up small ones


def is_short(checked: CheckedRequest, settings: ServeSettings) -> bool:
    """Whether preparing a request is faster than handing it to another thread.

    It is for one short text with the default seed and number of samples, because their draws are cached.
    """
    is_usual = checked.seed == settings.seed and (
        checked.rule is not None or checked.num_samples in (0, settings.num_samples)
    )
    characters = len(checked.texts[0]) + sum(map(len, checked.choices[0]))
    return is_usual and len(checked.texts) == 1 and characters <= SHORT_CHARACTERS


def slices(checked: CheckedRequest) -> Iterator[range]:
    """The positions of the inputs, in slices of at most `SLICE_CHARACTERS` or one input each."""
    start = characters = 0
    for position, text in enumerate(checked.texts):
        if position > start and characters + len(text) > SLICE_CHARACTERS:
            yield range(start, position)
            start, characters = position, 0
        characters += len(text)
    yield range(start, len(checked.texts))


def encode(prompter: Prompter, checked: CheckedRequest, positions: range, max_tokens: int) -> list[list[int]]:
    """The token ids of the inputs at these positions. Runs on the prompt thread.

    Raises:
        ProblemError: `input-too-large` or `invalid-field`; it names the input.
    """
    multiple_choice = prompter.task.kind == "multiple_choice"
    sequences = []
    for position in positions:
        where = place_of(position, len(checked.texts))
        names = checked.choices[position] if multiple_choice else None
        try:
            sequences.append(
                prompter.encode(checked.texts[position], names, max_tokens=max_tokens, truncate=checked.truncate)
            )
        except InputTooLongError as error:
            raise ProblemError("input-too-large", error.message, field=f"inputs{where}") from None
        except PromptError as error:
            raise ProblemError("invalid-field", error.message, field=f"{error.field or 'inputs'}{where}") from None
    return sequences


def jobs_for(served: Served, checked: CheckedRequest) -> list[Job]:
    """The job of each input. May have to draw the posterior samples, if they are not cached."""
    own = checked.own_choices(served.config.task)
    if checked.method == "linearized":
        return [LinearizedJob(checked.linear_rows, choices) for choices in own]
    draws = served.draws(checked.num_samples, checked.seed)
    if checked.method == "control_variate":
        return [ControlVariateJob(draws, checked.linear_rows, choices) for choices in own]
    if checked.rule is not None:
        return [AdaptiveJob(draws, choices, checked.rule) for choices in own]
    return [SampledJob(draws, choices) for choices in own]
