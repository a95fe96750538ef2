"""The contents of an adapter's `adapter_config.json` as typed, validated models.

Reading it from a file is in `files.adapter_directory`.
"""

from __future__ import annotations

import string
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FORMAT_VERSION = 1

TaskKind = Literal["classification", "multiple_choice"]
SetMethod = Literal["lac", "aps"]
Quantization = Literal["int8", "bnb-8bit", "bnb-4bit"]  # of a base model's linear layers
DoubtName = Literal["mutual_information", "entropy", "confidence"]

CLASSIFICATION_TEMPLATE = "{input}\nLabel:"
# The prompt of the authors' published code (BayesAdapt) for its multiple-choice sets.
MULTIPLE_CHOICE_TEMPLATE = (
    "Answer the multiple choice question below. Output the letter of your choice only.\n"
    "{input}\nChoices:\n{choices}\nAnswer:"
)


class Task(BaseModel):
    """How a text becomes a prompt, and which tokens stand for the choices.

    `classification` has fixed choices; `multiple_choice` takes them from each request and letters them, so that here
    `choices` are the letters. `template` holds `{input}` and, for multiple choice, `{choices}`.
    `choice_prefix` is the text between the prompt and the choice (a space after "Label:", say, or the first characters of
    a JSON answer after a chat template). `choice_tokens` are the token ids, one per choice, that the head is cut to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: TaskKind
    template: str
    choices: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=2)
    choice_tokens: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    chat: bool = False
    choice_prefix: str = " "

    @field_validator("template")
    @classmethod
    def _template_is_wellformed(cls, template: str) -> str:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        except ValueError as error:
            raise ValueError(
                f"template is not a valid format string ({error}); write literal braces as {{{{ and }}}}"
            ) from None
        unknown = [field for field in fields if field not in ("input", "choices")]
        if unknown:
            raise ValueError(f"template has an unknown placeholder {{{unknown[0]}}}; use {{input}} and {{choices}}")
        if "input" not in fields:
            raise ValueError("template has no {input} placeholder, so every input would get the same answer")
        return template

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.kind == "multiple_choice" and "{choices}" not in self.template:
            raise ValueError("template has no {choices} placeholder, which multiple_choice needs")
        if len(set(self.choices)) != len(self.choices):
            raise ValueError(f"choices are not distinct: {_first_repeated(self.choices)!r} appears twice")
        if self.choice_tokens is not None:
            if len(self.choice_tokens) != len(self.choices):
                raise ValueError(f"choice_tokens has {len(self.choice_tokens)} entries for {len(self.choices)} choices")
            seen: dict[int, str] = {}
            for choice, token in zip(self.choices, self.choice_tokens, strict=True):
                if token in seen:
                    raise ValueError(f"choices {seen[token]!r} and {choice!r} share the token {token}; rename one of them")
                seen[token] = choice
        return self


def _first_repeated(items: tuple[str, ...]) -> str:
    return next(item for index, item in enumerate(items) if item in items[:index])


class CalibrationData(BaseModel):
    """The held-out file: `fit_rows` chose posterior scale and temperature, `threshold_rows` the thresholds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    sha256: str
    rows: int
    fit_rows: int
    threshold_rows: int


class Abstention(BaseModel):
    """No answer where the doubt `score` is above `threshold` (`confidence` stands for one minus it).

    On the threshold rows `coverage` of the inputs were answered, `achieved_risk` of these wrongly; with `confidence` the
    true share of wrong answers is at most `risk_bound`, which is at most `target_risk`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    score: DoubtName
    threshold: float
    target_risk: float
    confidence: float
    achieved_risk: float
    risk_bound: float
    coverage: float


class Fit(BaseModel):
    """NLL (nats) and ECE (15 bins) on the threshold rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    nll: float
    ece: float


class Calibration(BaseModel):
    """What `scalabl calibrate` found, beside `posterior_scale` and `temperature`.

    It holds for the draws it was made with: `num_samples`, `seed`, `draw_scheme`. `thresholds` are by method and level
    ("0.9"); `quantiles` of mutual information and entropy by probability, as a reference to tell drift by; `before` is with
    scale and temperature 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: CalibrationData
    num_samples: int = Field(ge=1)
    seed: int
    draw_scheme: str
    method: SetMethod
    thresholds: dict[SetMethod, dict[str, float]]
    abstain: Abstention | None = None
    quantiles: dict[Literal["mutual_information", "entropy"], dict[str, float]]
    before: Fit
    after: Fit

    @model_validator(mode="after")
    def _method_has_levels(self) -> Self:
        if not self.thresholds.get(self.method):
            raise ValueError(f"calibration has no thresholds for its method {self.method!r}")
        for level in (level for levels in self.thresholds.values() for level in levels):
            try:
                known = 0 < float(level) < 1 and f"{float(level):g}" == level
            except ValueError:
                known = False
            if not known:
                raise ValueError(f"calibration has thresholds for the level {level!r}; a level is a number like '0.9'")
        return self

    @property
    def levels(self) -> dict[str, float]:
        """The thresholds of the chosen method, by level."""
        return self.thresholds[self.method]

    @property
    def default_level(self) -> str:
        """0.9 where it was calibrated, else the first one."""
        return "0.9" if "0.9" in self.levels else next(iter(self.levels))


class AdapterConfig(BaseModel):
    """The contents of `adapter_config.json`: PEFT's field names where PEFT has one.

    `prior_std` is the standard deviation of p(s); `posterior_scale` (tau) multiplies sigma and `temperature` divides the
    logits, both set by calibration, whose thresholds are under `calibration`. `layers_to_transform` limits the adapted
    decoder layers (None: all of them); it does not concern the head, which is adapted when `target_modules` names it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    peft_type: Literal["SCALABL"] = "SCALABL"
    format_version: int = FORMAT_VERSION
    base_model_name_or_path: str
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0)
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    prior_std: float = Field(default=1.0, gt=0)
    posterior_scale: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    task: Task
    calibration: Calibration | None = None

    @field_validator("format_version")
    @classmethod
    def _version_is_known(cls, version: int) -> int:
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version {version} is not supported; this release reads version {FORMAT_VERSION}")
        return version

    @property
    def scaling(self) -> float:
        """alpha / r, the factor of B diag(s) A."""
        return self.lora_alpha / self.r
