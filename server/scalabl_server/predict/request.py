"""Checking a request against the adapter and the limits, before its texts are tokenised. Method checks are in `checks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scalabl.config import AdapterConfig, Task
from scalabl.uncertainty.absent_choices import OwnChoices
from scalabl.uncertainty.adaptive import Rule
from scalabl_server.batching.jobs import AdaptiveJob
from scalabl_server.batching.row_demand import RowDemand
from scalabl_server.methods import Method
from scalabl_server.predict.checks import calibration_mismatch, check_method, level_for, rule_of
from scalabl_server.problems import ProblemError
from scalabl_server.schemas.prediction import PredictRequest
from scalabl_server.settings import ServeSettings
from scalabl_server.text import quoted

SHOWN_CHARACTERS = 80  # of a choice in a message
CHARACTERS_PER_TOKEN = 4  # in English text; used to estimate a length before the text is tokenised


@dataclass(frozen=True)
class CheckedRequest:
    """A checked request, with the defaults filled in.

    Attributes:
        choices: for each text, the names of its choices.
        restricted: whether the request names some of a classification's choices, to which its answer is restricted.
        num_samples: K; with a rule, the maximum; 0 if the method draws no samples.
        rule: when to stop drawing samples for an input; None if K is fixed.
        linear_rows: batch rows of the linearisation, one per member and choice of the adapter; 0 without linearisation.
        level: the calibrated coverage of the prediction set; None without an applicable calibration.
        calibration_mismatch: why the adapter's calibration does not apply; None if it does, or if there is none.
        top_k: of how many choices the answer has the probabilities; None for all.
    """

    texts: list[str]
    choices: list[Sequence[str]]
    restricted: bool
    method: Method
    num_samples: int
    rule: Rule | None
    linear_rows: int
    seed: int
    priority: int
    level: str | None
    calibration_mismatch: str | None
    truncate: bool
    return_samples: bool
    explain: bool
    top_k: int | None = None

    @property
    def demand(self) -> RowDemand:
        """The batch rows of each input: its samples and its linearisation."""
        if self.rule is not None:
            return AdaptiveJob.demand_of(self.rule)
        return RowDemand.fixed(self.num_samples + self.linear_rows)

    def own_choices(self, task: Task) -> list[OwnChoices]:
        """For each input which of the task's choices it has."""
        if task.kind == "multiple_choice":
            return [len(names) for names in self.choices]
        if not self.restricted:
            return [len(task.choices)] * len(self.texts)
        index_of = {name: index for index, name in enumerate(task.choices)}
        return [[index_of[name] for name in names] for names in self.choices]

    def estimated_tokens(self, rows: int, max_tokens: int) -> list[int]:
        """An estimate of rows x length for each input, before it is tokenised."""
        return [rows * min(max_tokens, 1 + len(text) // CHARACTERS_PER_TOKEN) for text in self.texts]


def read_request(request: PredictRequest, config: AdapterConfig, settings: ServeSettings, max_tokens: int) -> CheckedRequest:
    """Check a request against the adapter and the limits. Cheap: it does not tokenise the texts.

    Args:
        max_tokens: limit on one prompt.

    Raises:
        ProblemError: `invalid-field` or `input-too-large`; it names the field, the value and the limit.
    """
    check_method(request)
    rule = rule_of(request, settings.max_samples, config.members)
    num_samples = 0 if request.method == "linearized" else settings.num_samples
    if rule is not None:
        num_samples = rule.most
    elif isinstance(request.num_samples, int):
        num_samples = request.num_samples
    if num_samples > settings.max_samples:
        raise ProblemError(
            "invalid-field", f"{num_samples} is above this server's limit of {settings.max_samples}", field="num_samples"
        )
    if 0 < num_samples < config.members:
        raise ProblemError(
            "invalid-field",
            f"{num_samples} is below {config.members}: this adapter is a mixture of {config.members} members, and each "
            "needs a sample",
            field="num_samples",
        )
    if abs(request.priority) > settings.max_priority:
        raise ProblemError(
            "invalid-field",
            f"{request.priority} is outside this server's range of -{settings.max_priority} to {settings.max_priority}"
            if settings.max_priority
            else "this server does not accept priorities; leave the field out",
            field="priority",
        )
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    if len(texts) > settings.max_inputs:
        raise ProblemError(
            "input-too-large",
            f"{len(texts)} texts exceed the limit of {settings.max_inputs} per request; send fewer at once",
            field="inputs",
        )
    limit = settings.longest_text(max_tokens)
    for position, text in enumerate(texts):
        if len(text) > limit and not request.truncate:
            raise ProblemError(
                "input-too-large",
                f"{len(text)} characters exceed the limit of {limit}; shorten the input or set truncate to true",
                field=f"inputs{place_of(position, len(texts))}",
            )
    choices = _choices_per_input(config.task, request, len(texts), settings)
    if request.return_samples:
        values = num_samples * sum(min(len(names), request.top_k or len(names)) for names in choices)
        if values > settings.max_sample_values:
            raise ProblemError(
                "input-too-large",
                f"{values} probabilities (inputs x samples x choices) exceed the limit of "
                f"{settings.max_sample_values} per answer; send fewer inputs at once or lower num_samples",
                field="return_samples",
            )
    seed = settings.seed if request.seed is None else request.seed
    drawn: int | Literal["auto"] = num_samples if rule is None else "auto"
    restricted = config.task.kind == "classification" and request.choices is not None
    mismatch = calibration_mismatch(
        config.calibration, request.method, drawn, seed, settings.draw_scheme, restricted=restricted
    )
    return CheckedRequest(
        texts=[text[:limit] for text in texts] if request.truncate else texts,
        choices=choices,
        restricted=restricted,
        method=request.method,
        num_samples=num_samples,
        rule=rule,
        linear_rows=0 if request.method == "monte_carlo" else config.members * len(config.task.choices),
        seed=seed,
        priority=request.priority,
        level=level_for(config.calibration, request.coverage, mismatch),
        calibration_mismatch=mismatch,
        truncate=request.truncate,
        return_samples=request.return_samples,
        explain=request.explain,
        top_k=request.top_k,
    )


def place_of(position: int, count: int) -> str:
    """The suffix of a field's name that points to one of `count` inputs, such as `.3`; empty for a single input."""
    return f".{position}" if count > 1 else ""


def _choices_per_input(task: Task, request: PredictRequest, count: int, settings: ServeSettings) -> list[Sequence[str]]:
    if request.choices is None:
        if task.kind == "classification":
            return [task.choices] * count
        raise ProblemError(
            "invalid-field", "this adapter's task is multiple_choice; send the choices of the inputs", field="choices"
        )
    lists: list[Sequence[str]] = [names for names in request.choices if not isinstance(names, str)]
    if lists and len(lists) != count:
        raise ProblemError(
            "invalid-field",
            f"{len(lists)} lists of choices for {count} inputs; send one list for all inputs or one per input",
            field="choices",
        )
    shared = not lists
    if shared:
        lists = [[name for name in request.choices if isinstance(name, str)]]
    for position, names in enumerate(lists):
        where = "" if shared else place_of(position, count)
        if task.kind == "classification":
            _check_subset(task, names, f"choices{where}")
            continue
        if len(names) > settings.max_choices:
            raise ProblemError(
                "invalid-field",
                f"{len(names)} choices exceed the limit of {settings.max_choices}; send fewer",
                field=f"choices{where}",
            )
        longest = max(map(len, names))
        if longest > settings.max_choice_chars:
            raise ProblemError(
                "invalid-field",
                f"a choice of {longest} characters exceeds the limit of {settings.max_choice_chars}; shorten it",
                field=f"choices{where}",
            )
    return lists * count if shared else lists


def _check_subset(task: Task, names: Sequence[str], field: str) -> None:
    """Refuse names that are no choices of a classification, or that appear twice."""
    known, seen = set(task.choices), set[str]()
    for name in names:
        if name not in known:
            detail = f"{quoted(name, SHOWN_CHARACTERS)} is not a choice of this adapter, whose task is classification"
            raise ProblemError(
                "invalid-field", f"{detail}; send some of its own choices (see /info), or leave the field out", field=field
            )
        if name in seen:
            shown = quoted(name, SHOWN_CHARACTERS)
            raise ProblemError("invalid-field", f"{shown} appears twice; choices must be distinct", field=field)
        seen.add(name)
