"""What a request asks for, and everything that can be wrong with it, without work that grows with its texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scalabl.config import AdapterConfig, Task
from scalabl.uncertainty.adaptive import Rule
from scalabl_server.batching.jobs import AdaptiveJob
from scalabl_server.batching.row_demand import RowDemand
from scalabl_server.methods import Method
from scalabl_server.predict.checks import check_method, level_for, rule_of, uncalibrated
from scalabl_server.problems import ProblemError
from scalabl_server.schemas.prediction import PredictRequest
from scalabl_server.settings import ServeSettings

CHARACTERS_PER_TOKEN = 4  # of English text; for the estimate before a text is tokenised


@dataclass(frozen=True)
class Asked:
    """What a request asks for, within the limits. `choices` are the names of each text's choices."""

    texts: list[str]
    choices: list[Sequence[str]]
    method: Method
    num_samples: int  # K, the most of them with a rule; 0 where none are drawn
    rule: Rule | None  # when each input has enough samples, where that is left to the server
    linear_rows: int  # of its linearisation, one for each choice of the adapter; 0 where there is none
    seed: int
    priority: int
    level: str | None  # the calibrated coverage
    uncalibrated: str | None  # why there is none, although the adapter is calibrated
    truncate: bool
    return_samples: bool
    explain: bool

    @property
    def demand(self) -> RowDemand:
        """The rows of each input: its samples, and those of its linearisation."""
        if self.rule is not None:
            return AdaptiveJob.demand_of(self.rule)
        return RowDemand.fixed(self.num_samples + self.linear_rows)

    def estimated_tokens(self, rows: int, max_tokens: int) -> list[int]:
        """Rows x length of each input, before it is tokenised."""
        return [rows * min(max_tokens, 1 + len(text) // CHARACTERS_PER_TOKEN) for text in self.texts]


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
            "invalid-field", f"{num_samples} is above this server's limit of {settings.max_samples}", field="num_samples"
        )
    if abs(request.priority) > settings.max_priority:
        raise ProblemError(
            "invalid-field",
            f"{request.priority} is outside this server's -{settings.max_priority} to {settings.max_priority}"
            if settings.max_priority
            else "this server takes requests as they come; leave the field out",
            field="priority",
        )
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    if len(texts) > settings.max_inputs:
        raise ProblemError(
            "input-too-large", f"{len(texts)} texts are above the limit of {settings.max_inputs} per request", field="inputs"
        )
    limit = settings.longest_text(max_tokens)
    for position, text in enumerate(texts):
        if len(text) > limit and not request.truncate:
            raise ProblemError(
                "input-too-large",
                f"{len(text)} characters are above the limit of {limit}; shorten the input or ask for truncate: true",
                field=f"inputs{place_of(position, len(texts))}",
            )
    choices = _choices_per_input(config.task, request, len(texts), settings)
    if request.return_samples:
        values = num_samples * sum(map(len, choices))
        if values > settings.max_sample_values:
            raise ProblemError(
                "input-too-large",
                f"{values} probabilities (inputs x samples x choices) are above the limit of "
                f"{settings.max_sample_values} in one answer; send fewer inputs at once or lower num_samples",
                field="return_samples",
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
        linear_rows=0 if request.method == "monte_carlo" else len(config.task.choices),
        seed=seed,
        priority=request.priority,
        level=level_for(config.calibration, request.coverage, unlike),
        uncalibrated=unlike,
        truncate=request.truncate,
        return_samples=request.return_samples,
        explain=request.explain,
    )


def place_of(position: int, count: int) -> str:
    """What names one of `count` inputs behind a field's name; empty where there is only one."""
    return f".{position}" if count > 1 else ""


def _choices_per_input(task: Task, request: PredictRequest, count: int, settings: ServeSettings) -> list[Sequence[str]]:
    if task.kind == "classification":
        if request.choices is not None:
            raise ProblemError(
                "invalid-field",
                "this adapter's task is classification with fixed choices; leave the field out",
                field="choices",
            )
        return [task.choices] * count
    if request.choices is None:
        raise ProblemError(
            "invalid-field", "this adapter's task is multiple_choice; send the choices to rank", field="choices"
        )
    lists: list[Sequence[str]] = [names for names in request.choices if not isinstance(names, str)]
    if lists and len(lists) != count:
        raise ProblemError("invalid-field", f"{len(lists)} lists were given for {count} inputs", field="choices")
    shared = not lists
    if shared:
        lists = [[name for name in request.choices if isinstance(name, str)]]
    for position, names in enumerate(lists):
        where = "" if shared else place_of(position, count)
        if len(names) > settings.max_choices:
            raise ProblemError(
                "invalid-field", f"{len(names)} are above the limit of {settings.max_choices}", field=f"choices{where}"
            )
        longest = max(map(len, names))
        if longest > settings.max_choice_chars:
            raise ProblemError(
                "invalid-field",
                f"one of {longest} characters is above the limit of {settings.max_choice_chars}",
                field=f"choices{where}",
            )
    return lists * count if shared else lists
