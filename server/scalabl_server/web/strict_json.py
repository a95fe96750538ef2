"""Strict parsing of a request's JSON: UTF-8, no duplicate names, finite numbers, valid Unicode, limited depth."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers

from scalabl_server.problems import ProblemError
from scalabl_server.text import quoted

MAX_DEPTH = 64
UTF8_NAMES = ("utf-8", "utf8", "us-ascii")
# `; name=value` or `; name="value"` of a media type (RFC 9110, section 5.6.6); the value is in one of the last two groups.
PARAMETER = re.compile(r';\s*([^\s;="]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))')
LONGEST_NAME_SHOWN = 80  # characters


def check_content_type(headers: Headers) -> None:
    """Accept a JSON content type, or none (Triton's client sends none), and no content encoding.

    Of the content type's parameters only `charset` counts; others, such as OData's, and empty ones are ignored.

    Raises:
        ProblemError: `unsupported-media-type`.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ProblemError("unsupported-media-type", "send the body uncompressed, without a 'Content-Encoding'")
    content_type = headers.get("content-type")
    if content_type is None:
        return
    kind, _, parameters = content_type.partition(";")
    kind = kind.strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ProblemError("unsupported-media-type", "send a JSON object, with the header 'Content-Type: application/json'")
    for name, quoted_value, plain_value in PARAMETER.findall(f";{parameters}"):
        charset = (quoted_value or plain_value).strip("' ").lower()
        if name.lower() == "charset" and charset not in UTF8_NAMES:
            raise ProblemError(
                "unsupported-media-type", f"the charset is {quoted(charset, LONGEST_NAME_SHOWN)}; send the JSON in UTF-8"
            )


def parse(body: bytes) -> Any:
    """The parsed JSON document. A byte order mark before it is ignored (RFC 8259, section 8.1).

    Raises:
        ProblemError: `invalid-field`; the detail says what is wrong and where.
    """
    try:
        document = json.loads(
            body.decode("utf-8").removeprefix("\ufeff"), object_pairs_hook=_object, parse_constant=_constant
        )
    except UnicodeDecodeError as error:
        raise _refused(f"not valid UTF-8 at byte {error.start}; send a JSON document in UTF-8") from None
    except json.JSONDecodeError as error:
        raise _refused(f"not valid JSON at character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # an integer with thousands of digits
        raise _refused(f"a number is too long: {str(error).partition(';')[0]}") from None
    if isinstance(document, str | dict | list):
        _check(document)
    return document


def _refused(detail: str) -> ProblemError:
    return ProblemError("invalid-field", detail, field="body")


def _too_deep() -> ProblemError:
    return _refused(f"nested more deeply than the limit of {MAX_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _refused(
                    f"the name {quoted(name, LONGEST_NAME_SHOWN)} appears twice in one object; send each name once"
                )
            seen.add(name)
    return document


def _constant(name: str) -> Any:
    raise _refused(f"{name} is not JSON; send a finite number or null")


def _check(document: Any) -> None:
    """Refuse deep nesting, and strings that cannot be encoded as UTF-8; the error names the field. Not recursive."""
    pending: list[tuple[Any, tuple[object, ...]]] = [(document, ())]
    while pending:
        value, where = pending.pop()
        if isinstance(value, str):
            _check_text(value, ".".join(map(str, where)) or "body", "the text")
            continue
        if len(where) >= MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, dict):
            for name in value:
                _check_text(name, "body", "a field's name")
        items: Iterable[tuple[object, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            if isinstance(item, dict | list) or (isinstance(item, str) and not item.isascii()):
                pending.append((item, (*where, name)))


def _check_text(text: str, field: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ProblemError(
            "invalid-field", f"{what} is not valid Unicode (a lone surrogate at character {error.start})", field=field
        ) from None
