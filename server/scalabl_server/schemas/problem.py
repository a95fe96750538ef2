"""The JSON schema of an error response."""

from __future__ import annotations

from pydantic import BaseModel


class Problem(BaseModel):
    """An error as RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
