"""From a checked request to what the queue takes: each input's token ids and its job."""

from __future__ import annotations

from collections.abc import Iterator

from scalabl.errors import InputTooLongError, PromptError
from scalabl.prompt import Prompter
from scalabl_server.batching.jobs import AdaptiveJob, ControlVariateJob, Job, LinearizedJob, SampledJob
from scalabl_server.engines.interface import Served
from scalabl_server.predict.request import Asked, place_of
from scalabl_server.problems import ProblemError
from scalabl_server.settings import ServeSettings

SHORT_CHARACTERS = 2000  # tokenised in half a millisecond
SLICE_CHARACTERS = 20_000  # tokenised at once, so that a large request does not hold up the small ones


def is_short(asked: Asked, settings: ServeSettings) -> bool:
    """Whether preparing a request takes less time than a change of thread and back.

    So it is for one short text with the draws that most requests have, since these are kept.
    """
    is_usual = asked.seed == settings.seed and (asked.rule is not None or asked.num_samples in (0, settings.num_samples))
    characters = len(asked.texts[0]) + sum(map(len, asked.choices[0]))
    return is_usual and len(asked.texts) == 1 and characters <= SHORT_CHARACTERS


def slices(asked: Asked) -> Iterator[range]:
    """The inputs' positions in runs of few characters."""
    start = characters = 0
    for position, text in enumerate(asked.texts):
        if position > start and characters + len(text) > SLICE_CHARACTERS:
            yield range(start, position)
            start, characters = position, 0
        characters += len(text)
    yield range(start, len(asked.texts))


def encode(prompter: Prompter, asked: Asked, positions: range, max_tokens: int) -> list[list[int]]:
    """Token ids of some of the inputs. Runs on the prompts' thread.

    Raises:
        ProblemError: `input-too-large` or `invalid-field`, naming the input.
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
    """What each input of a request asks of the engine. Its draws may have to be made."""
    counts = [len(names) for names in asked.choices]
    if asked.method == "linearized":
        return [LinearizedJob(asked.linear_rows, count) for count in counts]
    draws = served.draws(asked.num_samples, asked.seed)
    if asked.method == "control_variate":
        return [ControlVariateJob(draws, asked.linear_rows, count) for count in counts]
    if asked.rule is not None:
        return [AdaptiveJob(draws, count, asked.rule) for count in counts]
    return [SampledJob(draws, count) for count in counts]
