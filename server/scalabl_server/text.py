"""Text for messages and pages: shortening what may be long. Knows nothing of requests or logs."""

from __future__ import annotations


def shortened(text: str, limit: int) -> str:
    """The text, or its first `limit` characters and an ellipsis where it is longer."""
    return text if len(text) <= limit else text[:limit] + "…"


def quoted(text: str, limit: int) -> str:
    """The shortened text in quotes, with its control characters escaped."""
    return repr(shortened(text, limit))
