"""The contents of an adapter's `adapter_config.json` as typed, validated models.

The file itself is read and written in `files.adapter_directory`.
"""

from __future__ import annotations

import datetime
import string
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FORMAT_VERSIONS = (1, 2)  # that this release reads; an adapter has the lowest that can express it

TaskKind = Literal["classification", "multiple_choice"]
SetMethod = Literal["lac", "aps"]
Quantization = Literal["int8", "bnb-8bit", "bnb-4bit"]  # how a base model's linear layers are stored
SpecialTokensInText = Literal["text", "control"]
HeadKind = Literal["vocabulary", "own"]
Covariance = Literal["full", "diagonal"]  # of q(s): across all adapted layers, or of independent scalars
PrecisionOrigin = Literal["unit", "evidence", "held_out", "given"]
DoubtName = Literal["mutual_information", "entropy", "confidence"]

CLASSIFICATION_TEMPLATE = "{input}\nLabel:"
# The prompt of the authors' published code (BayesAdapt) for its multiple-choice sets.
MULTIPLE_CHOICE_TEMPLATE = (
    "Answer the multiple choice question below. Output the letter of your choice only.\n"
    "{input}\nChoices:\n{choices}\nAnswer:"
)


class Task(BaseModel):
    """How a text becomes a prompt, and which tokens stand for the choices.

    `classification` has fixed choices. In `multiple_choice` each request brings its own choices, which the prompt labels
    with letters; here `choices` are these letters. `template` contains `{input}` and, for multiple choice, `{choices}`.
    `choice_prefix` is the text between the prompt and the choice (a space after "Label:", say, or the first characters of
    a JSON answer after a chat template). `choice_tokens` are the token ids, one per choice; only their rows of the model's
    output head are used.

    `special_tokens_in_text`: whether a special token that stands in an input or a choice is encoded as the text that it is,
    or as a control token. `chat_date` is the date in prompts whose chat template asks for the current date, the date of the
    training. `head`: whether the choices' rows of the output head are the base model's, for the choice tokens, or `own`: the
    tensor `head.weight` [C, D] of the adapter, read where the prompt ends, without choice tokens. These three are left out
    of the file where they have their defaults, as in adapters of format version 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: TaskKind
    template: str
    choices: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=2)
    choice_tokens: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    chat: bool = False
    choice_prefix: str = " "
    special_tokens_in_text: SpecialTokensInText = Field(default="control", exclude_if=lambda value: value == "control")
    chat_date: datetime.date | None = Field(default=None, exclude_if=lambda value: value is None)
    head: HeadKind = Field(default="vocabulary", exclude_if=lambda value: value == "vocabulary")

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
            raise ValueError("template has no {input} placeholder, so every input would get the same answer; add it")
        return template

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.kind == "multiple_choice" and "{choices}" not in self.template:
            raise ValueError("template has no {choices} placeholder, which multiple_choice needs; add it")
        if len(set(self.choices)) != len(self.choices):
            raise ValueError(f"choices are not distinct: {_first_repeated(self.choices)!r} appears twice; rename one")
        if self.head == "own" and (self.kind != "classification" or self.choice_tokens is not None):
            raise ValueError(
                "head is 'own', which is for classification without choice_tokens; remove head or choice_tokens"
            )
        if self.choice_tokens is not None:
            if len(self.choice_tokens) != len(self.choices):
                raise ValueError(
                    f"choice_tokens has {len(self.choice_tokens)} entries for {len(self.choices)} choices; it needs one each"
                )
            seen: dict[int, str] = {}
            for choice, token in zip(self.choices, self.choice_tokens, strict=True):
                if token in seen:
                    raise ValueError(f"choices {seen[token]!r} and {choice!r} share the token {token}; rename one of them")
                seen[token] = choice
        return self

    @property
    def needs_version_2(self) -> bool:
        """Whether the task has fields that format version 1 does not know."""
        return self.special_tokens_in_text != "control" or self.chat_date is not None or self.head != "vocabulary"


def _first_repeated(items: tuple[str, ...]) -> str:
    return next(item for index, item in enumerate(items) if item in items[:index])


class CalibrationData(BaseModel):
    """The held-out data: `fit_rows` of its rows fitted posterior scale and temperature, `threshold_rows` the thresholds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    sha256: str
    rows: int
    fit_rows: int
    threshold_rows: int


class Abstention(BaseModel):
    """The abstention rule: an input gets no answer when its doubt score is above `threshold`.

    `score` names the doubt score; the score `confidence` means 1 - confidence. `coverage` is the share of the threshold
    rows that were answered, `achieved_risk` the share of wrong answers among these. With probability `confidence` the true
    share of wrong answers is at most `risk_bound`, which is at most `target_risk`.
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
    """Negative log-likelihood (nats) and expected calibration error (15 bins) on the threshold rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    nll: float
    ece: float


class Calibration(BaseModel):
    """The results of `scalabl calibrate`, except `posterior_scale` and `temperature`.

    They hold for the posterior draws that were used: `num_samples`, `seed`, `draw_scheme`. `thresholds` has a threshold for
    each set method and level (such as "0.9"). `quantiles` has quantiles of mutual information and entropy by probability, a
    reference for detecting drift. `before` was measured with scale and temperature 1, `after` with the fitted values.
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
            raise ValueError(f"calibration has no thresholds for its method {self.method!r}; run scalabl calibrate again")
        for level in (level for levels in self.thresholds.values() for level in levels):
            try:
                valid = 0 < float(level) < 1 and f"{float(level):g}" == level
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"calibration has thresholds for the level {level!r}; use a level like '0.9'")
        return self

    @property
    def levels(self) -> dict[str, float]:
        """The thresholds of the chosen method, by level."""
        return self.thresholds[self.method]

    @property
    def default_level(self) -> str:
        """The level 0.9 if it was calibrated, else the first one."""
        return "0.9" if "0.9" in self.levels else next(iter(self.levels))


class NoveltyData(BaseModel):
    """A data file from which a part of the novelty reference comes: its name, the SHA-256 of its prompts, its rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str
    rows: int


class NoveltyCalibration(BaseModel):
    """The held-out rows that give the p-values, and the posterior draws under which they were scored.

    An input is novel when its p-value is at most `level`. Of inputs like these rows at most this share is called novel.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: NoveltyData
    level: float = Field(gt=0, lt=1)
    num_samples: int = Field(ge=1)
    seed: int
    draw_scheme: str


class Novelty(BaseModel):
    """How the tensors in `novelty.safetensors` were made, and what they belong to.

    They hold for one base model and for the adapter weights with this SHA-256. `data` are the training rows, of which `rows`
    are kept as unit vectors with `components` numbers; `width` is that of the base model's hidden states, `neighbours` the
    number of nearest rows that a score averages. `calibration` is None as long as there are no p-values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: NoveltyData
    base_model_name_or_path: str
    weights_sha256: str
    width: int = Field(ge=1)
    components: int = Field(ge=1)
    rows: int = Field(ge=1)
    neighbours: int = Field(ge=1)
    calibration: NoveltyCalibration | None = None


class PosteriorFit(BaseModel):
    """How `scalabl fit` found the posterior: `rows` of the `total_rows` rows of `data` gave the curvature.

    `prior_precision` is that of the fit's prior N(0, scale^2 / precision), with the size of each scalar's mean as its scale,
    and `precision_from` says how it was chosen.
    `log_evidence` is the logarithm of the marginal likelihood of all rows, in nats. `determined_scalars` says how many of
    the scalars the rows determine, rather than the prior.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Literal["laplace"] = "laplace"
    covariance: Covariance
    data: str
    rows: int = Field(ge=1)
    total_rows: int = Field(ge=1)
    prior_precision: float = Field(gt=0)
    precision_from: PrecisionOrigin
    log_evidence: float
    determined_scalars: float = Field(ge=0)


class AdapterConfig(BaseModel):
    """The contents of `adapter_config.json`, with PEFT's field names where PEFT has such a field.

    `prior_std` is the standard deviation of the prior p(s). `posterior_scale` (tau) multiplies sigma and `temperature`
    divides the logits; calibration sets both. `layers_to_transform` lists the decoder layers to adapt (None: all of them).
    It does not apply to the output head, which is adapted when `target_modules` names it. `members` is the number of members
    of a mixture posterior. With the `covariance` full, q(s) has a covariance across all adapted layers, whose factor is
    among the tensors. `posterior_fit` says how a posterior was fitted that was not trained, `novelty` how the reference for
    unfamiliar inputs was made. More than one member, a full covariance, a fit and novelty need format version 2.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    peft_type: Literal["SCALABL"] = "SCALABL"
    format_version: int = 1
    base_model_name_or_path: str
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0)
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    members: int = Field(default=1, ge=1, exclude_if=lambda members: members == 1)
    prior_std: float = Field(default=1.0, gt=0)
    posterior_scale: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    task: Task
    calibration: Calibration | None = None
    novelty: Novelty | None = Field(default=None, exclude_if=lambda novelty: novelty is None)
    covariance: Covariance = Field(default="diagonal", exclude_if=lambda covariance: covariance == "diagonal")
    posterior_fit: PosteriorFit | None = Field(default=None, exclude_if=lambda fit: fit is None)

    @field_validator("format_version")
    @classmethod
    def _version_is_known(cls, version: int) -> int:
        if version not in FORMAT_VERSIONS:
            known = " and ".join(map(str, FORMAT_VERSIONS))
            raise ValueError(f"format_version {version} is not supported; this release reads versions {known}")
        return version

    @model_validator(mode="after")
    def _version_has_the_fields(self) -> Self:
        later = {"members": self.members > 1, "covariance": self.covariance == "full"}
        later |= {"posterior_fit": self.posterior_fit is not None, "novelty": self.novelty is not None}
        named = [name for name, is_set in later.items() if is_set]
        if self.format_version < 2 and named == ["novelty"]:
            raise ValueError("novelty needs format_version 2; set it, or remove novelty")
        if self.format_version < 2 and named:
            raise ValueError(f"{named[0]} is {getattr(self, named[0])}, which needs format_version 2")
        if self.members > 1 and self.task.head == "own":
            raise ValueError("a mixture of several members cannot have a head of its own; set members to 1, or task.head")
        return self

    @property
    def lowest_format_version(self) -> int:
        """The lowest format version that has all fields of this adapter; at least `format_version`."""
        has_later = self.members > 1 or self.covariance == "full" or self.posterior_fit is not None
        has_later = has_later or self.novelty is not None
        return max(self.format_version, 2 if self.task.needs_version_2 or has_later else 1)

    def with_novelty(self, novelty: Novelty | None) -> Self:
        """The same configuration with another novelty reference, or with none, in the lowest format version that has it."""
        changed = self.model_copy(update={"novelty": novelty, "format_version": 1})
        return changed.model_copy(update={"format_version": changed.lowest_format_version})

    @property
    def novelty_level(self) -> float | None:
        """The level at which inputs are called novel; None if there are no p-values."""
        return None if self.novelty is None or self.novelty.calibration is None else self.novelty.calibration.level

    @property
    def scaling(self) -> float:
        """alpha / r, the factor of B diag(s) A."""
        return self.lora_alpha / self.r
