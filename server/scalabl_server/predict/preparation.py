"""Preparing a checked request for the queue: tokenises each input and creates its job."""

from __future__ import annotations

from collections.abc import Iterator

from scalabl.errors import InputTooLongError, PromptError
from scalabl.prompt import Prompter
from scalabl_server.batching.jobs import AdaptiveJob, ControlVariateJob, Job, LinearizedJob, SampledJob
from scalabl_server.engines.interface import Served
from scalabl_server.predict.request import Asked, place_of
from scalabl_server.problems import ProblemError
from scalabl_server.settings import ServeSettings

SHORT_CHARACTERS = 2000  # tokenising that many takes half a millisecond
SLICE_CHARACTERS = 20_000  # tokenised in one go; limited, so that a large request does not hold up small ones


def is_short(asked: Asked, settings: ServeSettings) -> bool:
    """Whether preparing a request is faster than handing it to another thread.

    It is for one short text with the default seed and number of samples, because their draws are cached.
    """
    is_usual = asked.seed == settings.seed and (asked.rule is not None or asked.num_samples in (0, settings.num_samples))
    characters = len(asked.texts[0]) + sum(map(len, asked.choices[0]))
    return is_usual and len(asked.texts) == 1 and characters <= SHORT_CHARACTERS


def slices(asked: Asked) -> Iterator[range]:
    """The positions of the inputs, in slices of at most `SLICE_CHARACTERS` or one input each."""
    start = characters = 0
    for position, text in enumerate(asked.texts):
        if position > start and characters + len(text) > SLICE_CHARACTERS:
            yield range(start, position)
            start, characters = position, 0
        characters += len(text)
    yield range(start, len(asked.texts))


def encode(prompter: Prompter, asked: Asked, positions: range, max_tokens: int) -> list[list[int]]:
    """The token ids of the inputs at these positions. Runs on the prompt thread.

    Raises:
        ProblemError: `input-too-large` or `invalid-field`; it names the input.
    """
    multiple_choice = prompter.task.kind == "multiple_choice"
    sequences = []
    for position in positions:
        where = place_of(position, len(asked.texts))
        names = asked.choices[position] if multiple_choice else None
        try:
            sequences.append(prompter.encode(asked.texts[position], names, max_tokens=max_tokens, truncate=asked.truncate))
        except InputTooLongError as error:
            raise ProblemError("input-too-large", error.message, field=f"inputs{where}") from None
        except PromptError as error:
            raise ProblemError("invalid-field", error.message, field=f"{error.field or 'inputs'}{where}") from None
    return sequences


def jobs_for(served: Served, asked: Asked) -> list[Job]:
    """The job of each input. May have to draw the posterior samples, if they are not cached."""
    counts = [len(names) for names in asked.choices]
    if asked.method == "linearized":
        return [LinearizedJob(asked.linear_rows, count) for count in counts]
    draws = served.draws(asked.num_samples, asked.seed)
    if asked.method == "control_variate":
        return [ControlVariateJob(draws, asked.linear_rows, count) for count in counts]
    if asked.rule is not None:
        return [AdaptiveJob(draws, count, asked.rule) for count in counts]
    return [SampledJob(draws, count) for count in counts]
