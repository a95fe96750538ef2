"""The JSON schemas of `/feedback` (true answers to predictions) and `/predictions` (stored predictions)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class Outcome(BaseModel):
    """The true answer to one prediction."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="Id of the prediction, from the answer of /predict.")
    label: str | None = Field(
        description="The true choice, one of the prediction's choices; null if none of them is the true answer."
    )


# One outcome or a list of them. The discriminator looks at the type first, so that an error names the right field.
FeedbackRequest = Annotated[
    Annotated[Outcome, Tag("object[Outcome]")] | Annotated[list[Outcome], Field(min_length=1), Tag("list[Outcome]")],
    Discriminator(lambda body: "list[Outcome]" if isinstance(body, list) else "object[Outcome]"),
]


class OutcomeStatus(BaseModel):
    """The effect of one label: recorded for the first time, unchanged, or corrected (an earlier label was replaced)."""

    id: str
    label: str | None
    status: Literal["recorded", "unchanged", "corrected"]


class FeedbackResponse(BaseModel):
    """The effect of every label of the request. All of them are on disk."""

    results: list[OutcomeStatus]


class LabelAt(BaseModel):
    """A label and the time at which it was reported."""

    label: str | None = Field(description="The true choice; null for none of the choices.")
    labelled_at: datetime


class StoredPrediction(BaseModel):
    """A stored prediction with its labels. The last label is the valid one; it replaced those before it."""

    id: str
    model: str
    adapter: str
    created_at: datetime
    prediction: dict[str, Any] = Field(
        description="The prediction as /predict computed it, without samples, with all probabilities. With more than 256 "
        "choices these have seven digits, and only the 16 most probable choices have standard errors."
    )
    input_hash: str = Field(description="SHA-256 of the input in UTF-8; an HMAC if the server has a key for it.")
    input: str | None = Field(description="The input text; null unless the server stores inputs.")
    labelled: bool = Field(description="Whether a label was reported.")
    label: str | None = Field(
        description="The latest label; null if none of the choices is the true answer, or if `labelled` is false."
    )
    labels: list[LabelAt] = Field(description="All labels, the oldest first.")
