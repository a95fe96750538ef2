"""Shortening and quoting of text for messages and pages. Knows nothing about requests or logs."""

from __future__ import annotations


def shortened(text: str, limit: int) -> str:
    """The text itself, or its first `limit` characters and an ellipsis if it is longer."""
    return text if len(text) <= limit else text[:limit] + "…"


def quoted(text: str, limit: int) -> str:
    """The shortened text in quotes, with its control characters escaped."""
    return repr(shortened(text, limit))
