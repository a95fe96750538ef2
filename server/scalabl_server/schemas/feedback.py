"""The JSON of `/feedback` and `/predictions`: true answers to predictions, and what is stored of a prediction."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class Outcome(BaseModel):
    """The true answer to one prediction."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="The prediction's id, as /predict gave it.")
    label: str = Field(description="The true choice, one of those that the prediction had.")


# One outcome or a list of them; told apart by kind, so that an error names the field of the one that was sent.
FeedbackRequest = Annotated[
    Annotated[Outcome, Tag("object[Outcome]")] | Annotated[list[Outcome], Field(min_length=1), Tag("list[Outcome]")],
    Discriminator(lambda body: "list[Outcome]" if isinstance(body, list) else "object[Outcome]"),
]


class OutcomeStatus(BaseModel):
    """What became of one label: stored first, already so, or stored in place of another."""

    id: str
    label: str
    status: Literal["recorded", "unchanged", "corrected"]


class FeedbackResponse(BaseModel):
    """Every label of the request is on disk."""

    results: list[OutcomeStatus]


class LabelAt(BaseModel):
    """A label and when it came."""

    label: str
    labelled_at: datetime


class StoredPrediction(BaseModel):
    """A prediction as it was answered, with its labels; all but the last were corrected."""

    id: str
    model: str
    adapter: str
    created_at: datetime
    prediction: dict[str, Any] = Field(description="The prediction as /predict answered it, without samples.")
    input_hash: str = Field(description="SHA-256 of the input's UTF-8, keyed when the server has a key for it.")
    input: str | None = Field(description="The input itself, where the server stores it.")
    label: str | None = Field(description="The latest label.")
    labels: list[LabelAt]
