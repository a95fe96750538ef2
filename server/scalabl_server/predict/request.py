"""From a request to token ids: what it asks for, everything that can be wrong with it, and its prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from scalabl.config import AdapterConfig, Task
from scalabl.errors import InputTooLongError, PromptError
from scalabl.prompt import Prompter
from scalabl.uncertainty.adaptive import Rule
from scalabl_server.batching.jobs import check_method, rule_of
from scalabl_server.predict.decisions import level_for, uncalibrated
from scalabl_server.problems import ProblemError
from scalabl_server.schemas import Method, PredictRequest
from scalabl_server.settings import ServeSettings

CHARACTERS_PER_TOKEN = 4  # of English text; for the estimate before a text is tokenised
SHORT_CHARACTERS = 2000  # tokenised in half a millisecond
SLICE_CHARACTERS = 20_000  # tokenised at once, so that a large request does not hold up the small ones


@dataclass(frozen=True)
class Asked:
    """What a request asks for, within the limits. `choices` are the names of each text's choices."""

    texts: list[str]
    choices: list[Sequence[str]]
    method: Method
    num_samples: int  # K, the most of them with a rule; 0 where none are drawn
    rule: Rule | None  # when each input has enough samples, where that is left to the server
    rows: int  # of a pass, which each input costs: its samples, and one for each choice that is linearised
    seed: int
    priority: int
    level: str | None  # the calibrated coverage
    uncalibrated: str | None  # why there is none, although the adapter is calibrated
    truncate: bool
    return_samples: bool
    explain: bool

    def estimated_tokens(self, rows: int, max_tokens: int) -> list[int]:
        """Rows x length of each input, before it is tokenised."""
        return [rows * min(max_tokens, 1 + len(text) // CHARACTERS_PER_TOKEN) for text in self.texts]

    def is_short(self, settings: ServeSettings) -> bool:
        """Whether tokenising takes less time than a change of thread and back is worth: one short text, and draws that are
        kept, since most requests have the same."""
        is_usual = self.seed == settings.seed and (self.rule is not None or self.num_samples in (0, settings.num_samples))
        characters = len(self.texts[0]) + sum(map(len, self.choices[0]))
        return is_usual and len(self.texts) == 1 and characters <= SHORT_CHARACTERS

    def slices(self) -> Iterator[range]:
        """The inputs' positions in runs of few characters."""
        start = characters = 0
        for position, text in enumerate(self.texts):
            if position > start and characters + len(text) > SLICE_CHARACTERS:
                yield range(start, position)
                start, characters = position, 0
            characters += len(text)
        yield range(start, len(self.texts))


def read_request(request: PredictRequest, config: AdapterConfig, settings: ServeSettings, max_tokens: int) -> Asked:
    """Check a request against the adapter and the limits, without work that grows with its texts.

    Args:
        max_tokens: of one prompt.

    Raises:
        ProblemError: `invalid-field` or `input-too-large`, naming field, value and limit.
    """
    check_method(request)
    rule = rule_of(request, settings.max_samples)
    num_samples = 0 if request.method == "linearized" else settings.num_samples
    if rule is not None:
        num_samples = rule.most
    elif isinstance(request.num_samples, int):
        num_samples = request.num_samples
    if num_samples > settings.max_samples:
        raise ProblemError(
            "invalid-field", f"num_samples: {num_samples} is above this server's limit of {settings.max_samples}"
        )
    if abs(request.priority) > settings.max_priority:
        raise ProblemError(
            "invalid-field",
            f"priority: {request.priority} is outside this server's -{settings.max_priority} to {settings.max_priority}"
            if settings.max_priority
            else "priority: this server takes requests as they come; leave the field out",
        )
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    if len(texts) > settings.max_inputs:
        raise ProblemError(
            "input-too-large", f"inputs: {len(texts)} texts are above the limit of {settings.max_inputs} per request"
        )
    limit = settings.longest_text(max_tokens)
    for position, text in enumerate(texts):
        if len(text) > limit and not request.truncate:
            raise ProblemError(
                "input-too-large",
                f"inputs{_at(position, len(texts))}: {len(text)} characters are above the limit of {limit}; shorten the "
                "input or ask for truncate: true",
            )
    choices = _choices_per_input(config.task, request, len(texts), settings)
    if request.return_samples:
        values = num_samples * sum(map(len, choices))
        if values > settings.max_sample_values:
            raise ProblemError(
                "input-too-large",
                f"return_samples: {values} probabilities (inputs x samples x choices) are above the limit of "
                f"{settings.max_sample_values} in one answer; send fewer inputs at once or lower num_samples",
            )
    seed = settings.seed if request.seed is None else request.seed
    drawn: int | Literal["auto"] = num_samples if rule is None else "auto"
    unlike = uncalibrated(config.calibration, request.method, drawn, seed, settings.draw_scheme)
    return Asked(
        texts=[text[:limit] for text in texts] if request.truncate else texts,
        choices=choices,
        method=request.method,
        num_samples=num_samples,
        rule=rule,
        rows=num_samples + (0 if request.method == "monte_carlo" else len(config.task.choices)),
        seed=seed,
        priority=request.priority,
        level=level_for(config.calibration, request.coverage, unlike),
        uncalibrated=unlike,
        truncate=request.truncate,
        return_samples=request.return_samples,
        explain=request.explain,
    )


def _at(position: int, count: int) -> str:
    return f".{position}" if count > 1 else ""


def _choices_per_input(task: Task, request: PredictRequest, count: int, settings: ServeSettings) -> list[Sequence[str]]:
    if task.kind == "classification":
        if request.choices is not None:
            raise ProblemError(
                "invalid-field",
                "choices: this adapter's task is classification with fixed choices; leave the field out",
            )
        return [task.choices] * count
    if request.choices is None:
        raise ProblemError("invalid-field", "choices: this adapter's task is multiple_choice; send the choices to rank")
    lists: list[Sequence[str]] = [each for each in request.choices if not isinstance(each, str)]
    if lists and len(lists) != count:
        raise ProblemError("invalid-field", f"choices: {len(lists)} lists were given for {count} inputs")
    shared = not lists
    if shared:
        lists = [[each for each in request.choices if isinstance(each, str)]]
    for position, names in enumerate(lists):
        where = "" if shared else _at(position, count)
        if len(names) > settings.max_choices:
            raise ProblemError(
                "invalid-field", f"choices{where}: {len(names)} are above the limit of {settings.max_choices}"
            )
        longest = max(map(len, names))
        if longest > settings.max_choice_chars:
            raise ProblemError(
                "invalid-field",
                f"choices{where}: one of {longest} characters is above the limit of {settings.max_choice_chars}",
            )
    return lists * count if shared else lists


def encode(prompter: Prompter, asked: Asked, positions: range, max_tokens: int) -> list[list[int]]:
    """Token ids of some of the inputs. Runs on the prompts' thread.

    Raises:
        ProblemError: `input-too-large` or `invalid-field`, naming the input.
    """
    multiple_choice = prompter.task.kind == "multiple_choice"
    sequences = []
    for position in positions:
        where = _at(position, len(asked.texts))
        names = asked.choices[position] if multiple_choice else None
        try:
            sequences.append(prompter.encode(asked.texts[position], names, max_tokens=max_tokens, truncate=asked.truncate))
        except InputTooLongError as error:
            raise ProblemError("input-too-large", f"inputs{where}: {error.message}") from None
        except PromptError as error:
            raise ProblemError("invalid-field", f"{error.field or 'inputs'}{where}: {error.message}") from None
    return sequences
