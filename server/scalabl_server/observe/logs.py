"""Log formats: one line per record, as text or JSON, and one access line per request. What is logged is decided elsewhere.

Control characters in logged values are escaped, so that no client can forge a log line.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from scalabl_server.observe import trace
from scalabl_server.settings import LogFormat
from scalabl_server.text import shortened

MESSAGE_LIMIT = 4096  # characters
EXCEPTION_LIMIT = 32_768
FIELD_LIMIT = 256

access = logging.getLogger("scalabl.access")


def configure(level: str, style: LogFormat) -> None:
    """Send the records of every logger of the process to standard error, in one format."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    for client in ("httpx", "httpx2"):  # they log a line for each look-up on the model hub and each call to vLLM
        logging.getLogger(client).setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs three uninteresting lines at each start
    transformers = logging.getLogger("transformers")  # it has its own handler for standard error
    transformers.handlers.clear()
    transformers.propagate = True


def log_request(fields: dict[str, Any], level: int = logging.INFO) -> None:
    """Log the access line of one request; fields that are None are left out."""
    logged = {name: _bounded(value) for name, value in fields.items() if value is not None}
    access.log(level, " ".join(f"{name}={_plain(value)}" for name, value in logged.items()), extra={"fields": logged})


def _plain(value: Any) -> str:
    """A value for a line of `name=value` pairs, quoted where it could be mistaken for the next pair."""
    text = str(value)
    return text if text and not any(c.isspace() or c in '"=' for c in text) else json.dumps(text)


def _bounded(value: Any) -> Any:
    return shortened(value, FIELD_LIMIT) if isinstance(value, str) else value


def _escaped(text: str) -> str:
    """Replace control characters and line ends of any script by escapes, so that a value stays on its line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class JsonLines(logging.Formatter):
    """One JSON object per record, ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        if fields is None:
            line["message"] = shortened(record.getMessage(), MESSAGE_LIMIT)
            request = trace.current_or_none()
            if request is not None:
                line |= {"request_id": request.request_id, "trace_id": request.trace_id}
        else:
            line |= {"message": "request"} | fields
        if record.exc_info:
            line["exception"] = shortened(self.formatException(record.exc_info), EXCEPTION_LIMIT)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """`LEVEL logger: message`, followed by the traceback on indented lines."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{record.levelname} {record.name}: {_escaped(shortened(record.getMessage(), MESSAGE_LIMIT))}"
        request = trace.current_or_none()
        if request is not None and not hasattr(record, "fields"):
            line += f" request_id={request.request_id}"
        if record.exc_info:
            text = shortened(self.formatException(record.exc_info), EXCEPTION_LIMIT)
            line += "".join(f"\n    {_escaped(part)}" for part in text.splitlines())
        return line
